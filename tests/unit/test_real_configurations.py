"""Of real mixtures at least 95 % of what is no embedding can be compressed: empty models of their published sizes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lowrank_core.models.experts import unroll_experts
from lowrank_core.models.handle import blocks_of
from lowrank_core.models.walk import coverage_of, linear_maps

pytestmark = [pytest.mark.slow, pytest.mark.families]

PUBLISHED: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "Mixtral-8x7B": ("mixtral", {}),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "head_dim": 128,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
        },
    ),
    "gpt-oss-20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "DeepSeek-V3": ("deepseek_v3", {}),
    "OLMoE-1B-7B": (
        "olmoe",
        {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "num_experts": 64},
    ),
    "Llama-4-Scout": ("llama4_text", {}),
    "Jamba-v0.1": ("jamba", {"use_mamba_kernels": False}),
}
"""Model -> type and what its config differs in from the type's defaults."""

BILLIONS = {
    "Mixtral-8x7B": 46.7,
    "Qwen3-30B-A3B": 30.5,
    "gpt-oss-20b": 20.9,
    "DeepSeek-V3": 671,
    "OLMoE-1B-7B": 6.9,
    "Llama-4-Scout": 107,
    "Jamba-v0.1": 51.6,
}
"""Parameters as published: the empty model is the one that is meant."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_nearly_all_of_a_real_mixture_can_be_compressed(name: str):
    model_type, values = PUBLISHED[name]
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**values))
    before = sum(parameter.numel() for parameter in module.parameters())
    assert before == pytest.approx(BILLIONS[name] * 1e9, rel=0.03)
    unroll_experts(module)
    prefix, blocks = blocks_of(module)
    layers = {f"{prefix}.{linear.depth}.{linear.path}" for linear in linear_maps(module, blocks) if linear.kind in ("linear", "expert")}
    coverage = coverage_of(module, prefix, blocks, layers)
    assert coverage.total == before
    assert coverage.inner_share >= 0.95
