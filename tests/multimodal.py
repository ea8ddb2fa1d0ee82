"""Tiny random models that also see or hear, from transformers' own classes; the part that sees is deeper than the one that reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from checkpoints import VOCABULARY, save_checkpoint
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

__all__ = ["MULTIMODAL", "saved"]

_WORDS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_TEXT = {
    **_WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 48,
}
_SIGHT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
_QWEN_SIGHT = {"depth": 5, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
_LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}


def _text(model_type: str, **values: object) -> dict[str, object]:
    return {"model_type": model_type, **_TEXT, **values}


MULTIMODAL: Mapping[str, Mapping[str, object]] = {
    "gemma3": {
        "text_config": _text("gemma3_text", head_dim=16, sliding_window=8),
        "vision_config": _SIGHT,
        "mm_tokens_per_image": 4,
        "image_token_index": 299,
    },
    "llava": {"text_config": _text("llama"), "vision_config": {"model_type": "clip_vision_model", **_SIGHT}, "image_token_index": 299},
    "mistral3": {
        "text_config": _text("mistral", head_dim=16),
        "vision_config": {"model_type": "pixtral", **_SIGHT, "head_dim": 8},
        "image_token_index": 299,
    },
    "qwen2_5_vl": {
        "text_config": _text("qwen2_5_vl_text", rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}),
        "vision_config": {**_QWEN_SIGHT, "fullatt_block_indexes": [1]},
    },
    "qwen3_5": {
        "text_config": _text("qwen3_5_text", head_dim=16, **_LINEAR, layer_types=["linear_attention", "full_attention"]),
        "vision_config": _QWEN_SIGHT,
    },
    "qwen2_audio": {
        "text_config": _text("qwen2"),
        "audio_config": {"d_model": 16, "encoder_layers": 5, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
        "audio_token_index": 299,
    },
    "paligemma": {
        "text_config": _text("gemma", head_dim=16),
        "vision_config": {"model_type": "siglip_vision_model", **_SIGHT, "projection_dim": 32, "vocab_size": VOCABULARY},
        "projection_dim": 32,
        "image_token_index": 299,
    },
}
"""Model type of transformers -> what its config is given."""


def saved(name: str, folder: Path, text: str) -> Path:
    """Write a checkpoint of the whole model, and a tokenizer; return its folder."""
    torch.manual_seed(0)
    module = getattr(transformers, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[name])(CONFIG_MAPPING[name](**MULTIMODAL[name]))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.1)
    return save_checkpoint(folder, module.eval(), text)
