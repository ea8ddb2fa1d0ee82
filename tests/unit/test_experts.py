"""Experts of a mixture as linear layers: the same model, calibrated by what is routed to each, written and read again."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import built, load_family
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lowrank_core.cli import main
from lowrank_core.compression.build import low_rank_layers, swap_layers
from lowrank_core.compression.decomposed import Decomposed, decompose
from lowrank_core.config import CalibrationConfig, CompressionConfig, ExportConfig, ModelSource
from lowrank_core.errors import NumericalError
from lowrank_core.export import export
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.models.experts import calling_every_expert, experts_of, unroll_experts
from lowrank_core.models.unrolled import roll_back
from lowrank_core.presets.recipes import preset_named
from lowrank_core.statistics import gradients
from lowrank_core.statistics.calibration import LayerStatistics, collect_statistics
from lowrank_core.statistics.experts import mixed_inputs, mixed_outputs
from lowrank_core.statistics.gradients import collect_gradients
from lowrank_core.text import WindowSet

MIXTURES = ("mixtral", "gpt_oss", "llama4", "jetmoe")
"""Plain; with biases, transposed and interleaved; all tokens to all experts; rows sorted by expert."""

CALIBRATION = CalibrationConfig(group_size=2, gradient_windows=6)


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> ModelHandle:
    return load_family(tmp_path_factory.mktemp(request.param), sample_text, request.param)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> ModelHandle:
    return load_family(tmp_path_factory.mktemp("mixtral"), sample_text, "mixtral")


@pytest.fixture(scope="module")
def statistics(mixtral: ModelHandle, windows: WindowSet) -> LayerStatistics:
    inputs = collect_statistics(mixtral, windows, CALIBRATION)
    return inputs.with_outputs(collect_gradients(mixtral, windows, CALIBRATION))


def test_robust_weights_know_which_tokens_reach_an_expert(
    mixtral: ModelHandle, windows: WindowSet, statistics: LayerStatistics, monkeypatch: pytest.MonkeyPatch
):
    """Neither clipped nor cut at the ends, they change nothing; as they are, they leave a quarter of the tokens out."""
    robust = collect_gradients(mixtral, windows, CALIBRATION, robust=True)
    assert all(entry.count < statistics.outputs[name].count for name, entry in robust.items() if ".experts." in name)
    monkeypatch.setattr(gradients, "_CLIPPED", (0.0, float("inf")))
    monkeypatch.setattr(gradients, "_ENDS", windows.context + 1)
    for name, entry in collect_gradients(mixtral, windows, CALIBRATION, robust=True).items():
        expected = statistics.outputs[name].gradient
        torch.testing.assert_close(entry.gradient, expected, rtol=1e-5, atol=1e-6 * float(expected.diagonal().mean()))


@torch.no_grad()
def logits(module: nn.Module, ids: Tensor) -> Tensor:
    result: Tensor = module(input_ids=ids, use_cache=False).logits
    return result


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.std())


# --- the same model --------------------------------------------------------------------------------------------------


def test_unrolled_experts_are_the_same_model(mixture: ModelHandle, windows: WindowSet):
    native = AutoModelForCausalLM.from_pretrained(mixture.reference).eval()
    assert len(list(experts_of(mixture.module))) >= 2
    assert not [name for name, p in mixture.module.named_parameters() if p.ndim == 3]
    expected = logits(native, windows.ids[:2])
    assert close(logits(mixture.module, windows.ids[:2]), expected)
    with calling_every_expert(mixture.module):  # with no rows, which adds nothing
        assert close(logits(mixture.module, windows.ids[:1, :3]), logits(native, windows.ids[:1, :3]))


def test_rolling_gives_every_parameter_back(mixture: ModelHandle):
    native = AutoModelForCausalLM.from_pretrained(mixture.reference).eval()
    rolled = copy.deepcopy(mixture.module)
    roll_back(rolled)
    expected, result = native.state_dict(), rolled.state_dict()
    assert set(result) == set(expected)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_what_a_user_saves_of_a_dense_model_is_an_ordinary_folder(mixture: ModelHandle, windows: WindowSet, tmp_path: Path):
    mixture.module.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not list(experts_of(again))
    assert close(logits(again, windows.ids[:2]), logits(mixture.module, windows.ids[:2]))
    other = copy.deepcopy(mixture.module)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(mixture.module.state_dict())
    assert torch.equal(logits(other, windows.ids[:2]), logits(mixture.module, windows.ids[:2]))


def test_a_class_that_linear_layers_do_not_reproduce_is_left_alone(windows: WindowSet):
    module = built("mixtral")
    experts = module.model.layers[0].mlp.experts
    experts.__class__ = type(
        "Halved", (type(experts),), {"forward": lambda self, *given: 0.5 * type(experts).__mro__[1].forward(self, *given)}
    )
    before = logits(module, windows.ids[:1])
    unroll_experts(module)
    assert [name for name, _ in experts_of(module)] == ["model.layers.1.mlp.experts"]
    assert close(logits(module, windows.ids[:1]), before)


def test_first_layers_of_an_expert_share_an_input_and_k_of_e_are_active(mixtral: ModelHandle):
    shapes = {shape.name: shape for shape in mixtral.shapes}
    gate, up, down = (shapes[f"model.layers.1.mlp.experts.3.{layer}"] for layer in ("gate", "up", "down"))
    assert gate.input_group == up.input_group == gate.name
    assert down.input_group == down.name
    assert {gate.kind, up.kind, down.kind} == {"experts.gate", "experts.up", "experts.down"}
    assert (up.expert, up.mixture) == (3, "model.layers.1.mlp.experts.up")
    assert up.active == 0.5  # two of four
    assert up.flops_per_token == 0.5 * 2 * up.d_out * up.d_in
    assert shapes["model.layers.1.self_attn.q_proj"].mixture == ""


# --- moments ---------------------------------------------------------------------------------------------------------


def routed_rows(handle: ModelHandle, ids: Tensor, mixture: str, expert: int) -> tuple[Tensor, Tensor]:
    """Return rows and routing weights of one expert over all windows, from the router's own output."""
    rows, weights = [], []

    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        hidden, index, routing = arguments
        token, slot = torch.where(index == expert)
        rows.append(hidden[token].double())
        weights.append(routing[token, slot].double())

    handle_ = handle.module.get_submodule(mixture).register_forward_pre_hook(hook)
    try:
        logits(handle.module, ids)
    finally:
        handle_.remove()
    return torch.cat(rows), torch.cat(weights)


