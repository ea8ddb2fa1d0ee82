"""Fused projections as linear layers: the same model, found by what its rows do, written and read again as either form."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from checkpoints import VOCABULARY, save_checkpoint
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lowrank_core.allocation.units import value_layers
from lowrank_core.compression.build import CompressedModel, low_rank_layers, swap_layers
from lowrank_core.compression.decomposed import Decomposed, decompose
from lowrank_core.config import CalibrationConfig, CompressionConfig, ExportConfig, ModelSource
from lowrank_core.config.speed import SpeedConfig
from lowrank_core.errors import ModelError
from lowrank_core.export import export
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.models.attention import head_units
from lowrank_core.models.fused import Layout, SplitProjection, layouts_of
from lowrank_core.models.projections import split_projections
from lowrank_core.models.unrolled import roll_back, stored_tensors
from lowrank_core.presets.recipes import preset_named
from lowrank_core.runs import Run, write_json
from lowrank_core.speed import measure_speed
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.statistics.gradients import collect_gradients, gradients_key
from lowrank_core.text import WindowSet

HIDDEN, HEADS, WIDE = 64, 4, 96
_SIZES: Mapping[str, object] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": WIDE,
    "max_position_embeddings": 64,
}
_GPT: Mapping[str, object] = {"n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS, "n_positions": 64, "n_inner": WIDE}
_FALCON = {**_SIZES, "ffn_hidden_size": WIDE, "new_decoder_architecture": False, "multi_query": False}
_QKV, _GATE_UP = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}

FAMILIES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "gpt2": ("gpt2", _GPT),
    "openai-gpt": ("openai-gpt", {**_GPT, "afn": "gelu"}),
    "bigcode-mqa": ("gpt_bigcode", {**_GPT, "multi_query": True}),
    "bigcode-mha": ("gpt_bigcode", {**_GPT, "multi_query": False}),
    "codegen": ("codegen", {**_GPT, "rotary_dim": 8, "tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", _SIZES),
    "bloom": ("bloom", _SIZES),
    "mpt": ("mpt", {"d_model": HIDDEN, "n_layers": 2, "n_heads": HEADS, "max_seq_len": 64, "expansion_ratio": 2}),
    "falcon-new": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-mqa": ("falcon", {**_FALCON, "multi_query": True}),
    "falcon-rw": ("falcon", {**_FALCON, "alibi": True, "bias": True}),
    "phi3": ("phi3", {**_SIZES, "num_key_value_heads": 2, "pad_token_id": 0}),
    "persimmon": ("persimmon", _SIZES),
}
"""[q | k | v] in one and in four blocks, one key for all heads, q k v by head and by group of heads; Conv1D, linears, biases."""

MERGED: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "phi3": FAMILIES["phi3"],
    "glm": ("glm", {**_SIZES, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}),
    "granitemoeshared": (
        "granitemoeshared",
        {**_SIZES, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": WIDE},
    ),
}
"""Gate and up in one matrix."""

CALIBRATION = CalibrationConfig(group_size=2, gradient_windows=6)


def built(name: str, among: Mapping[str, tuple[str, Mapping[str, object]]] = FAMILIES) -> PreTrainedModel:
    kind, sizes = among[name]
    torch.manual_seed(0)
    words = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**words, **sizes})).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def fused(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> ModelHandle:
    return load_model(str(save_checkpoint(tmp_path_factory.mktemp(request.param), built(request.param), sample_text)))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> ModelHandle:
    return load_model(str(save_checkpoint(tmp_path_factory.mktemp("gpt2"), built("gpt2"), sample_text)))


@torch.no_grad()
def logits(module: nn.Module, ids: Tensor) -> Tensor:
    result: Tensor = module(input_ids=ids, use_cache=False).logits
    return result


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.std())


def kinds(handle: ModelHandle) -> set[str]:
    return {layer.shape.kind for layer in handle.layers}


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_joined_parts_are_the_whole(chunks: int):
    layout = Layout((("q_proj", 8), ("k_proj", 4), ("v_proj", 4)), chunks)
    whole = torch.arange(16 * 3).reshape(16, 3)
    parts = layout.divided(whole)
    assert {name: len(rows) for name, rows in parts.items()} == dict(layout.parts)
    assert torch.equal(layout.joined([parts[name] for name in layout.names], -2), whole)
    assert torch.equal(layout.joined([parts[name].T for name in layout.names], -1), whole.T)
    assert Layout.from_mapping("c_attn", json.loads(json.dumps(layout.to_mapping(), sort_keys=True))) == layout


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"parts": [], "chunks": 1},
        {"parts": [["q_proj", 8]]},
        {"parts": [["q_proj", 8]], "chunks": 3},
        {"parts": [["q_proj", 8], ["q_proj", 8]], "chunks": 1},
        {"parts": [["a.b", 8]], "chunks": 1},
        {"parts": [["q_proj", 0]], "chunks": 1},
        {"parts": [["q_proj", "8"]], "chunks": 1},
        {"parts": {"q_proj": 8}, "chunks": 1},
    ],
)
def test_a_division_that_is_none_is_refused(entry: object):
    with pytest.raises(ModelError, match="doesn't say how the rows of 'c_attn' are divided"):
        Layout.from_mapping("c_attn", entry)


# --- the same model --------------------------------------------------------------------------------------------------


def test_split_projections_are_the_same_model(fused: ModelHandle, windows: WindowSet):
    native = AutoModelForCausalLM.from_pretrained(fused.reference).eval()
    assert kinds(fused) >= _QKV
    assert fused.left_fused == ()
    assert close(logits(fused.module, windows.ids[:2]), logits(native, windows.ids[:2]))
    with torch.no_grad():
        for name in layouts_of(fused.module):
            own, split = native.get_submodule(name), fused.module.get_submodule(name)
            rows = torch.randn(5, 3, HIDDEN)
            torch.testing.assert_close(split(rows), own(rows), rtol=1e-6, atol=1e-6)
            assert torch.equal(split.weight, own.weight)


def test_rolling_back_gives_every_bit_back(fused: ModelHandle, windows: WindowSet):
    native = AutoModelForCausalLM.from_pretrained(fused.reference).eval()
    rolled = copy.deepcopy(fused.module)
    roll_back(rolled)
    assert [type(child) for child in rolled.modules()] == [type(child) for child in native.modules()]
    expected, result = native.state_dict(), rolled.state_dict()
    assert set(result) == set(expected)
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    assert torch.equal(logits(rolled, windows.ids[:1]), logits(native, windows.ids[:1]))


def test_what_a_user_saves_of_a_dense_model_is_the_folder_that_it_came_from(fused: ModelHandle, windows: WindowSet, tmp_path: Path):
    fused.module.save_pretrained(tmp_path)
    before, after = (tensors(Path(folder)) for folder in (fused.reference, tmp_path))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    other = copy.deepcopy(fused.module)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(fused.module.state_dict())
    assert torch.equal(logits(other, windows.ids[:1]), logits(fused.module, windows.ids[:1]))


def tensors(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (the archive is no mapping)


def test_counts_are_those_of_the_fused_model(fused: ModelHandle):
    native = AutoModelForCausalLM.from_pretrained(fused.reference)
    assert fused.parameters == sum(p.numel() for p in native.parameters()) == fused.coverage.total
    whole = load_model(fused.reference, whole=list(layouts_of(fused.module)))
    assert not layouts_of(whole.module)
    assert fused.linear_parameters == whole.linear_parameters
    assert fused.coverage == whole.coverage
    assert fused.fingerprint == whole.fingerprint
    stored = list(stored_tensors(fused.module))
    assert [name for name, _ in stored] == sorted(native.state_dict())
    assert all(torch.equal(tensor, native.state_dict()[name]) for name, tensor in stored)


# --- roles -----------------------------------------------------------------------------------------------------------


def test_queries_keys_and_values_read_one_input_and_values_make_head_units(fused: ModelHandle):
    shapes = {shape.name: shape for shape in fused.shapes}
    for depth in (0, 1):
        own = [shape for shape in shapes.values() if shape.depth == depth and shape.kind in _QKV]
        assert {shape.kind for shape in own} == _QKV
        assert len({shape.input_group for shape in own}) == 1
    units = head_units(fused)
    assert [unit.depth for unit in units] == [0, 1]
    assert {unit.members[0].name for unit in units} == set(value_layers(fused.shapes))
    assert all(unit.head_dim == HIDDEN // HEADS and unit.heads == HEADS for unit in units)


def test_queries_are_told_from_keys(fused: ModelHandle, windows: WindowSet):
    """Queries of the first token change nothing: it has one token to attend to. Its keys do."""
    dense = logits(fused.module, windows.ids[:1])
    for kind, changes in (("q_proj", False), ("k_proj", True)):
        names = [shape.name for shape in fused.shapes if shape.kind == kind]
        hooks = [fused.module.get_submodule(name).register_forward_hook(_first_token_doubled) for name in names]
        try:
            assert close(logits(fused.module, windows.ids[:1]), dense) is not changes
        finally:
            for hook in hooks:
                hook.remove()


def _first_token_doubled(_: nn.Module, __: object, result: Tensor) -> Tensor:
    flat = result.clone().reshape(-1, result.shape[-1])
    flat[0] = 2 * flat[0] + 1
    return flat.reshape(result.shape)


def test_bolaco_keeps_the_values_dense(fused: ModelHandle, windows: WindowSet):
    preset = preset_named("bolaco")
    assert preset.compression.value_dense
    model = compressed(fused, windows, preset.compression, 0.2)
    ranks = model.report.ranks
    dense = {name for name, rank in ranks.items() if rank is None}
    assert set(value_layers(fused.shapes)) <= dense
    assert len(value_layers(fused.shapes)) == 2
    assert any(rank is not None for name, rank in ranks.items() if "q_proj" in name)


def test_values_of_any_name_are_values(tmp_path: Path, sample_text: str):
    torch.manual_seed(0)
    config = CONFIG_MAPPING["ctrl"](n_embd=32, n_layer=2, n_head=2, dff=48, n_positions=64, vocab_size=VOCABULARY)
    handle = load_model(str(save_checkpoint(tmp_path, AutoModelForCausalLM.from_config(config), sample_text)))
    assert value_layers(handle.shapes) == tuple(f"transformer.h.{depth}.multi_head_attention.Wv" for depth in (0, 1))


@pytest.mark.parametrize("name", MERGED)
def test_gate_and_up_are_told_apart(name: str, tmp_path: Path, sample_text: str, windows: WindowSet):
    handle = load_model(str(save_checkpoint(tmp_path, built(name, MERGED), sample_text)))
    layouts = [layout for layout in layouts_of(handle.module).values() if set(layout.names) == _GATE_UP]
    assert layouts == [Layout((("gate_proj", WIDE), ("up_proj", WIDE)))] * 2
    native = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert close(logits(handle.module, windows.ids[:1]), logits(native, windows.ids[:1]))
    model = compressed(handle, windows, CompressionConfig(basis="whitened"), 0.3)
    export(model, tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(logits(again, windows.ids[:1]), logits(model.handle.module, windows.ids[:1]))


class UpFirst(nn.Module):
    """Rows of up before those of gate, or in turns."""

    def __init__(self, mlp: nn.Module, *, turns: bool) -> None:
        super().__init__()
        self.first, self.last, self.turns = mlp.gate_up_proj, mlp.down_proj, turns

    def forward(self, hidden_states: Tensor) -> Tensor:
        both = self.first(hidden_states)
        up, gate = (both[..., 0::2], both[..., 1::2]) if self.turns else both.chunk(2, -1)
        return self.last((up.clamp(-7, 7) + 1) * nn.functional.silu(gate))


@pytest.mark.parametrize("turns", [False, True])
def test_no_name_and_no_order_is_taken_for_granted(*, turns: bool):
    module = built("phi3")
    for layer in module.model.layers:
        layer.mlp = UpFirst(layer.mlp, turns=turns)
    assert split_projections(module) == ()
    assert layouts_of(module)["model.layers.1.mlp.first"] == Layout((("up_proj", WIDE), ("gate_proj", WIDE)), WIDE if turns else 1)


# --- what stays fused ------------------------------------------------------------------------------------------------


class Shuffled(nn.Linear):
    """Its rows come in no order that anybody knows."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs)[..., torch.randperm(self.out_features, generator=torch.Generator().manual_seed(0))]


