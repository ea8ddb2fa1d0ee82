"""The search as Bolaco's published code runs it, held against independent lines that say what that code does."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, create_trial
from scipy.optimize import check_grad

from lowrank_core.allocation.units import value_layers
from lowrank_core.compression.build import low_rank_layers, swap_layers
from lowrank_core.config import CalibrationConfig, ModelSource, RunConfig, SearchConfig, TextConfig
from lowrank_core.errors import BudgetError, ConfigError, RunError
from lowrank_core.evaluation import WindowScores
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.parameters import MatrixShape, Unit
from lowrank_core.presets.recipes import PRESETS, search_by
from lowrank_core.runs import Run, create_run
from lowrank_core.search.improvement import GaussianProcess, _loss, next_point
from lowrank_core.search.objective import objective_value
from lowrank_core.search.samplers import PointSampler, phase
from lowrank_core.search.selection import Selection, most_varied
from lowrank_core.studies.published import MARGIN, PublishedScheme, published_rank
from lowrank_core.studies.records import TrialRecord, read_trials
from lowrank_core.studies.space import SearchSpace
from lowrank_core.studio.overview.text_facts import trial_windows
from lowrank_core.studio.shared import protocol
from lowrank_core.text import load_windows
from lowrank_core.worker.main import run_worker

SEVEN_BILLION = {f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"} | {
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
"""Of LLaMA-7B: type -> (d_out, d_in)."""


def units_of(sizes: dict[str, tuple[int, int]], blocks: int = 2, storage: str = "factored") -> tuple[Unit, ...]:
    shapes = [MatrixShape(f"layers.{d}.{name}", name.split(".")[-1], d, *size) for d in range(blocks) for name, size in sizes.items()]
    return tuple(Unit((shape,), storage, True) for shape in shapes)


LLAMA = units_of(SEVEN_BILLION)
VALUES = value_layers([unit.members[0] for unit in LLAMA])


def scheme_of(ratio: float, units: tuple[Unit, ...] = LLAMA, **changes: object) -> PublishedScheme:
    dense = value_layers([unit.members[0] for unit in units])
    result = SearchSpace(units, ratio, dense, projected=False, **changes).scheme  # type: ignore[arg-type]
    assert result is not None
    return result


def published_condition(point: np.ndarray, remain: float) -> bool:
    """What the published code asks of (qk, o, gate, up, down) on LLaMA-7B."""
    qk, o, gate, up, down = point
    s = 2.6875 * (gate + up + down) + qk * 2 + 1 + o
    return (remain - 0.1) * 12.0625 <= round(s, 4) <= remain * 12.0625


@pytest.fixture
def config(llama_checkpoint: Path, text_file: Path) -> RunConfig:
    return RunConfig(
        model=ModelSource(str(llama_checkpoint)),
        text=TextConfig(f"file:{text_file}", context=32, calibration_windows=40, validation_windows=4, test_windows=6),
        calibration=CalibrationConfig(group_size=8),
        search=replace(search_by(PRESETS["bolaco"], 0.3), trials=6, selected_windows=3, confirmed=0),
    )


def _search(config: RunConfig, **changes: object) -> RunConfig:
    assert config.search is not None
    return replace(config, search=replace(config.search, **changes))  # type: ignore[arg-type]


# --- (a) the objective -----------------------------------------------------------------------------------------------


def published_objective(compressed: ModelHandle, dense: ModelHandle, ids: torch.Tensor) -> tuple[float, float]:
    """Perplexity, and a thousandth of KL(compressed || dense), summed over the tokens of a window and averaged over windows."""
    with torch.no_grad():
        p, q = (np.asarray(torch.log_softmax(handle.module(ids).logits.double(), -1)) for handle in (compressed, dense))
    windows, context = ids.shape
    losses = [-p[w, t, int(ids[w, t + 1])] for w in range(windows) for t in range(context - 1)]
    sums = [sum((np.exp(p[w, t]) * (p[w, t] - q[w, t])).sum() for t in range(context - 1)) for w in range(windows)]
    last = context / (context - 1)  # the last token's is not known: as much as the mean of the others
    return math.exp(sum(losses) / len(losses)), 1e-3 * last * sum(sums) / windows


@pytest.mark.parametrize("windows", [2, 7])
@pytest.mark.parametrize("projected", [True, False])
def test_a_trial_s_value_is_the_published_sum_however_many_windows_there_are(config: RunConfig, windows: int, projected: bool):
    config = replace(config, text=replace(config.text, validation_windows=windows))
    run = create_run(_search(config, trials=1, projected=projected, selected_windows=0))
    _, bench = run_worker(run, verbose=False)
    trial = read_trials(run)[0]
    assert bench is not None
    dense = load_model(config.model)
    with swap_layers(bench.handle, low_rank_layers(bench.handle, bench.decomposed.bases, trial.ranks, storage="factored")):
        perplexity, weighted = published_objective(bench.handle, dense, bench.windows.ids)
    assert bench.windows.windows == windows
    assert trial.value is not None
    assert trial.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert trial.value - perplexity_of(trial) == pytest.approx(weighted, rel=1e-2)


def perplexity_of(trial: TrialRecord) -> float:
    assert trial.perplexity is not None
    return trial.perplexity


def test_the_objective_s_weight_does_not_grow_with_the_number_of_windows():
    few = WindowScores(torch.tensor([1.0, 3.0]), reverse_kl=torch.tensor([0.2, 0.6]))
    many = WindowScores(torch.tensor([1.0, 3.0] * 50), reverse_kl=torch.tensor([0.2, 0.6] * 50))
    assert objective_value("bolaco", few, 256) == pytest.approx(math.exp(2) + 1e-3 * 256 * 0.4)
    assert objective_value("bolaco", many, 256) == pytest.approx(objective_value("bolaco", few, 256))


# --- (c) the condition -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.2, 0.3])
def test_the_condition_is_the_published_one(ratio: float):
    scheme = scheme_of(ratio)
    assert scheme.groups == ("qk", "o", "gate", "up", "down")
    assert scheme.total == 12.0625
    points = np.random.default_rng(0).uniform(0.2, 1.001, (4000, 5))
    expected = [published_condition(point, 1 - ratio) for point in points]
    assert scheme.meets(points).tolist() == expected
    assert 0.02 < np.mean(expected) < 0.9


def test_the_condition_is_asked_to_four_digits():
    """9.65 may be kept of 12.0625: 9.65004 rounds to it, 9.65006 does not."""
    scheme = scheme_of(0.2)
    inside, outside = (np.array([(s - 1 - 0.5 - 2.6875 * 2.4) / 2, 0.5, 0.8, 0.8, 0.8]) for s in (9.65004, 9.65006))
    assert [bool(scheme.meets(point)) for point in (inside, outside)] == [True, False]
    assert [published_condition(point, 0.8) for point in (inside, outside)] == [True, False]


def test_the_condition_looks_at_fractions_and_not_at_ranks():
    """Ranks in eights of a tiny model remove far more than a tenth too much; the point counts."""
    tiny = units_of({name: (64, 64) if "attn" in name else (160, 64) if "down" not in name else (64, 160) for name in SEVEN_BILLION})
    space = SearchSpace(tiny, 0.2, value_layers([u.members[0] for u in tiny]), projected=False, rank_multiple=8)
    assert space.scheme is not None
    point = space.scheme.first
    assert space.scheme.meets(point)
    assert space.allocation(space.scheme.point(point)).compression_ratio > 0.2 + MARGIN


# --- (b) only points that meet the budget are drawn --------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
def test_draws_meet_the_budget_and_are_uniform_among_those_that_do(ratio: float):
    scheme = scheme_of(ratio)
    drawn = scheme.draw(np.random.default_rng(0), 3000)
    assert drawn.shape == (3000, 5)
    assert all(published_condition(point, 1 - ratio) for point in drawn)
    kept = np.random.default_rng(1).uniform(0.2, 1.001, (400_000, 5))
    kept = kept[[published_condition(point, 1 - ratio) for point in kept[:60_000]] + [False] * 340_000]
    assert drawn.mean(axis=0) == pytest.approx(kept.mean(axis=0), abs=0.03)


def test_a_ratio_that_no_point_meets_is_told():
    with pytest.raises(BudgetError, match=r"compression ratio 0.75 can't be met: kept fractions of 0.2 everywhere.* remove only 0.734"):
        scheme_of(0.75)
    with pytest.raises(BudgetError, match="compress the value projections too"):
        SearchSpace.of(LLAMA, replace(search_by(PRESETS["bolaco"], 0.75)), VALUES, None)


def test_rare_points_are_refused_after_very_many_draws(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lowrank_core.studies.published._MAX_CHUNKS", 2)
    scheme = replace(scheme_of(0.2), compression_ratio=0.7336)  # a corner of the cube
    with pytest.raises(BudgetError, match="none of 131,072 random points"):
        scheme.draw(np.random.default_rng(0), 1)


def test_samplers_that_can_not_draw_so_are_refused():
    config = replace(search_by(PRESETS["bolaco"], 0.2), sampler="tpe")
    with pytest.raises(ConfigError, match=r"which the sampler tpe can't\. Choose gp or random"):
        SearchSpace.of(LLAMA, config, VALUES, None)
    run = create_run(RunConfig(search=search_by(PRESETS["bolaco"], 0.2)))
    with pytest.raises(ConfigError, match="sampler cmaes can't"):
        run.change_search(sampler="cmaes")
    with pytest.raises(ConfigError, match="windows are selected in a search as published alone"):
        SearchConfig(selected_windows=10)


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_ranks_are_the_published_ones():
    """⌈k·m·n/(m + n)⌉, floored to a multiple of 8; from 1 on a matrix is dense."""
    space = SearchSpace(LLAMA, 0.2, VALUES, projected=False, rank_multiple=8)
    result = space.allocation({"qk": 0.5, "o": 1.0004, "gate": 0.8, "up": 0.31, "down": 0.2}).ranks
    expected = {"q": 1024, "k": 1024, "v": None, "o": None, "gate": 2384, "up": 920, "down": 592}
    for name, rank in expected.items():
        assert result[next(unit.name for unit in LLAMA if f".{name}_proj" in unit.name)] == rank
    assert math.ceil(0.8 * 4096 * 11008 / (4096 + 11008)) // 8 * 8 == 2384


def test_a_kept_fraction_means_the_same_in_pivoted_storage():
    for kept in (0.2, 0.5, 0.9, 0.999):
        for unit in units_of({"mlp.up_proj": (688, 256), "self_attn.q_proj": (256, 256)}, storage="pivoted"):
            rank = published_rank(unit, kept)
            (m, n), size = (unit.d_out, unit.d_in), unit.d_out * unit.d_in
            assert (rank - 1) * (m + n - rank + 1) < kept * size <= rank * (m + n - rank)


# --- (d) where it begins, and what is random -----------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "expected"), [(0.2, (0.5, 0.5, 0.8, 0.8, 0.8)), (0.3, (0.5, 0.5, 0.7, 0.7, 0.7))])
def test_the_first_point_is_the_published_one(ratio: float, expected: tuple[float, ...]):
    assert scheme_of(ratio).first.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("ratio", [0.05, 0.4, 0.6, 0.7])
def test_where_the_first_point_misses_the_budget_it_is_scaled(ratio: float):
    first = scheme_of(ratio).first
    assert published_condition(first, 1 - ratio)
    if ratio == 0.4:
        assert first[0] == first[1] < 0.5
        assert first[2] / first[0] == pytest.approx(0.6 / 0.5)
        assert 1 + 3 * first[0] + 2.6875 * first[2:].sum() == pytest.approx(0.6 * 12.0625, abs=3e-4)  # and spends it


def test_a_model_without_a_type_begins_without_its_entry():
    fused = units_of({"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)})
    scheme = scheme_of(0.2, fused)
    assert scheme.groups == ("c_attn", "c_proj", "c_fc") or len(scheme.groups) == 3 + ("mlp.c_proj" in scheme.groups)
    assert scheme.point(scheme.first)["c_fc"] > scheme.point(scheme.first)["c_attn"]
    assert scheme.meets(scheme.first)


def test_the_initial_points_are_the_start_and_the_draws_farthest_from_it():
    scheme = scheme_of(0.2)
    points = scheme.initial(3, seed=7)
    draws = scheme.draw(np.random.default_rng([7, 0]), 100)
    start = np.array([0.5, 0.5, 0.8, 0.8, 0.8])
    second = max(draws, key=lambda x: np.linalg.norm(x - start))
    rest = [x for x in draws if not np.array_equal(x, second)]
    third = max(rest, key=lambda x: min(np.linalg.norm(x - start), np.linalg.norm(x - second)))
    assert points == pytest.approx(np.stack([start, second, third]))
    assert not np.array_equal(points[1], scheme.initial(3, seed=8)[1])


def _trials(points: np.ndarray, values: np.ndarray, scheme: PublishedScheme) -> list[FrozenTrial]:
    bounds = dict.fromkeys(scheme.groups, FloatDistribution(0.2, 1.001))
    return [create_trial(value=float(v), params=scheme.point(p), distributions=dict(bounds)) for p, v in zip(points, values, strict=True)]


def bowl(points: np.ndarray) -> np.ndarray:
    return ((points - np.array([0.9, 0.6, 0.7, 0.75, 0.85])) ** 2).sum(axis=-1) * [1.0] + 20


def test_one_trial_in_ten_is_random_and_the_others_meet_the_budget_where_it_is_best():
    scheme = scheme_of(0.2)
    points = scheme.draw(np.random.default_rng(0), 30)
    trials = _trials(points, bowl(points), scheme)
    drawn = {seed for seed in range(60) if np.random.default_rng([seed, 1]).random() < 0.1}
    assert 1 <= len(drawn) <= 14

    def proposed(seeds: Iterable[int]) -> np.ndarray:
        result = np.array([list(next_point(scheme, trials, seed, initial=3, random=False).values()) for seed in seeds])
        assert all(published_condition(point, 0.8) for point in result)
        return bowl(result)

    best = np.median(proposed(seed for seed in range(20) if seed not in drawn))  # each of these fits a process
    assert best < bowl(points).min()
    assert np.median(proposed(drawn)) > best


def test_before_the_initial_points_are_measured_trials_are_random():
    scheme = scheme_of(0.2)
    points = scheme.draw(np.random.default_rng(0), 2)
    low, high = (_trials(points, values, scheme) for values in (np.array([1.0, 2.0]), np.array([2.0, 1.0])))
    few = [next_point(scheme, trials, 5, initial=3, random=False) for trials in (low, high)]
    assert few[0] == few[1]


def test_the_process_s_slopes_are_those_of_its_likelihood():
    generator = np.random.default_rng(0)
    points, values = generator.random((12, 3)), generator.normal(size=12)
    theta = np.array([0.3, -0.5, -1.0, -0.2, -3.0])
    assert check_grad(lambda t: _loss(t, points, values)[0], lambda t: _loss(t, points, values)[1], theta) < 1e-4


def test_the_process_goes_through_what_it_knows_and_expects_nothing_there():
    points = np.random.default_rng(0).random((15, 2))
    process = GaussianProcess.fitted(points, np.sin(4 * points[:, 0]) + points[:, 1], np.random.default_rng(1))
    assert process.improvement(points).max() < 1e-2
    assert process.improvement(np.random.default_rng(2).random((500, 2))).max() > process.improvement(points).max()


def proposals(scheme: PublishedScheme, count: int, seed: int = 0, scale: float = 1.0) -> list[dict[str, float]]:
    config = replace(search_by(PRESETS["bolaco"], 0.2), seed=seed)
    study = optuna.create_study()
    bounds = dict.fromkeys(scheme.groups, FloatDistribution(0.2, 1.001))
    study.sampler = PointSampler(config, bounds, scheme)
    for point in scheme.initial(3, seed):
        study.enqueue_trial(scheme.point(point))
    result = []
    for _ in range(count):
        asked = study.ask(dict(bounds))
        result.append(asked.params)
        study.tell(asked, scale * float(bowl(np.array([list(asked.params.values())]))[0]))
    return result


def test_a_search_is_repeated_by_its_seed():
    scheme = scheme_of(0.2)
    first = proposals(scheme, 7)
    assert list(first[0].values()) == pytest.approx([0.5, 0.5, 0.8, 0.8, 0.8])
    assert proposals(scheme, 7) == first
    assert proposals(scheme, 7, seed=1)[1:] != first[1:]
    assert proposals(scheme, 5) == first[:5]


def test_the_process_models_the_values_themselves():
    """Values times two are the same to it, as they are scaled; their logarithms or squares are not."""
    scheme = scheme_of(0.2)
    points = scheme.draw(np.random.default_rng(3), 12)
    submit = {seed for seed in range(12) if np.random.default_rng([seed, 1]).random() >= 0.1}
    seed = min(submit)

    def proposed(values: np.ndarray) -> list[float]:
        return list(next_point(scheme, _trials(points, values, scheme), seed, initial=3, random=False).values())

    steep = np.exp(3 * bowl(points) - 60)
    assert proposed(2 * steep) == pytest.approx(proposed(steep))
    assert proposed(np.log(steep)) != pytest.approx(proposed(steep))
    config = replace(search_by(PRESETS["bolaco"], 0.2), seed=0)
    study = optuna.create_study()
    study.add_trials(_trials(points, steep, scheme))
    bounds = dict.fromkeys(scheme.groups, FloatDistribution(0.2, 1.001))
    study.sampler = PointSampler(config, bounds, scheme)
    asked = study.ask(dict(bounds))
    known = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    assert asked.params == next_point(scheme, known, asked.number, initial=3, random=False)


# --- (e) the windows -------------------------------------------------------------------------------------------------


def test_the_windows_that_vary_most_are_taken_in_the_order_of_the_text():
    perplexities = np.array([[10.0, 5.0, 7.0, 9.0], [12.0, 5.0, 1.0, 9.5], [11.0, 5.0, 4.0, 9.0]])
    assert most_varied(perplexities, 2) == (0, 2)
    assert most_varied(perplexities, 3) == (0, 2, 3)


def _figures(trials: list[TrialRecord]) -> list[tuple[object, ...]]:
    return [(t.number, t.state, t.params, t.ranks, t.value) for t in trials]


def _nominal(run: Run, trial: TrialRecord) -> float:
    """Kept fraction of the tiny Llama's parameters by the point alone: 2 of 32 x 32, 2 of 16 x 32, 3 of 80 x 32 in a block."""
    p = trial.params
    kept = 1024 * p["qk"] + 512 * p["qk"] + 512 + 1024 * p["o"] + 2560 * (p["gate"] + p["up"] + p["down"])
    return kept / (2 * 1024 + 2 * 512 + 3 * 2560)