def test_moments_of_an_expert_are_of_its_own_tokens_weighed_by_squared_routing(
    mixtral: ModelHandle, windows: WindowSet, statistics: LayerStatistics
):
    path, d = "model.layers.0.mlp.experts", 32
    own = [routed_rows(mixtral, windows.ids, path, expert) for expert in range(4)]
    counts = [len(rows) for rows, _ in own]
    assert sum(counts) == 2 * windows.ids.numel()

    def moment(parts: list[tuple[Tensor, Tensor, float]]) -> Tensor:
        return sum((share * (rows * (w**2)[:, None]).T @ rows / (w**2).sum() for rows, w, share in parts), torch.zeros(d, d).double())

    total = sum(counts)
    for expert, (rows, weights) in enumerate(own):
        n = len(rows)
        everyone = moment([(r, w, len(r) / total) for r, w in own])
        expected = (n * moment([(rows, weights, 1.0)]) + d * everyone) / (n + d)
        result = statistics.inputs[f"{path}.{expert}.gate"]
        assert result.count == n == int(result.group_counts.sum())
        # covariances are normalised by N - 1
        assert torch.allclose(result.second_moment, expected, rtol=2 / n, atol=1e-3 * float(expected.diagonal().max()))


def test_gradients_of_an_expert_count_per_token_of_the_text(mixtral: ModelHandle, statistics: LayerStatistics, windows: WindowSet):
    """An expert that sees half of the tokens weighs half as much: the traces of all experts are those of one dense layer."""
    names = [f"model.layers.0.mlp.experts.{expert}.down" for expert in range(4)]
    outputs = [statistics.outputs[name] for name in names]
    assert sum(entry.count for entry in outputs) == 2 * windows.first(6).ids.numel()
    shares = torch.tensor([float(entry.gradient.trace()) for entry in outputs])
    counts = torch.tensor([float(entry.count) for entry in outputs])
    assert torch.corrcoef(torch.stack([shares, counts]))[0, 1] > 0.5 or counts.std() < 0.05 * counts.mean()
    assert all(torch.equal(entry.gradient, entry.gradient.T) for entry in outputs)


def test_an_expert_without_tokens_has_the_moments_of_its_mixture(statistics: LayerStatistics):
    names = [f"model.layers.0.mlp.experts.{expert}.gate" for expert in range(4)]
    inputs = {name: statistics.inputs[name] for name in names}
    empty = replace(inputs[names[0]], count=0, mean=torch.zeros(32).double(), sample=torch.zeros(32, 32).double())
    result = mixed_inputs({**inputs, names[0]: empty})
    seen = mixed_inputs({name: inputs[name] for name in names[1:]})
    assert result[names[0]].count == 0
    weights = [inputs[name].count for name in names[1:]]
    mean = sum((w * inputs[name].mean for w, name in zip(weights, names[1:], strict=True)), torch.zeros(32).double()) / sum(weights)
    assert torch.allclose(result[names[0]].mean, mean)
    assert all(torch.allclose(result[name].second_moment, seen[name].second_moment) for name in names[1:])
    with pytest.raises(NumericalError, match="no token reached any expert"):
        mixed_inputs({name: replace(entry, count=0) for name, entry in inputs.items()})