def test_a_layer_that_computes_something_else_stays_as_it_is():
    module = built("gpt_neox")
    for layer in module.gpt_neox.layers:
        layer.attention.query_key_value.__class__ = Shuffled
    before = logits(module, torch.arange(24)[None])
    (left,) = split_projections(module)
    assert str(left).endswith("query_key_value (and 1 more like it) is compressed as one matrix: its parts don't give what it gives.")
    assert torch.equal(logits(module, torch.arange(24)[None]), before)


def test_a_layout_that_is_not_recognised_stays_fused_with_the_reason(tmp_path: Path, sample_text: str, windows: WindowSet):
    config = CONFIG_MAPPING["mamba"](hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=VOCABULARY)
    handle = load_model(str(save_checkpoint(tmp_path, AutoModelForCausalLM.from_config(config), sample_text)))
    assert not layouts_of(handle.module)
    assert handle.left_fused == (
        "backbone.layers.0.mixer.in_proj (and 1 more like it) is compressed as one matrix: "
        "its rows are not recognised as queries, keys and values, nor as gate and up.",
    )
    native = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(handle.module, windows.ids[:1]), logits(native, windows.ids[:1]))


def test_a_model_that_looks_into_the_layer_gets_it_back():
    module = built("gpt_neox")
    for layer in module.gpt_neox.layers:
        layer.attention.query_key_value.register_forward_hook(lambda child, _, result: result * child.out_features / 192)
    attention = module.gpt_neox.layers[0].attention
    attention.register_forward_pre_hook(lambda child, _: child.query_key_value.out_features and None)
    (left,) = split_projections(module)
    assert "the model gives something else with its parts" in str(left)
    assert not layouts_of(module)
    assert isinstance(attention.query_key_value, nn.Linear)