def test_a_search_as_published_measures_feasible_points_alone_on_windows_of_its_own(config: RunConfig):
    run = create_run(config)
    session, bench = run_worker(run, verbose=False)
    trials = read_trials(run)
    assert [trial.state for trial in trials] == ["complete"] * 6
    assert [trial.label for trial in trials] == ["sampled"] * 6  # no baselines: 3 of its own, and the process's
    assert all(0.6 <= _nominal(run, trial) <= 0.7 + 1e-5 for trial in trials)
    assert bench is not None
    assert (bench.windows.windows, bench.windows.context) == (3, 32)
    pool = load_windows(config.text, session.handle.tokenizer, "validation", count=25)  # 8.2 times as many
    assert _expected_windows(bench, pool) == tuple(bench.selection.chosen)  # type: ignore[union-attr]
    words = trial_windows(run)
    assert words is not None
    assert words.words == f"3 windows of 32 tokens (of {pool.windows} those whose perplexity varies most over 20 random allocations)"
    assert words.words in protocol.trial_protocol(run)
    assert f"the 3 of {pool.windows} whose perplexity varies most" in bench.windows.protocol


def _expected_windows(bench: object, pool: object) -> tuple[int, ...]:
    """The same by another route: one window after the other, at the same points."""
    space, rows = bench.space, []  # type: ignore[attr-defined]
    for point in space.scheme.draw(np.random.default_rng(42), 20):
        ranks = space.allocation(space.scheme.point(point)).ranks
        with swap_layers(bench.handle, low_rank_layers(bench.handle, bench.decomposed.bases, ranks, storage="factored")), torch.no_grad():  # type: ignore[attr-defined]
            rows.append([float(torch.exp(bench.handle.module(ids[None], labels=ids[None]).loss)) for ids in pool.ids])  # type: ignore[attr-defined]
    spread = np.std(rows, axis=0)
    return tuple(sorted(int(i) for i in np.argsort(spread)[-3:]))


