"""Tiny random models of the causal types that transformers knows, from its own config classes.

A config is the type's default with sizes made small: whatever size it names is set by one table, what a type needs besides stands below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from checkpoints import VOCABULARY
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__all__ = ["CAUSAL_TYPES", "NotBuilt", "REPRESENTATIVE", "built_type"]

CAUSAL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
"""Model types of transformers' causal mapping."""

REPRESENTATIVE = (
    *("llama", "gpt2", "gpt_neox", "falcon", "bloom", "opt", "gemma2", "phi3", "mixtral", "gpt_oss", "deepseek_v3", "jamba", "mamba"),
    *("llama4_text", "qwen3_next"),
)

_SIZES: Mapping[str, object] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "attention_hidden_size", "lru_width"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size_mlp", "dff"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "max_seq_length"), 64),
    **dict.fromkeys(("head_dim", "kv_channels", "linear_key_head_dim", "linear_value_head_dim", "mamba_headdim", "mamba_d_head"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size", "window_size", "local_attention"), 16),
    **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "mamba_dt_rank", "time_step_rank", "rotary_dim"), 8),
    "q_lora_rank": 24,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "state_size": 4,
    "ssm_state_size": 4,
    "mamba_d_state": 4,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
    "block_size": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_d_ssm": 64,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_conv_kernel_dim": 4,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 16,
    "use_mamba_kernels": False,
    "query_pre_attn_scalar": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
    "image_size": 28,
    "patch_size": 14,
    "global_head_dim": 8,
    "layer_types": None,
    "layers_block_type": None,
    "mlp_layer_types": None,
    "use_cache": True,
    "rope_scaling": None,
}
"""Whatever size a config names -> the tiny one."""

_WORDS: Mapping[str, object] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

_BESIDES: Mapping[str, Mapping[str, object]] = {
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "gpt_bigcode": {"n_head": 2},
    "qwen3_next": {"num_hidden_layers": 4, "decoder_sparse_step": 1},
    "llama4_text": {"interleave_moe_layer_step": 1, "num_experts_per_tok": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "num_key_value_heads": 2},
    "gptj": {"tie_word_embeddings": False},
    "codegen": {"tie_word_embeddings": False},
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 1},
    "opt": {"do_layer_norm_before": True},
    "deepseek_v4": {"head_dim": 16, "o_lora_rank": 8},
}


class NotBuilt(Exception):
    """transformers builds no tiny model of this type, or does not run it."""


def built_type(model_type: str) -> PreTrainedModel:
    """Return a model of the type in eval mode, with weights large enough that logits differ.

    Raises:
        NotBuilt: with what transformers said, in a line.
    """
    try:
        config = _config(model_type)
        with torch.device("meta"):
            shapes = [parameter.shape for parameter in AutoModelForCausalLM.from_config(config).parameters()]
        size, widest = sum(map(math.prod, shapes)), max(max(shape, default=1) for shape in shapes)
        if size > 20_000_000 or widest > 2048:
            raise ValueError(f"its sizes have other names: {size:,} parameters, {widest:,} wide")
        module = AutoModelForCausalLM.from_config(config).float().eval()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim >= 2:
                    nn.init.normal_(parameter, std=0.1)
                elif not torch.isfinite(parameter).all():
                    nn.init.zeros_(parameter)
            module(input_ids=torch.arange(16)[None], use_cache=False)
    except Exception as error:  # a hundred authors' classes: whatever they raise, the type is not built
        raise NotBuilt(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error).strip() else ''}") from error
    return module


def _config(model_type: str) -> PretrainedConfig:
    return CONFIG_MAPPING[model_type](**{**_small(CONFIG_MAPPING[model_type]), **_WORDS, **_BESIDES.get(model_type, {})})


def _small(kind: type[PretrainedConfig]) -> dict[str, object]:
    """Return what a config class is given, parts of it included: text, vision, audio."""
    default = kind()
    named = default.to_dict()
    values = {name: value for name, value in _SIZES.items() if name in named and not (value is None and named[name] is None)}
    if "qk_rope_head_dim" in values:  # latent attention: widths of heads have names of their own, and no keys are shared
        values = {name: value for name, value in values.items() if name != "head_dim"} | {"num_key_value_heads": 4}
    parts = {name: type(getattr(default, name)) for name in kind.sub_configs or {} if isinstance(getattr(default, name), PretrainedConfig)}
    nested = {name: {**_small(part), **(_WORDS if "text" in name else {})} for name, part in parts.items()}
    return values | nested