def test_what_a_run_names_as_one_stays_one(gpt2: ModelHandle, windows: WindowSet, tmp_path: Path):
    run = Run(tmp_path)
    assert run.layers == frozenset()
    write_json(tmp_path / "model.json", {"layers": [{"name": "transformer.h.0.attn.c_attn"}]})
    handle = load_model(gpt2.reference, whole=run.layers)
    assert list(layouts_of(handle.module)) == ["transformer.h.1.attn.c_attn"]
    keys = {gradients_key(each, windows, CALIBRATION) for each in (gpt2, handle)}
    assert len(keys) == 2  # the moments are of other layers
    assert handle.left_fused == (
        "transformer.h.0.attn.c_attn is compressed as one matrix: a run or an allocation file of an earlier version names it as one.",
    )


# --- compression and export ------------------------------------------------------------------------------------------


def decomposed_by(handle: ModelHandle, windows: WindowSet, config: CompressionConfig) -> Decomposed:
    statistics = collect_statistics(handle, windows, CALIBRATION)
    return decompose(handle, statistics.with_outputs(collect_gradients(handle, windows, CALIBRATION)), config)


def compressed(handle: ModelHandle, windows: WindowSet, config: CompressionConfig, ratio: float) -> CompressedModel:
    decomposed = decomposed_by(handle, windows, config)
    plain = [unit for unit in decomposed.units if len(unit.members) == 1]
    rule = "uniform" if len(plain) == len(decomposed.units) else "lagrangian"
    return decomposed.compress(decomposed.allocate(rule, ratio), windows)


