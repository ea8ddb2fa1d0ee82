"""ASVD's search for ranks: what it measures, that nothing is measured twice, and the published threshold."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from priced import perplexities_of, single

from lowrank_core.allocation import AllocationProblem, allocate
from lowrank_core.allocation.truncation_search import _kept
from lowrank_core.compression import cut_passes, truncations
from lowrank_core.compression.build import low_rank_layers, swap_layers
from lowrank_core.compression.decomposed import Decomposed, decompose
from lowrank_core.compression.truncations import KEPT, WINDOWS, cost_in_words, measured_perplexities, perplexities_for, planned_truncations
from lowrank_core.config import CalibrationConfig, CompressionConfig
from lowrank_core.errors import Cancelled, ConfigError, RunError
from lowrank_core.evaluation import evaluate, score_windows
from lowrank_core.models import ModelHandle
from lowrank_core.parameters import Unit, budget_for_ratio
from lowrank_core.presets.recipes import PRESETS
from lowrank_core.statistics.calibration import LayerStatistics, collect_statistics, statistics_key
from lowrank_core.text import WindowSet

SQUARES = tuple(single(name, 60, 60) for name in "abcd")


@pytest.fixture(scope="module")
def statistics(llama: ModelHandle, windows: WindowSet) -> LayerStatistics:
    return collect_statistics(llama, windows, CalibrationConfig(group_size=8))


@pytest.fixture(scope="module")
def asvd(llama: ModelHandle, statistics: LayerStatistics) -> Decomposed:
    return decompose(llama, statistics, PRESETS["asvd"].compression)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("statistics")


@pytest.fixture(scope="module")
def measured(asvd: Decomposed, windows: WindowSet, store: Path) -> Mapping[str, Mapping[float, float]]:
    return measured_perplexities(asvd, windows, store)


def unmeasurable(*_: object, **__: object) -> None:
    raise AssertionError("measured again")


# --- what is measured ------------------------------------------------------------------------------------------------


def test_it_is_the_perplexity_with_one_matrix_cut_everything_else_dense(
    asvd: Decomposed, windows: WindowSet, measured: Mapping[str, Mapping[float, float]]
):
    assert set(measured) == {unit.name for unit in asvd.units}
    handle = asvd.handle
    for unit, kept in ((asvd.units[0], 0.3), (asvd.units[-1], 0.8)):
        rank = int(kept * unit.d_out * unit.d_in) // (unit.d_out + unit.d_in)  # as the published code
        with swap_layers(handle, low_rank_layers(handle, asvd.bases, {unit.name: rank})):
            expected = evaluate(handle, windows.first(WINDOWS)).perplexity
        assert measured[unit.name][kept] == pytest.approx(expected, rel=1e-6)


def test_a_pass_begins_at_the_block_that_is_cut_and_is_the_whole_pass_bit_for_bit(asvd: Decomposed, windows: WindowSet, tmp_path: Path):
    last = asvd.units[-1]
    ran: list[int] = []
    blocks = asvd.handle.module.model.layers
    hooks = [block.self_attn.register_forward_hook(lambda *_, number=number: ran.append(number)) for number, block in enumerate(blocks)]
    try:
        bench = truncations._Bench(asvd, windows.first(8), asvd.statistics.config.batch_size)
        bench.perplexity(truncations.Truncation(last.name, 0.2, 2))
        ran.clear()
        result = bench.perplexity(truncations.Truncation(last.name, 0.4, 4))
    finally:
        for hook in hooks:
            hook.remove()
    assert set(ran) == {1}
    with swap_layers(asvd.handle, low_rank_layers(asvd.handle, asvd.bases, {last.name: 4}, storage="factored")):
        scores, _ = score_windows(asvd.handle, windows.first(8))
    assert result == float(np.exp(scores.nll.double().mean().item()))


def test_the_grid_is_the_paper_s_and_the_cost_is_counted(asvd: Decomposed, windows: WindowSet):
    planned = planned_truncations(asvd.units)
    assert tuple(step / 10 for step in range(1, 10)) == KEPT
    assert len(planned) == len(asvd.units) * len(KEPT)
    assert cost_in_words(asvd, windows) == f"{len(planned)} passes over {min(WINDOWS, windows.windows)} windows"


def test_nothing_is_measured_twice_not_even_at_another_ratio_or_storage(
    asvd: Decomposed,
    windows: WindowSet,
    store: Path,
    measured: Mapping[str, Mapping[float, float]],
    monkeypatch: pytest.MonkeyPatch,
):
    before = asvd.handle.fingerprint
    monkeypatch.setattr(cut_passes, "score_windows", unmeasurable)
    assert measured_perplexities(asvd, windows, store) == measured
    assert asvd.handle.fingerprint == before
    with pytest.raises(AssertionError, match="measured again"):  # other factors, other windows
        measured_perplexities(decompose(asvd.handle, asvd.statistics, PRESETS["svd_llm"].compression), windows, store)
    with pytest.raises(AssertionError, match="measured again"):
        measured_perplexities(asvd, windows.first(20), store)


def test_measurements_of_earlier_versions_are_found(asvd: Decomposed, windows: WindowSet):
    """The name says of an option only where it is not the default."""
    config = asvd.config
    about = [statistics_key(asvd.handle, windows, asvd.statistics.config), "", WINDOWS, str(asvd.handle.module.dtype)]
    parts = ["truncations", 1, *about, config.basis, config.input_damping, config.gradient_damping]
    expected = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    assert truncations.cuts_key(asvd, windows, "truncations", 1, WINDOWS) == expected
    shrunk = replace(asvd, config=replace(config, basis="two_sided", gradient_shrinkage=0.3))
    plain = replace(asvd, config=replace(config, basis="two_sided"))
    robust = replace(asvd, config=replace(config, basis="two_sided", robust_gradients=True))
    assert len({truncations.cuts_key(each, windows, "truncations", 1, WINDOWS) for each in (shrunk, plain, robust)}) == 3


def test_other_allocators_measure_nothing(asvd: Decomposed, windows: WindowSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cut_passes, "score_windows", unmeasurable)
    assert perplexities_for("uniform", asvd, windows, tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("torn", [b"", b'{"unit": "model.la'])
def test_what_was_stopped_goes_on_where_it_was(
    torn: bytes, asvd: Decomposed, windows: WindowSet, tmp_path: Path, measured: Mapping[str, Mapping[float, float]]
):
    seen: list[tuple[int, int]] = []

    def stop_after_five(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 5:
            raise Cancelled

    with pytest.raises(Cancelled):
        measured_perplexities(asvd, windows, tmp_path, progress=stop_after_five)
    (path,) = tmp_path.glob("*/*.jsonl")
    assert len(path.read_bytes().splitlines()) == 5
    path.write_bytes(path.read_bytes() + torn)
    counted = count_passes(asvd, windows, tmp_path)
    distinct = {(cut.unit, cut.rank) for cut in planned_truncations(asvd.units)}
    assert counted == len(distinct) - 5
    assert measured_perplexities(asvd, windows, tmp_path) == measured
    assert seen == [(done, len(planned_truncations(asvd.units))) for done in range(6)]


def count_passes(asvd: Decomposed, windows: WindowSet, store: Path) -> int:
    real, count = truncations._Bench.perplexity, 0

    def counting(bench: truncations._Bench, cut: truncations.Truncation) -> float | None:
        nonlocal count
        count += 1
        return real(bench, cut)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truncations._Bench, "perplexity", counting)
        measured_perplexities(asvd, windows, store)
    return count


@pytest.mark.parametrize("line", [b"{}", b"nonsense", b'{"unit": "a", "kept": 0.1, "rank": 3, "perplexity": NaN}', b"[1]"])
def test_a_damaged_file_is_named_with_the_way_out(line: bytes, asvd: Decomposed, windows: WindowSet, tmp_path: Path):
    with pytest.raises(Cancelled):
        measured_perplexities(asvd, windows, tmp_path, progress=stop)
    (folder,) = tmp_path.iterdir()
    (folder / "perplexities.jsonl").write_bytes(line + b"\n")
    with pytest.raises(RunError, match=r"perplexities\.jsonl is damaged in line 1: .*Delete the file to measure again"):
        measured_perplexities(asvd, windows, tmp_path)


def stop(done: int, total: int) -> None:
    raise Cancelled


def test_a_model_that_diverges_has_an_infinite_perplexity_and_is_not_cut_there(
    asvd: Decomposed, windows: WindowSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    broken = asvd.units[0].name

    def overflowing(handle: ModelHandle, bases: object, ranks: Mapping[str, int], **options: object) -> dict[str, torch.nn.Module]:
        layers = low_rank_layers(handle, bases, ranks, **options)  # type: ignore[arg-type]
        if broken in ranks:
            for parameter in layers[broken].parameters():
                parameter.data.fill_(torch.nan)
        return layers

    monkeypatch.setattr("lowrank_core.compression.decomposed.low_rank_layers", overflowing)
    result = measured_perplexities(asvd, windows.first(4), tmp_path)
    assert set(result[broken].values()) == {math.inf}
    assert measured_perplexities(asvd, windows.first(4), tmp_path) == result  # null in the file
    assert asvd.allocate("truncation_search", 0.3, perplexities=result).ranks[broken] is None


def test_alternatives_are_refused_before_anything_is_measured(
    llama: ModelHandle, statistics: LayerStatistics, windows: WindowSet, tmp_path: Path
):
    decomposed = decompose(llama, statistics, CompressionConfig(basis="whitened", value_dense=False, stacks=True))
    with pytest.raises(ConfigError, match="this allocation can't choose"):
        measured_perplexities(decomposed, windows, tmp_path)


# --- the threshold ---------------------------------------------------------------------------------------------------


def published(perplexities: Mapping[str, Mapping[float, float]], sizes: Mapping[str, int], target: float) -> list[dict[str, float]]:
    """Return what the layers keep at the last cut below the nominal target, and at the first above: a line of cuts, tried one by one."""
    cuts = sorted(((p, name, k) for name, grid in perplexities.items() for k, p in grid.items()), key=lambda cut: cut[0])
    kept, below = dict.fromkeys(sizes, 1.0), dict.fromkeys(sizes, 1.0)
    for _, name, fraction in cuts:  # the cheapest first
        below = {**kept, name: min(kept[name], fraction)}
        if sum(below[n] * size for n, size in sizes.items()) <= target * sum(sizes.values()):
            return [below, kept]
        kept = below
    return [below, kept]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.85))
def test_every_unit_but_the_one_at_the_threshold_keeps_what_the_published_search_leaves_it(seed: int, ratio: float):
    units = (*SQUARES, single("wide", 60, 160), single("tall", 160, 60))
    table, sizes = perplexities_of(units, seed), {unit.name: unit.dense_parameters for unit in units}
    below, above = published(table, sizes, 1 - ratio)
    cuts = sorted(((p, u, k) for u, grid in table.items() for k, p in grid.items()), reverse=True)
    kept = _kept(units, [(unit, fraction) for _, unit, fraction in cuts], AllocationProblem(units, ratio).available)
    differing = [name for name in sizes if not math.isclose(kept[name], below[name])]
    assert len(differing) <= 1
    assert all(below[name] - 1e-9 <= kept[name] <= above[name] + 1e-9 for name in sizes)
    assert sum(kept[name] * size for name, size in sizes.items()) == pytest.approx(budget_for_ratio(units, ratio), abs=1)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.95))
def test_the_budget_is_spent_below_the_grid_too(seed: int, ratio: float):
    result = allocate("truncation_search", SQUARES, ratio, perplexities=perplexities_of(SQUARES, seed))
    budget = budget_for_ratio(SQUARES, ratio)
    assert budget - 120 < result.parameters <= budget


def test_a_monotone_function_of_the_perplexities_changes_nothing():
    table = perplexities_of(SQUARES, 3)
    logarithms = {name: {k: math.log(p) for k, p in grid.items()} for name, grid in table.items()}
    first, second = (allocate("truncation_search", SQUARES, 0.4, perplexities=each) for each in (table, logarithms))
    assert first == second


def test_a_matrix_that_the_model_can_t_do_without_stays_dense_and_one_that_it_can_is_cut_the_deepest():
    grids = {"a": 1000.0, "b": 20.0, "c": 20.0, "d": 1.0}
    table = {name: {k: scale * (1.0 - k) + 10 for k in KEPT} for name, scale in grids.items()}
    ranks = allocate("truncation_search", SQUARES, 0.4, perplexities=table).ranks
    assert ranks["a"] is None
    assert ranks["d"] == min(rank for rank in ranks.values() if rank is not None) == int(0.1 * 3600) // 120


def test_without_its_measurements_it_says_how_to_get_them():
    with pytest.raises(ConfigError, match=r"that of a was not measured.*lowrank compress --allocation truncation_search"):
        allocate("truncation_search", SQUARES, 0.4)


def test_on_a_model_the_search_loses_less_than_uniform_ranks(
    asvd: Decomposed, windows: WindowSet, measured: Mapping[str, Mapping[float, float]]
):
    """On the text that it was measured on; at equal parameters."""
    searched, uniform = (asvd.allocate(name, 0.2, perplexities=measured) for name in ("truncation_search", "uniform"))
    assert searched.parameters == pytest.approx(uniform.parameters, rel=0.02)
    losses = [
        evaluate(asvd.compress(each, windows).handle, windows.first(WINDOWS), against=asvd.handle).perplexity
        for each in (searched, uniform)
    ]
    assert losses[0] < losses[1]


def test_ranks_of_the_grid_are_those_of_the_published_code():
    """⌊k·m·n⌋ / (m + n), rounded down."""
    unit: Unit = single("a", 96, 200)
    expected = [int(k * 96 * 200) // 296 for k in KEPT]
    assert [cut.rank for cut in planned_truncations([unit])] == expected
    assert np.all(np.diff(expected) > 0)
