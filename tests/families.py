"""Tiny random models of families that are not plain dense decoders, from transformers' own classes; 2 blocks, hidden 32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from checkpoints import VOCABULARY, save_checkpoint
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lowrank_core.config import ModelSource
from lowrank_core.models import ModelHandle, load_model

__all__ = ["FAMILIES", "built", "load_family"]

_WORDS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "intermediate_size": 48}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 2,
}
_SHARED = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 2,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4}

FAMILIES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "llama": ("llama", _GROUPED),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4, "tie_word_embeddings": False}),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 8}),
    "phi": ("phi", _SIZES),
    "opt": ("opt", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon": ("falcon", {**_SIZES, "multi_query": False, "new_decoder_architecture": False, "bias": True, "alibi": True}),
    "doge": ("doge", _GROUPED),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **_GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "mixtral_many": ("mixtral", {**_GROUPED, "num_local_experts": 20, "num_experts_per_tok": 2}),
    "jetmoe": ("jetmoe", {**_GROUPED, "kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", {**_GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    "llama4": (
        "llama4_text",
        {
            **_GROUPED,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "attention_chunk_size": 64,
        },
    ),
    "jamba": ("jamba", {**_GROUPED, **_JAMBA, "num_experts": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 64}),
    "gpt_neo": ("gpt_neo", {**_SIZES, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}),
    "openai-gpt": ("openai-gpt", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "deepseek_v3": ("deepseek_v3", {**_SIZES, "num_key_value_heads": 4, **_LATENT}),
    "deepseek_v32": (
        "deepseek_v32",
        {**_SIZES, "num_key_value_heads": 4, **_LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4},
    ),
    "minicpm3": ("minicpm3", {**_SIZES, "num_key_value_heads": 4, **_LATENT}),
    "gemma3n_text": (
        "gemma3n_text",
        {**_GROUPED, **_SHARED, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4},
    ),
    "gemma4_text": ("gemma4_text", {**_GROUPED, **_SHARED, "global_head_dim": 16}),
    "xlstm": ("xlstm", {"hidden_size": 32, "num_blocks": 2, "num_heads": 4, "chunk_size": 16}),
    "recurrent_gemma": ("recurrent_gemma", {**_SIZES, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8}),
    "zamba2": (
        "zamba2",
        {
            **_SIZES,
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "hybrid"],
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
            "chunk_size": 16,
        },
    ),
    "mamba": ("mamba", _MAMBA),
    "rwkv": ("rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 64, "attention_hidden_size": 32}),
}
"""Name -> model type of transformers, what its config is given."""


def built(name: str, change: Callable[[PreTrainedModel], None] | None = None) -> PreTrainedModel:
    """Return the model of a family in eval mode, with weights large enough that logits differ."""
    model_type, values = FAMILIES[name]
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**_WORDS, **values}))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.1)
    if change is not None:
        change(module)
    return module.eval()


def load_family(folder: Path, text: str, name: str, change: Callable[[PreTrainedModel], None] | None = None) -> ModelHandle:
    """Return the family's model, saved under ``folder`` and loaded as a user's would be."""
    return load_model(ModelSource(str(save_checkpoint(folder, built(name, change), text))))