def test_a_short_text_is_told_in_one_line(config: RunConfig):
    run = create_run(_search(config, selected_windows=100, trials=1))
    _, bench = run_worker(run, verbose=False)
    assert bench is not None
    assert bench.windows.windows == bench.selection.pool < 100  # type: ignore[union-attr]
    reported = [line for line in run.status().warnings if "100 were to be selected: trials see all of them" in line]
    assert len(reported) == 1
    assert not [name for name in run.stage_seconds() if name.startswith("Selecting") and run.stage_seconds()[name] > 5]


def test_a_pool_that_is_small_is_told():
    assert Selection("", 300, tuple(range(100)), 100).warning().startswith("100 validation windows were selected from 300")
    assert Selection("", 799, tuple(range(100)), 100).warning() == ""


def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    whole = create_run(_search(config, trials=7))
    run_worker(whole, verbose=False)
    stopped = create_run(_search(config, trials=4))
    run_worker(stopped, verbose=False)
    stopped.change_search(trials=7)
    monkeypatch.setattr("lowrank_core.search.selection.score_windows", None)  # windows are not selected again
    run_worker(stopped, verbose=False)
    assert _figures(read_trials(stopped)) == _figures(read_trials(whole))


def test_all_points_may_be_random(config: RunConfig):
    run = create_run(_search(config, trials=4, sampler="random", selected_windows=0))
    run_worker(run, verbose=False)
    assert all(0.6 <= _nominal(run, trial) <= 0.7 + 1e-5 for trial in read_trials(run))
    assert len({tuple(trial.params.values()) for trial in read_trials(run)}) == 4