def test_mixed_gradients_keep_the_sum_over_the_mixture(statistics: LayerStatistics):
    """Mixing moves weight between experts, and makes none where all have enough tokens."""
    entries = {f"e{index}": replace(entry, count=10_000_000) for index, entry in enumerate(list(statistics.outputs.values())[:1] * 3)}
    mixed = mixed_outputs(entries, tokens=15_000_000)
    for name, entry in entries.items():
        assert torch.allclose(mixed[name].gradient, entry.gradient, rtol=1e-4)


# --- compression -----------------------------------------------------------------------------------------------------


def decomposed_by(handle: ModelHandle, windows: WindowSet, config: CompressionConfig) -> Decomposed:
    statistics = collect_statistics(handle, windows, CALIBRATION)
    return decompose(handle, statistics.with_outputs(collect_gradients(handle, windows, CALIBRATION)), config)


def test_full_rank_is_lossless(mixture: ModelHandle, windows: WindowSet):
    decomposed = decomposed_by(mixture, windows, CompressionConfig(basis="whitened"))
    ranks = {unit.name: unit.max_rank for unit in decomposed.units if len(unit.members) == 1}
    layers = low_rank_layers(mixture, decomposed.bases, ranks, storage="factored")
    expected = logits(mixture.module, windows.ids[:2])
    with swap_layers(mixture, layers):
        assert close(logits(mixture.module, windows.ids[:2]), expected)


def test_our_recipe_is_written_read_and_generates_the_same_with_a_cache(mixture: ModelHandle, windows: WindowSet, tmp_path: Path):
    preset = preset_named("studio")
    decomposed = decomposed_by(mixture, windows, preset.compression)
    smaller = decomposed.compress(decomposed.allocate(preset.allocation, 0.3), windows)
    assert smaller.report.compression_ratio >= 0.3
    compressed = [name for name in smaller.report.ranks if ".experts." in name or "_linear" in name]
    assert any(smaller.report.ranks[name] is not None for name in compressed)
    export(smaller, tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    ids = windows.ids[:1]
    assert torch.equal(logits(again, ids), logits(smaller.handle.module, ids))
    outputs = [again.generate(ids[:, :8], max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*outputs)
    loaded = load_model(ModelSource(str(tmp_path / "small")))
    assert loaded.parameters == smaller.report.parameters_after
    again.save_pretrained(tmp_path / "again")  # by transformers itself
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(twice, ids), logits(again, ids))


def test_each_compressed_matrix_of_an_expert_is_guarded_by_the_parameter_that_it_replaces(
    mixtral: ModelHandle, statistics: LayerStatistics, windows: WindowSet, tmp_path: Path
):
    decomposed = decompose(mixtral, statistics, CompressionConfig(basis="whitened"))
    export(decomposed.compress(decomposed.allocate("uniform", 0.4), windows), tmp_path / "small")
    with safe_open(next((tmp_path / "small").glob("*.safetensors")), framework="pt") as file:
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  (the archive is no mapping)
    assert stored["model.layers.0.mlp.experts.gate_up_proj"] == [0]
    assert stored["model.layers.0.mlp.experts.down_proj"] == [0]


def test_a_mixture_that_stays_dense_is_written_as_the_architecture_has_it(
    mixtral: ModelHandle, statistics: LayerStatistics, windows: WindowSet, tmp_path: Path
):
    decomposed = decompose(mixtral, statistics, CompressionConfig(basis="whitened"))
    ranks = {unit.name: 4 if "self_attn" in unit.name else None for unit in decomposed.units}
    allocation = replace(decomposed.allocate("uniform", 0.1), ranks=ranks)
    export(decomposed.compress(allocation, windows), tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert not list(experts_of(again))


def test_merged_experts_are_a_plain_checkpoint(mixture: ModelHandle, windows: WindowSet, tmp_path: Path):
    decomposed = decomposed_by(mixture, windows, CompressionConfig(basis="whitened"))
    smaller = decomposed.compress(decomposed.allocate("uniform", 0.3), windows)
    export(smaller, tmp_path / "merged", config=ExportConfig(form="dense"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not list(experts_of(plain))
    assert close(logits(plain, windows.ids[:1]), logits(smaller.handle.module, windows.ids[:1]))


def test_analyze_has_a_line_for_each_matrix_of_a_mixture(mixtral: ModelHandle, text_file: Path, capsys: pytest.CaptureFixture[str]):
    words = ["analyze", "--model", mixtral.reference, "--text", f"file:{text_file}", "--context", "16", "--windows", "16"]
    assert main(words) == 0
    mixtures = {shape.mixture for shape in mixtral.shapes if shape.mixture}
    experts = sum(bool(shape.mixture) for shape in mixtral.shapes)
    lines = [line for line in capsys.readouterr().out.splitlines() if ".experts." in line]
    assert len(lines) == len(mixtures) < experts
    assert all(" experts) " in line and " to " in line for line in lines)
    assert main([*words, "--experts"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ".experts." in line]
    assert len(lines) == experts
    assert main([*words, "--json"]) == 0
    assert sum(".experts." in layer["name"] for layer in json.loads(capsys.readouterr().out)["layers"]) == experts