def test_full_rank_is_lossless(fused: ModelHandle, windows: WindowSet):
    decomposed = decomposed_by(fused, windows, CompressionConfig(basis="whitened"))
    ranks = {unit.name: unit.max_rank for unit in decomposed.units if len(unit.members) == 1}
    layers = low_rank_layers(fused, decomposed.bases, ranks, storage="factored")
    expected = logits(fused.module, windows.ids[:2])
    with swap_layers(fused, layers):
        assert (logits(fused.module, windows.ids[:2]) - expected).abs().max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("preset", ["studio", "bolaco"])
def test_an_export_is_read_again_by_transformers_and_by_us(fused: ModelHandle, windows: WindowSet, tmp_path: Path, preset: str):
    model = compressed(fused, windows, preset_named(preset).compression, 0.3)
    export(model, tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    ids = windows.ids[:1]
    assert torch.equal(logits(again, ids), logits(model.handle.module, ids))
    assert layouts_of(again)
    again.save_pretrained(tmp_path / "again")  # by transformers itself
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval(), ids), logits(again, ids))
    loaded = load_model(str(tmp_path / "small"))
    assert loaded.parameters == model.report.parameters_after
    assert layouts_of(loaded.module) == layouts_of(fused.module)
    assert close(logits(loaded.module, ids), logits(again, ids))


def test_a_part_is_guarded_by_the_fused_matrix(gpt2: ModelHandle, windows: WindowSet, tmp_path: Path):
    model = _with_ranks(gpt2, windows, {"transformer.h.0.attn.c_attn.q_proj": 4})
    manifest = export(model, tmp_path / "small")
    stored = tensors(tmp_path / "small")
    fused = "transformer.h.0.attn.c_attn"
    assert stored[f"{fused}.weight"].shape == (0,)
    assert f"{fused}.v_proj.weight" in stored
    assert f"{fused}.bias" not in stored
    assert stored["transformer.h.1.attn.c_attn.weight"].shape == (HIDDEN, 3 * HIDDEN)  # entirely dense: as the architecture has it
    assert manifest.guards == 1
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert list(config["fused"]) == [fused]