def test_phases_are_told():
    config = search_by(PRESETS["bolaco"], 0.2)
    assert (phase(config, 2), phase(config, 3)) == ("initial points", "Gaussian process")


# --- runs of earlier versions ----------------------------------------------------------------------------------------


def _forget_rules(run: Run) -> None:
    """Make the journal one of an earlier version, which left no word of its rules."""
    lines = [line for line in run.journal.read_text(encoding="utf-8").splitlines() if '"rules"' not in line]
    older = run.journal.with_suffix(".older")
    older.write_text("\n".join(lines) + "\n", encoding="utf-8")
    older.replace(run.journal)  # a new file: readers keep their place in the one that was


@pytest.mark.parametrize("changes", [{}, {"projected": True, "selected_windows": 0}], ids=["as published", "its objective alone"])
def test_trials_of_an_earlier_version_are_not_mixed_with_new_ones(config: RunConfig, changes: dict[str, object]):
    run = create_run(_search(config, trials=3, **changes))
    run_worker(run, verbose=False)
    _forget_rules(run)
    before = read_trials(run)
    run_worker(run, verbose=False)  # what is finished opens, and is served
    assert read_trials(run) == before
    run.change_search(trials=5)
    with pytest.raises(RunError, match="earlier version's reading of Bolaco, and new ones can't be compared"):
        run_worker(run, verbose=False)
    assert [trial for trial in read_trials(run) if trial.finished] == before


def test_a_run_of_an_earlier_version_says_nothing_of_selected_windows(config: RunConfig):
    run = create_run(_search(config, selected_windows=0))
    body = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
    del body["config"]["search"]["selected_windows"]
    (run.path / "run.json").write_text(json.dumps(body), encoding="utf-8")
    assert run.config.search is not None
    assert run.config.search.selected_windows == 0


def test_other_searches_of_an_earlier_version_go_on(config: RunConfig):
    run = create_run(_search(config, objective="kl", projected=True, selected_windows=0, trials=2))
    run_worker(run, verbose=False)
    _forget_rules(run)
    run.change_search(trials=4)
    run_worker(run, verbose=False)
    assert len(read_trials(run)) == 4
