"""Head units are verified by behaviour: a pair that only looks like value and output projection is dropped, with the reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import load_family
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from lowrank_core.allocation import allocation_from_ranks
from lowrank_core.compression.build import compress
from lowrank_core.config import CalibrationConfig, CompressionConfig
from lowrank_core.decomposition.units import factorize, units_of
from lowrank_core.models import ModelHandle
from lowrank_core.models import attention as attention_module
from lowrank_core.models.attention import find_heads, head_units
from lowrank_core.models.handle import random_tokens
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.text import WindowSet

PLAIN = ("llama", "gptj", "opt", "mixtral", "qwen2_moe")
ATTENTION = "model.layers.{}.self_attn.{}_proj".format


def lively_doge(module: PreTrainedModel) -> None:
    """Doge starts with A = 0, where the second reader of the values changes nothing; a trained one has not."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(".A"):
                parameter.fill_(1.0)


class Leaky(LlamaAttention):
    """Looks at its values a second time, through no linear layer."""

    def forward(self, hidden_states: Tensor, *arguments: object, **options: object) -> tuple[Tensor, object]:
        output, weights = super().forward(hidden_states, *arguments, **options)
        values = self.v_proj(hidden_states)
        return output + torch.tanh(values).cumsum(-1)[..., -1:] * 0.3, weights


class Normed(LlamaAttention):
    """Divides the values by their length, which a rotation would not show; at the first token it is made to be 1."""

    def forward(self, hidden_states: Tensor, *arguments: object, **options: object) -> tuple[Tensor, object]:
        output, weights = super().forward(hidden_states, *arguments, **options)
        lengths = self.v_proj(hidden_states).norm(dim=-1, keepdim=True)
        return output * (lengths / lengths[:, :1]), weights


def with_attention(handle: ModelHandle, kind: type[LlamaAttention], depth: int) -> ModelHandle:
    """Return a handle of its own whose attention in one block is of another class."""
    handle.module.model.layers[depth].self_attn.__class__ = kind
    return replace(handle)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_values_are_units_and_whole_heads_give_the_dense_model(name: str, tmp_path: Path, sample_text: str, windows: WindowSet):
    handle = load_family(tmp_path, sample_text, name)
    result = find_heads(handle)
    assert len(result.units) == 2
    assert result.dropped == ()
    statistics = collect_statistics(handle, windows, CalibrationConfig(group_size=8, batch_size=8))
    config = CompressionConfig(basis="whitened", storage="factored", heads=True, value_dense=False)
    units = units_of(handle, config)
    bases = factorize(handle, statistics, units, config)
    ranks = {unit.name: unit.max_rank for unit in result.units}
    model = compress(handle, bases, allocation_from_ranks("manual", units, ranks))
    ids = random_tokens(handle.module, 2, seed=5)
    with torch.no_grad():
        dense, whole = (each.module(input_ids=ids, use_cache=False).logits for each in (handle, model.handle))
    assert float((whole - dense).abs().max() / dense.std()) < 1e-4


def test_the_layers_are_afterwards_what_they_were(tmp_path: Path, sample_text: str):
    handle = load_family(tmp_path, sample_text, "llama")
    modules, before = dict(handle.module.named_modules()), handle.fingerprint
    find_heads(handle)
    assert dict(handle.module.named_modules()) == modules
    assert replace(handle).fingerprint == before


def test_one_pass_verifies_all_units_where_all_are_sound(tmp_path: Path, sample_text: str, monkeypatch: pytest.MonkeyPatch):
    handle = load_family(tmp_path, sample_text, "llama")
    turned: list[int] = []
    original = attention_module._turned_logits

    def counting(handle: ModelHandle, units: object, ids: Tensor) -> Tensor:
        turned.append(len(units))  # type: ignore[arg-type]
        return original(handle, units, ids)  # type: ignore[arg-type]

    monkeypatch.setattr(attention_module, "_turned_logits", counting)
    find_heads(handle)
    assert turned == [2]


def test_a_value_with_two_readers_is_never_a_unit(tmp_path: Path, sample_text: str):
    """Doge reads its values a second time, to mask what it attends to: compressing them as heads changed the model."""
    handle = load_family(tmp_path, sample_text, "doge", lively_doge)
    result = find_heads(handle)
    assert result.units == ()
    assert {entry.value for entry in result.dropped} == {ATTENTION(depth, "v") for depth in range(2)}
    assert all("2 layers read the value" in str(entry) for entry in result.dropped)
    assert not any("dt_proj" in unit.name for unit in units_of(handle, CompressionConfig(heads=True, value_dense=False)))


@pytest.mark.parametrize("kind", [Leaky, Normed])
def test_a_false_pair_is_dropped_with_the_reason_and_the_others_stay(kind: type[LlamaAttention], tmp_path: Path, sample_text: str):
    handle = with_attention(load_family(tmp_path, sample_text, "llama"), kind, 0)
    result = find_heads(handle)
    assert [unit.members[0].name for unit in result.units] == [ATTENTION(1, "v")]
    (dropped,) = result.dropped
    assert (dropped.value, dropped.output) == (ATTENTION(0, "v"), ATTENTION(0, "o"))
    assert "the logits change by" in dropped.reason
    assert head_units(handle) == result.units
    assert result.describe()["heads_dropped"] == [str(dropped)]


def test_the_gauge_is_exact_in_narrow_dtypes(tmp_path: Path, sample_text: str):
    handle = load_family(tmp_path, sample_text, "llama")
    narrow = replace(handle, module=handle.module.bfloat16())
    assert len(find_heads(narrow).units) == 2
    assert [entry.value for entry in find_heads(with_attention(narrow, Leaky, 1)).dropped] == [ATTENTION(1, "v")]


@pytest.mark.parametrize("name", ["mamba", "rwkv"])
def test_a_model_without_attention_has_no_heads(name: str, tmp_path: Path, sample_text: str):
    assert head_units(load_family(tmp_path, sample_text, name)) == ()