def _with_ranks(handle: ModelHandle, windows: WindowSet, ranks: Mapping[str, int | None]) -> CompressedModel:
    decomposed = decomposed_by(handle, windows, CompressionConfig(basis="whitened"))
    full: dict[str, int | None] = {unit.name: ranks.get(unit.name) for unit in decomposed.units}
    return decomposed.compress(decomposed.allocate("uniform", 0.01).__class__("manual", full, 0, 0), windows)


@pytest.mark.parametrize("basis", ["whitened", "pooled_feature"])
def test_the_dense_form_is_the_architecture_again(fused: ModelHandle, windows: WindowSet, tmp_path: Path, basis: str):
    model = compressed(fused, windows, CompressionConfig(basis=basis), 0.3)
    export(model, tmp_path / "merged", config=ExportConfig(form="dense", drop_biases=True))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not layouts_of(plain)
    assert set(tensors(tmp_path / "merged")) >= set(tensors(Path(fused.reference)))
    if basis == "whitened":  # without biases to drop
        assert (logits(plain, windows.ids[:1]) - logits(model.handle.module, windows.ids[:1])).abs().max() <= 1e-4


def test_an_export_of_an_earlier_version_keeps_its_fused_layers(gpt2: ModelHandle, windows: WindowSet, tmp_path: Path):
    """Its config.json names them, and knows of no divisions."""
    names = [f"transformer.h.{depth}.attn.c_attn" for depth in (0, 1)]
    old = load_model(gpt2.reference, whole=names)
    model = _with_ranks(old, windows, {names[0]: 8})
    export(model, tmp_path / "small")
    path = tmp_path / "small" / "config.json"
    config = json.loads(path.read_text())
    assert config["quantization_config"].pop("fused") == {}
    path.write_text(json.dumps(config))
    (tmp_path / "small" / "lowrank.json").unlink()
    loaded = load_model(str(tmp_path / "small"))
    assert list(layouts_of(loaded.module)) == names[1:]
    assert close(logits(loaded.module, windows.ids[:1]), logits(model.handle.module, windows.ids[:1]))
    sizes = loaded.linear_parameters_beside(gpt2)
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fused: fused.update({"transformer.h.9.attn.c_attn": next(iter(fused.values()))}), "which this architecture has not"),
        (lambda fused: fused.update({"transformer.h.0.ln_1": next(iter(fused.values()))}), "which is no linear layer of 192 outputs"),
        (lambda fused: next(iter(fused.values())).update(parts=[["q_proj", 64]]), "which is no linear layer of 64 outputs"),
        (lambda fused: next(iter(fused.values())).update(chunks=0), "doesn't say how the rows"),
    ],
)
def test_a_damaged_division_is_refused_in_a_line(
    gpt2: ModelHandle, windows: WindowSet, tmp_path: Path, change: Callable[[dict[str, object]], object], message: str
):
    export(_with_ranks(gpt2, windows, {"transformer.h.0.attn.c_attn.q_proj": 4}), tmp_path / "small")
    path = tmp_path / "small" / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"]["fused"])
    path.write_text(json.dumps(config))
    (tmp_path / "small" / "lowrank.json").unlink()
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path / "small"))


def test_speed_is_that_of_the_architectures_own_modules(gpt2: ModelHandle):
    """Three products in place of one would make the dense model slow, and the compressed one look fast."""
    called: list[type] = []
    hook = nn.modules.module.register_module_forward_hook(lambda child, _, __: called.append(type(child)))
    try:
        measure_speed(gpt2, SpeedConfig(prompt_tokens=4, new_tokens=2, rounds=1, warmup=1, batch_size=1))
    finally:
        hook.remove()
    assert called
    assert SplitProjection not in called
    assert layouts_of(gpt2.module)


def test_a_block_whose_attention_ignores_its_keys_follows_the_others():
    module = built("gpt2")
    with torch.no_grad():
        module.transformer.h[0].attn.c_attn.weight[:, HIDDEN : 2 * HIDDEN] = 0
        module.transformer.h[0].attn.c_attn.weight[:, :HIDDEN] = 0
        module.transformer.h[0].attn.c_attn.bias[:HIDDEN] = 0
    assert split_projections(module) == ()
    assert len(set(layouts_of(module).values())) == 1
    assert list(layouts_of(module)) == [f"transformer.h.{depth}.attn.c_attn" for depth in (0, 1)]


def test_half_precision_shows_the_same_parts(fused: ModelHandle):
    half = load_model(ModelSource(fused.reference, dtype="bfloat16"))
    assert layouts_of(half.module) == layouts_of(fused.module)
    assert half.left_fused == ()
