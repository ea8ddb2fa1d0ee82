"""LEMS: its statistics, weights and integer program against the formulas; and a preset like any other."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_core.allocation import ALLOCATORS, DepthBias, allocate, allocation_from_ranks
from lowrank_core.allocation.lems import TRIALS, exact_choices
from lowrank_core.cli import main
from lowrank_core.compression.decomposed import Decomposed, decompose
from lowrank_core.compression.error_weights import measure_error_weights
from lowrank_core.compression.lems import cached_scales, measure_depth_bias
from lowrank_core.compression.pipeline import Pipeline
from lowrank_core.config import CalibrationConfig, TextConfig
from lowrank_core.errors import BudgetError, Cancelled, ConfigError, NumericalError, RunError
from lowrank_core.evaluation import DenseReference, score_windows
from lowrank_core.models import ModelHandle
from lowrank_core.models.handle import weight_of
from lowrank_core.parameters import MatrixShape, Unit, budget_for_ratio
from lowrank_core.presets.recipes import PRESETS
from lowrank_core.runs import open_run
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.statistics.gradients import collect_gradients
from lowrank_core.studies.depth_trials import ALPHA, GAMMA, best_depth_bias
from lowrank_core.studies.records import read_trials
from lowrank_core.text import WindowSet

RATIO = 0.4
LEMS = PRESETS["lems"]
CALIBRATION = CalibrationConfig(group_size=8, gradient_windows=8)


# --- the integer program ---------------------------------------------------------------------------------------------

Tables = tuple[list[np.ndarray], list[np.ndarray]]


@st.composite
def programs(draw: st.DrawFn) -> Tables:
    """Choices of a few units: rising costs, falling errors, the last without one; neither convex nor of one size."""
    costs, errors = [], []
    for _ in range(draw(st.integers(1, 4))):
        sizes = draw(st.lists(st.integers(1, 60), min_size=2, max_size=6, unique=True))
        drops = draw(st.lists(st.floats(0.0, 1.0), min_size=len(sizes) - 1, max_size=len(sizes) - 1))
        scale = 10.0 ** draw(st.integers(-6, 6))
        costs.append(np.array(sorted(sizes), dtype=np.int64))
        errors.append(scale * np.append(np.sort(drops)[::-1], 0.0))
    return costs, errors


def error_of(errors: Sequence[np.ndarray], choices: Sequence[int]) -> float:
    return sum(float(error[choice]) for error, choice in zip(errors, choices, strict=True))


@settings(max_examples=300, deadline=None)
@given(programs(), st.floats(0.0, 1.0))
def test_no_choice_within_the_budget_has_a_smaller_error(program: Tables, share: float):
    costs, errors = program
    low, high = (sum(int(bound(cost)) for cost in costs) for bound in (np.min, np.max))
    budget = round(low + share * (high - low))
    every = [c for c in itertools.product(*map(range, map(len, costs))) if sum(k[j] for k, j in zip(costs, c, strict=True)) <= budget]
    result = exact_choices(costs, errors, budget)
    assert tuple(result) in every
    assert error_of(errors, result) <= min(error_of(errors, choices) for choices in every) * (1 + 1e-9)


def test_a_large_program_is_solved_as_by_a_solver_for_integer_programs():
    generator = np.random.default_rng(3)
    shapes = [(96, 96), (32, 96), (256, 96), (96, 256)] * 6
    costs, errors = [], []
    for rows, columns in shapes:
        ranks = range(1, (rows * columns - 1) // (rows + columns) + 1)
        tails = np.sort(generator.exponential(size=len(ranks)))[::-1].cumsum()[::-1]
        costs.append(np.array([*(rank * (rows + columns) for rank in ranks), rows * columns], dtype=np.int64))
        errors.append(np.append(tails * generator.uniform(0.1, 10), 0.0))
    budget = int(0.6 * sum(rows * columns for rows, columns in shapes))
    which = np.concatenate([np.full(len(cost), unit) for unit, cost in enumerate(costs)])
    one_each = scipy.optimize.LinearConstraint((which[None] == np.arange(len(costs))[:, None]).astype(float), 1, 1)
    within = scipy.optimize.LinearConstraint(np.concatenate(costs)[None].astype(float), 0, budget)
    solved = scipy.optimize.milp(
        np.concatenate(errors), constraints=[one_each, within], integrality=1, bounds=(0, 1), options={"mip_rel_gap": 0.0}
    )
    result = exact_choices(costs, errors, budget)
    assert sum(int(cost[choice]) for cost, choice in zip(costs, result, strict=True)) <= budget
    assert error_of(errors, result) == pytest.approx(solved.fun, rel=1e-6)


def units(blocks: int = 3) -> list[Unit]:
    return [Unit((MatrixShape(f"{b}.{kind}", kind, b, 48, 40),)) for b in range(blocks) for kind in ("q_proj", "k_proj")]


def test_ranks_are_multiples_or_below_one_and_the_lagrangian_is_never_better():
    every = units()
    curves = {
        u.name: np.append(np.sort(np.random.default_rng(i).exponential(size=40))[::-1].cumsum()[::-1], 0.0) for i, u in enumerate(every)
    }
    weights = {unit.name: 1.0 + index for index, unit in enumerate(every)}

    def error(ranks: dict[str, int | None]) -> float:
        return sum(0.0 if rank is None else weights[name] * float(curves[name][rank]) for name, rank in ranks.items())

    fine = allocate("lems", every, RATIO, curves=curves, weights=weights)
    eights = allocate("lems", every, RATIO, curves=curves, weights=weights, rank_multiple=8)
    rough = allocate("lagrangian", every, RATIO, curves=curves, weights=weights)
    assert error(dict(fine.ranks)) <= min(error(dict(eights.ranks)), error(dict(rough.ranks)))
    assert all(rank is None or rank % 8 == 0 or rank < 8 for rank in eights.ranks.values())
    assert max(fine.parameters, eights.parameters) <= budget_for_ratio(every, RATIO)


def test_it_is_refused_without_weights_and_where_the_budget_cannot_be_met():
    every, curves = units(), {unit.name: np.linspace(1, 0, 41) for unit in units()}
    with pytest.raises(ConfigError, match=r"that of 0\.q_proj was not measured. Use `lowrank compress --allocation lems`"):
        allocate("lems", every, RATIO, curves=curves)
    with pytest.raises(BudgetError, match="can't be met"):
        allocate("lems", every, 0.999, curves=curves, weights={unit.name: 1.0 for unit in every})
    locked = allocate("lems", every, RATIO, curves=curves, weights={unit.name: 1.0 for unit in every}, fixed={"0.q_proj": 3})
    assert (locked.ranks["0.q_proj"], locked.locked) == (3, ("0.q_proj",))


# --- the depth bias --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_the_depth_bias_falls_from_the_first_block_to_the_last(alpha: float):
    sums = [sum((k + 1) ** -alpha for k in range(b, 5)) for b in range(5)]
    expected = [1 + 7 * (value - sums[-1]) / (sums[0] - sums[-1]) for value in sums]
    assert [DepthBias(alpha, 7.0).factor(block, 5) for block in range(5)] == pytest.approx(expected)
    assert (expected[0], expected[-1]) == (8.0, 1.0)
    assert DepthBias(alpha, 7.0).factor(0, 1) == 1.0
    assert DepthBias(alpha, 0.0).weights(units(), {"0.q_proj": 2.0}) == {"0.q_proj": 2.0}


def test_ten_trials_begin_without_a_bias_and_the_best_is_kept():
    seen: list[DepthBias] = []

    def loss(bias: DepthBias) -> float:
        seen.append(bias)
        return float("inf") if len(seen) == 3 else (bias.alpha - 1) ** 2 + (bias.gamma - 2) ** 2

    bias, least = best_depth_bias(loss, seed=1)
    assert (len(seen), seen[0]) == (TRIALS, DepthBias(0.0, 0.0))
    assert least == min((b.alpha - 1) ** 2 + (b.gamma - 2) ** 2 for n, b in enumerate(seen) if n != 2)
    assert bias in seen
    assert all(0 <= b.alpha <= 3 and 0 <= b.gamma <= 7 for b in seen)
    again: list[DepthBias] = []
    assert best_depth_bias(lambda b: again.append(b) or (b.alpha - 1) ** 2 + (b.gamma - 2) ** 2, seed=1)[0] in again  # type: ignore[func-returns-value]
    assert again[:4] == seen[:4]


# --- the preset ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(windows: WindowSet) -> WindowSet:
    return windows.first(6)


@pytest.fixture(scope="module")
def decomposed(llama: ModelHandle, windows: WindowSet) -> Decomposed:
    gradients = collect_gradients(llama, windows, CALIBRATION, robust=True)
    return decompose(llama, collect_statistics(llama, windows, CALIBRATION).with_outputs(gradients), LEMS.compression)


@pytest.fixture(scope="module")
def dense(llama: ModelHandle, few: WindowSet) -> DenseReference:
    return DenseReference.compute(llama, few, batch_size=8)


@pytest.fixture(scope="module")
def scales(decomposed: Decomposed, few: WindowSet, dense: DenseReference) -> dict[str, float]:
    return measure_error_weights(decomposed, few, dense, compression_ratio=0.0, deep=True)


def test_its_factors_are_those_of_the_formulas(decomposed: Decomposed):
    """On the statistics of one calibration, in numpy: shrunk moments, the whitened SVD, and the energies that ranks keep."""
    for layer in decomposed.handle.layers[:7]:
        weight = weight_of(decomposed.handle.module.get_submodule(layer.name)).detach().double().numpy()
        moments = decomposed.statistics.inputs[layer.input_group].second_moment, decomposed.statistics.outputs[layer.name].gradient
        inputs, outputs = (
            (1 - a) * m.numpy() + a * np.diag(m.numpy()).mean() * np.eye(len(m)) for m, a in zip(moments, (0.1, 0.3), strict=True)
        )
        left, right = np.linalg.cholesky(outputs), np.linalg.cholesky(inputs)
        u, sigma, v = np.linalg.svd(left.T @ weight @ right, full_matrices=False)
        basis = decomposed.bases[layer.name]
        tails = np.append(np.cumsum((sigma**2)[::-1])[::-1], 0.0)
        kept = 1 - basis.errors.numpy() / basis.errors.numpy()[0]
        np.testing.assert_allclose(kept, 1 - tails / tails[0], rtol=0, atol=2e-6)  # a damping of 1e-6 is between them
        expected = np.linalg.solve(left.T, (u[:, :5] * sigma[:5]) @ v[:5]) @ np.linalg.inv(right)
        factors = basis.slice(5)
        np.testing.assert_allclose((factors.ups[0] @ factors.down).numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        assert factors.biases == (None,)


def test_its_weights_are_those_of_the_formula(decomposed: Decomposed, few: WindowSet, dense: DenseReference, scales: dict[str, float]):
    """w e(r) = κ [1 - E(r)/E] / [1 - E(r0)/E] (1 + γ h), κ measured with the matrix alone at a tenth of its break-even rank."""
    bias = DepthBias(1.5, 2.0)
    weights = bias.weights(decomposed.units, scales)
    for unit in (decomposed.units[1], decomposed.units[-1]):
        errors, cut = decomposed.bases[unit.name].errors.numpy(), max(1, round(0.1 * unit.break_even_rank))
        with decomposed.swapped({unit.name: cut}):
            scores, _ = score_windows(decomposed.handle, few, batch_size=8, dense=dense)
        assert scores.kl is not None
        kappa, energies = float(scores.kl.mean()), errors[0] - errors
        h = [1.0, 0.0][unit.depth]
        for rank in (1, 3, unit.break_even_rank):
            expected = kappa * (1 - energies[rank] / errors[0]) / (1 - energies[cut] / errors[0]) * (1 + bias.gamma * h)
            assert weights[unit.name] * errors[rank] == pytest.approx(expected, rel=1e-6)


def test_the_bias_of_the_smallest_measured_kl_is_taken(
    decomposed: Decomposed, few: WindowSet, dense: DenseReference, scales: dict[str, float]
):
    steps: list[tuple[int, int]] = []
    result = measure_depth_bias(decomposed, few, dense, scales, compression_ratio=RATIO, progress=lambda *step: steps.append(step))
    assert steps == [(done, TRIALS) for done in range(1, TRIALS + 1)]

    def kl(weights: dict[str, float]) -> float:
        with decomposed.swapped(decomposed.allocate("lems", RATIO, weights=weights).ranks):
            scores, _ = score_windows(decomposed.handle, few, batch_size=8, dense=dense)
        assert scores.kl is not None
        return float(scores.kl.mean())

    assert kl(dict(result.weights)) == pytest.approx(result.kl, rel=1e-9)
    assert result.kl <= kl(scales) * (1 + 1e-9), "the first trial has no bias"
    assert result.weights == result.bias.weights(decomposed.units, scales)


def test_a_model_that_always_diverges_is_said(
    decomposed: Decomposed, few: WindowSet, dense: DenseReference, scales: dict[str, float], monkeypatch: pytest.MonkeyPatch
):
    def diverged(*_: object, **__: object) -> None:
        raise NumericalError("diverged")

    monkeypatch.setattr("lowrank_core.compression.lems.score_windows", diverged)
    with pytest.raises(NumericalError, match="diverged at every depth bias"):
        measure_depth_bias(decomposed, few, dense, scales, compression_ratio=RATIO)


@pytest.fixture
def text(text_file: Path) -> TextConfig:
    return TextConfig(f"file:{text_file}", context=32, calibration_windows=8, validation_windows=4, test_windows=4)


def test_a_pipeline_measures_the_scales_once_for_all_ratios(llama_checkpoint: Path, text: TextConfig):
    stages: list[str] = []

    class Told:
        def __init__(self, name: str, total: int) -> None:
            stages.append(name)

        def __enter__(self) -> object:
            return lambda *_: None

        def __exit__(self, *_: object) -> None:
            return None

    pipeline = Pipeline(str(llama_checkpoint), text, calibration=CALIBRATION, compression="lems", progress=Told)  # type: ignore[arg-type]
    assert pipeline.depth_bias is None
    for ratio in (0.3, 0.5):
        model = pipeline.compress(ratio)
        assert model.report.compression_ratio >= ratio
        assert pipeline.depth_bias is not None
    assert (stages.count("Measuring error weights"), stages.count("Searching the depth bias")) == (1, 2)
    assert pipeline.under("svd_llm").decomposed.basis.name == "whitened"
    with pytest.raises(ConfigError, match="lems measures its own error weights"):
        pipeline.allocate("lems", 0.3, weights={})
    pipeline.allocate("uniform", 0.3)
    assert pipeline.depth_bias is None
    stages.clear()
    again = Pipeline(str(llama_checkpoint), text, calibration=CALIBRATION, compression="lems", progress=Told)  # type: ignore[arg-type]
    assert again.allocate("lems", 0.5).ranks == pipeline.allocate("lems", 0.5).ranks
    assert "Measuring error weights" not in stages, "they were kept on disk"
    plain = pipeline.under("io_svd")
    names = plain.statistics.outputs
    assert any(not torch.equal(names[name].gradient, pipeline.statistics.outputs[name].gradient) for name in names)


def test_scales_are_kept_one_by_one_and_go_on_where_they_were(decomposed: Decomposed, few: WindowSet, windows: WindowSet, tmp_path: Path):
    names = [unit.name for unit in decomposed.units]
    asked: list[set[str]] = []

    def measure(known: Mapping[str, float], keep: Callable[[str, float], None]) -> dict[str, float]:
        asked.append(set(known))
        for number, name in enumerate(names):
            if len(known) == 0 and number == 3:
                raise Cancelled
            if name not in known:
                keep(name, 1.0 + number)
        return {name: 1.0 + number for number, name in enumerate(names)}

    with pytest.raises(Cancelled):
        cached_scales(decomposed, windows, few, tmp_path, measure)
    (path,) = tmp_path.glob("*/scales.jsonl")
    path.write_bytes(path.read_bytes() + b'{"unit": "model.la')
    expected = {name: 1.0 + number for number, name in enumerate(names)}
    assert cached_scales(decomposed, windows, few, tmp_path, measure) == expected
    assert cached_scales(decomposed, windows, few, tmp_path, measure) == expected
    assert asked == [set(), set(names[:3])]
    pivoted = replace(decomposed, config=replace(decomposed.config, storage="pivoted"))
    cached_scales(pivoted, windows, few.first(2), tmp_path, lambda known, keep: expected)
    assert len(list(tmp_path.iterdir())) == 2, "other break-even ranks, other windows"
    path.write_bytes(b'{"unit": "a", "scale": -1}\n')
    with pytest.raises(RunError, match=r"scales\.jsonl is damaged: a scale is not positive\. Delete the file"):
        cached_scales(decomposed, windows, few, tmp_path, measure)


def test_the_command_line_has_the_preset(llama_checkpoint: Path, text: TextConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cut = ["--context", "32", "--windows", "8", "--validation-windows", "4", "--test-windows", "4", "--group-size", "4", "--json"]
    common = ["compress", "--model", str(llama_checkpoint), "--text", text.reference, *cut, "--compression-ratio", "0.4"]
    assert main([*common, "--preset", "lems", "--out", str(tmp_path / "lems")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["preset"], result["allocation"]) == ("lems", "lems")
    assert set(result["depth_bias"]) == {"alpha", "gamma"}
    assert main([*common, "--preset", "lems", "--tune", "--out", str(tmp_path / "tuned")]) == 2
    assert "--tune would measure the weights of lems at every setting" in capsys.readouterr().err


def test_allocations_of_the_preset_keep_to_what_a_run_can_read(decomposed: Decomposed, scales: dict[str, float]):
    allocation = decomposed.allocate("lems", RATIO, weights=scales)
    again = allocation_from_ranks("manual", decomposed.units, json.loads(allocation.to_json())["ranks"])
    assert again.parameters == allocation.parameters
    assert ALLOCATORS["lems"].measures
    assert not ALLOCATORS["lagrangian"].measures
    whole = replace(decomposed, config=replace(decomposed.config, rank_multiple=1)).allocate("lems", RATIO, weights=scales)
    assert whole.parameters >= allocation.parameters - max(unit.parameters(8) for unit in decomposed.units)


def test_a_search_of_the_depth_bias_begins_with_the_rule_itself(
    llama_checkpoint: Path, text: TextConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cut = ["--context", "32", "--windows", "8", "--validation-windows", "4", "--test-windows", "4", "--group-size", "4", "--json"]
    common = ["search", "--model", str(llama_checkpoint), "--text", text.reference, *cut, "--compression-ratio", "0.4", "--confirmed", "0"]
    space = ["--space", "depth", "--error-weights", "--deep-weights", "--trials", "5", "--sampler", "tpe"]
    assert main([*common, *space, "--run", str(tmp_path / "run")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["baselines"]) == {"uniform", "lord_manual", "lagrangian"}
    assert result["value"] <= result["baselines"]["lagrangian"]["value"]
    trials = read_trials(open_run(tmp_path / "run"))
    rule = next(trial for trial in trials if trial.label == "lagrangian")
    sampled = [trial for trial in trials if trial.label == "sampled"]
    assert (dict(rule.params), len(sampled)) == ({ALPHA: 0.0, GAMMA: 0.0}, 2)
    assert all(set(trial.params) == {ALPHA, GAMMA} for trial in sampled)
    assert main([*common, "--space", "depth", "--variables", "keep_ratio", "--basis", "whitened", "--run", str(tmp_path / "no")]) == 2
    assert "choose variables `error_weight`" in capsys.readouterr().err
