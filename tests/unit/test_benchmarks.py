"""The tables behind the README: every row measured, at the parameters that it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowrank_core.cli import main
from lowrank_core.commands.benchmarks import allocation, layer_speed, quality, search, speed
from lowrank_core.config import ModelSource, TextConfig, to_mapping
from lowrank_core.config.benchmarks import AllocationBenchmark, QualityBenchmark, SearchBenchmark
from lowrank_core.errors import ConfigError
from lowrank_core.presets.dense import DENSE
from lowrank_core.presets.recipes import PRESETS, VARIANTS
from lowrank_core.speed import Spread
from lowrank_core.studio.shared.benchmark_chart import convergence_figure, quality_figure


@pytest.fixture(scope="module")
def text(text_file: Path) -> TextConfig:
    return TextConfig(f"file:{text_file}", context=32, calibration_windows=20, validation_windows=4, test_windows=8)


def test_the_allocation_table_measures_each_allocation_at_equal_parameters(llama_checkpoint: Path, text: TextConfig) -> None:
    rows = allocation.allocation_table(ModelSource(str(llama_checkpoint)), text, AllocationBenchmark((0.3,), 2, 3))
    names = ("uniform", "lord_manual", "lagrangian", "search's best")
    assert [(row.seed, row.allocation) for row in rows] == [(seed, name) for seed in (0, 1) for name in names]
    for seed in (0, 1):
        *baselines, best = (row for row in rows if row.seed == seed)
        assert best.search_value <= min(row.search_value for row in baselines)
        counts = [row.parameters for row in (*baselines, best)]
        assert max(counts) - min(counts) < 112
        assert len({row.dense_perplexity for row in (*baselines, best)}) == 1
    assert "test split" in rows[0].protocol


def test_the_allocation_s_markdown_carries_the_figures_and_their_protocol() -> None:
    row = allocation.AllocationRow(0.2, 1, "uniform", 1234, 0.01234, 10.5, 10.0, (0.4, 0.6), 0.02, "text, test split: 8 windows")
    table = allocation.markdown_of([row])
    assert "| 20% | 1 | uniform | 1,234 | 0.0123 | 10.500 | +0.500 (0.400 to 0.600) | 0.0200 |" in table
    assert table.endswith("Dense perplexity 10.000; text, test split: 8 windows.")


@pytest.fixture(scope="module")
def rows(llama_checkpoint: Path, text: TextConfig, tmp_path_factory: pytest.TempPathFactory) -> list[quality.QualityRow]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_HOME", str(tmp_path_factory.mktemp("home")))
        return quality.quality_table(ModelSource(str(llama_checkpoint)), text, QualityBenchmark((0.4, 0.97), variants=True, int8=True))


def test_every_preset_and_variant_has_a_row_for_each_ratio(rows: list[quality.QualityRow]) -> None:
    names = {*PRESETS, *VARIANTS}
    assert {(row.recipe, row.compression_ratio) for row in rows} == {(name, ratio) for name in names for ratio in (0.4, 0.97)}


def test_rows_are_at_equal_parameters_with_intervals_around_the_figures(rows: list[quality.QualityRow]) -> None:
    measured = [row for row in rows if row.compression_ratio == 0.4]
    budget = 0.6 * 21_504  # in each of two blocks 2 matrices of 32 x 32, 2 of 16 x 32, 3 of 80 x 32
    for row in measured:
        assert not row.error
        assert row.parameters is not None
        assert row.parameters <= budget + 1e-6
        assert row.kl is not None
        assert row.kl_interval is not None
        assert row.kl_interval[0] <= row.kl <= row.kl_interval[1]
        exact = row.recipe not in ("bolaco", "basis_sharing", "data_free")  # ranks in eights, or coarse stacks
        assert not exact or row.parameters > budget - 250
    assert len({row.dense_perplexity for row in measured}) == 1


def test_int8_has_columns_of_its_own_and_fewer_bytes(rows: list[quality.QualityRow]) -> None:
    for row in rows:
        if not row.error:
            assert row.bytes is not None
            assert row.int8_bytes is not None
            assert row.int8_bytes < row.bytes
            assert row.int8_kl != row.kl
    table = quality.markdown_of(rows).split("\n\n")[1].splitlines()
    assert "| bytes | int8: bytes | above dense | KL | s |" in table[0]
    assert len({line.count("|") for line in table}) == 1
    plain = quality.markdown_of([replace(row, int8_bytes=None) for row in rows]).split("\n\n")[1].splitlines()
    assert "int8" not in plain[0]
    assert len({line.count("|") for line in plain}) == 1


def test_quantised_dense_models_have_rows_and_a_table_by_bytes(
    llama_checkpoint: Path, text: TextConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path))
    rows = quality.quality_table(ModelSource(str(llama_checkpoint)), text, QualityBenchmark((0.4,), ("pifa",), int8=True, dense=True))
    dense = {row.recipe: row for row in rows if row.compression_ratio == 0}
    assert set(dense) == {f"dense {name}" for name in DENSE}
    assert not [row.error for row in rows if row.error]
    assert dense["dense int4"].bytes == dense["dense int4_gptq"].bytes < dense["dense int8"].bytes < rows[0].dense_bytes
    assert dense["dense int8"].kl < dense["dense int4_gptq"].kl < dense["dense int4"].kl
    overview, details, sizes = (table.splitlines() for table in quality.markdown_of(rows).split("\n\n")[:3])
    assert len(overview) == 3  # pifa alone: nothing is removed from the others
    assert len(details) == 2 + len(rows)
    assert len(sizes) == 3 + len(rows)
    numbers = [int(line.split("|")[1].replace(",", "")) for line in sizes[2:]]
    assert numbers == sorted(numbers)
    assert "factors in int8, 40% removed" in "".join(sizes)
    assert quality_figure([to_mapping(row) for row in rows]).data
    assert "nan" not in "".join(details)


def test_a_ratio_out_of_reach_is_told_in_its_row_and_the_others_go_on(rows: list[quality.QualityRow]) -> None:
    failed = {row.recipe: row.error for row in rows if row.error}
    assert "can't be met" in failed["bolaco"]
    assert any(row.compression_ratio == 0.97 and not row.error for row in rows) or len(failed) == len({row.recipe for row in rows})


def test_the_table_and_the_figure_show_losers_and_failures(rows: list[quality.QualityRow]) -> None:
    table = quality.markdown_of(rows)
    assert all(row.label in table for row in rows)
    assert "test split" in table
    assert "can't be met" in table
    figure = quality_figure([to_mapping(row) for row in rows])
    drawn = {name for trace in figure.data for name in trace.y}
    assert {row.label for row in rows if not row.error} == drawn
    assert "Not measured" in figure.layout.annotations[-1].text


def test_a_plot_that_can_not_be_written_is_told_before_the_work(capsys: pytest.CaptureFixture[str], llama_checkpoint: Path) -> None:
    arguments = ["benchmark", "quality", "--model", str(llama_checkpoint), "--text", "file:nowhere.txt", "--plot", "/nowhere/plot.html"]
    assert main(arguments) == 2
    assert "/nowhere is no folder" in capsys.readouterr().err


def _scripted(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> list[object]:
    """Let timed actions take ``seconds``, one after the other, without running them; return what is timed as it happens."""
    left, timed = iter(seconds), []

    def took(action: object, repeats: int) -> float:
        timed.append(action)
        return next(left)

    monkeypatch.setattr("lowrank_core.commands.benchmarks.speed_rows._seconds", took)
    monkeypatch.setattr("lowrank_core.commands.benchmarks.speed_rows.TURNS", 3)
    return timed


def test_speed_is_a_ratio_of_two_things_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    def fast() -> None: ...
    def slow() -> None: ...

    timed = _scripted(monkeypatch, 9.0, 9.0, 0.1, *(2.0, 4.0), *(4.0, 1.0), *(30.0, 40.0))  # two to warm up, one for the repeats
    row = speed.compared("more", slow, "less", fast, "sums")
    assert timed[3:] == [slow, fast, fast, slow, slow, fast]
    assert (row.ratio, row.low, row.high) == (0.5, 0.25, 0.75)
    table = speed.markdown_of([row])
    assert "| more | less | sums | 0.50 (0.25 to 0.75) | – | – |" in table
    assert "1 thread, torch" in table


def test_a_layer_s_row_counts_its_flops_and_tells_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_speed, "SHAPES", (((48,), 64), ((32, 16, 16), 64)))
    monkeypatch.setattr(layer_speed, "RATIOS", (0.4,))
    turn = (3.0, 1.0, 2.0)
    _scripted(monkeypatch, *([0.0] * 4 + [*turn, *turn[::-1], *turn]) * 12)
    rows = list(layer_speed.layer_rows(torch.device("cpu"), torch.float32))
    kinds = ("factored layer", "pivoted layer", "factored stack", "pivoted stack")
    assert [row.what for row in rows] == [f"{kind}, {phase}" for kind in kinds for phase in ("prefill", "decode", "decode")]
    for row in rows:
        assert (row.ratio, row.products) == (1.5, 0.5)
        assert row.expected is not None
        assert 0.5 < row.expected <= 0.6
        assert "67% of its time" in row.verdict
    assert rows[1].detail == "48 x 64, ratio 0.4 (rank 16), 1 token"
    assert rows[8].detail.startswith("32 + 16 + 16 x 64, ratio 0.4")
    assert [row.expected for row in rows[::3]] == [16 * 112 / 3072, 19 * 93 / 3072, 19 * 128 / 4096, 23 * 105 / 4096]


def test_what_a_layer_does_are_its_products_and_it_gives_what_it_stands_for() -> None:
    for storage in ("factored", "pivoted"):
        subject = layer_speed._Subject.made((48, 32), 64, storage, 0.4, torch.empty(0))
        x = torch.randn(1, 5, 64)
        counts = [sum(p.numel() for layer in subject.layers for p in layer.parameters())]
        counts.append(subject.down.numel() + sum(second.numel() for second in subject.seconds))
        assert counts[0] == counts[1]
        with torch.no_grad():
            subject.compressed(x)
            subject.products(x)
            subject.dense(x)


def test_a_verdict_says_how_much_and_why() -> None:
    def reported(low: float, median: float, high: float, products: float = 0.6, storage: str = "pivoted") -> str:
        return layer_speed.verdict(Spread(median, low, high), products, 0.6, storage)

    assert reported(0.7, 0.8, 0.9) == "faster"
    assert reported(0.7, 0.8, 1.3) == "faster, though not in every turn"
    assert reported(0.9, 1.01, 1.1) == "as fast as dense"
    assert reported(1.1, 1.2, 1.3) == "slower by 20%: gathering rows and calling the layer take 50% of its time"
    assert reported(0.9, 1.25, 1.3, 1.2, "factored") == (
        "slower by 25%, though not in every turn: its products alone take 1.20 of the dense time (50% of its rate)"
    )
    both = reported(1.1, 2.0, 3.0, 1.0, "factored")
    assert both.endswith("1.00 of the dense time (60% of its rate), and calling the layer takes 50% of its time")


# --- searches side by side -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def curves(llama_checkpoint: Path, text: TextConfig, tmp_path_factory: pytest.TempPathFactory) -> list[search.Curve]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_HOME", str(tmp_path_factory.mktemp("home")))
        return search.search_curves(ModelSource(str(llama_checkpoint)), text, SearchBenchmark((0.3,), 2, 6))


def test_every_scheme_is_run_with_every_seed(curves: list[search.Curve]) -> None:
    schemes = list(dict.fromkeys(curve.scheme for curve in curves))
    assert tuple(schemes) == search.SCHEMES
    assert [(curve.scheme, curve.seed) for curve in curves] == [(scheme, seed) for scheme in schemes for seed in (0, 1)]
    assert {len(curve.best) for curve in curves} == {6}


def test_a_curve_never_rises_and_seeds_share_their_baselines(curves: list[search.Curve]) -> None:
    published = [curve for curve in curves if curve.scheme.startswith("published")]
    projected = [curve for curve in curves if curve not in published]
    for curve in projected:
        assert list(curve.best) == sorted(curve.best, reverse=True)  # type: ignore[type-var]
    for first, second in zip(projected[::2], projected[1::2], strict=True):
        assert first.best[:2] == second.best[:2]
    for first, second in zip(published[::2], published[1::2], strict=True):
        assert first.best[0] == second.best[0]  # where they start; it is judged by an objective of its own, so KL may rise
    assert all(None not in curve.best for curve in curves)


def test_the_table_and_the_curves_show_every_scheme(curves: list[search.Curve]) -> None:
    table = search.markdown_of(curves, [], "protocol")
    figure = convergence_figure([to_mapping(curve) for curve in curves], "protocol")
    for curve in curves:
        assert f"| {curve.label} |" in table
        drawn = [trace for trace in figure.data if trace.name == curve.label]
        assert len(drawn) == 3  # two seeds and their median
    assert table.endswith("protocol")
    assert "| 1 | 3 | 5 trials |" in table


def test_unknown_schemes_are_told(text: TextConfig) -> None:
    with pytest.raises(ConfigError, match=r"schemes must be among published, .*got 'best'"):
        search.search_curves(ModelSource(), text, SearchBenchmark((0.3,), 1, 1, ("best",)))


def test_missing_values_are_told() -> None:
    curve = search.Curve("a", "A", 0.3, 0, (None, 0.5, 0.25), 3.0, 1)
    table = search.markdown_of([curve, replace(curve, seed=1, best=(0.125, 0.125, 0.125))], [], "")
    assert "| A | – in 1 of 2 | 0.1875 (0.125 to 0.25) | 1.00 | 1 |" in table


def test_cheaper_trials_are_compared_with_whole_ones(llama_checkpoint: Path, text: TextConfig) -> None:
    rows = search.cheaper_trials(ModelSource(str(llama_checkpoint)), text, [0.3])
    assert [row.what for row in rows] == ["KL on the 16 likeliest tokens", "KL on the 64 likeliest tokens", "bfloat16"]
    for row in rows:
        assert row.time_ratio > 0
        assert -1 <= row.agreement <= 1
        assert f"| {row.what} | 30% |" in search.markdown_of([], rows, "")
    assert rows[1].largest_change < rows[0].largest_change
