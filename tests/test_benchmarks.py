"""The tables behind the README: every row measured, at the parameters that it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank_core.benchmarks import allocation, quality, speed
from lowrank_core.cli import main
from lowrank_core.config import ModelSource, TextConfig
from lowrank_core.figures.quality import quality_figure
from lowrank_core.presets import PRESETS, VARIANTS


@pytest.fixture(scope="module")
def text(text_file: Path) -> TextConfig:
    return TextConfig(f"file:{text_file}", context=32, calibration_windows=40, validation_windows=4, test_windows=8)


def test_the_allocation_table_measures_each_allocation_at_equal_parameters(llama_checkpoint: Path, text: TextConfig) -> None:
    rows = allocation.allocation_table(ModelSource(str(llama_checkpoint)), text, [0.3], seeds=2, trials=3)
    assert [(row.seed, row.allocation) for row in rows] == [
        (seed, name) for seed in (0, 1) for name in ("uniform", "lord_manual", "search's best")
    ]
    for seed in (0, 1):
        uniform, lord, best = (row for row in rows if row.seed == seed)
        assert best.search_value <= min(uniform.search_value, lord.search_value)
        assert max(row.parameters for row in (uniform, lord, best)) - min(row.parameters for row in (uniform, lord, best)) < 112
        assert uniform.dense_perplexity == lord.dense_perplexity == best.dense_perplexity
    assert "test split" in rows[0].protocol


def test_the_allocation_s_markdown_carries_the_figures_and_their_protocol() -> None:
    row = allocation.AllocationRow(0.2, 1, "uniform", 1234, 0.01234, 10.5, 10.0, (0.4, 0.6), 0.02, "text, test split: 8 windows")
    table = allocation.as_markdown([row])
    assert "| 20% | 1 | uniform | 1,234 | 0.0123 | 10.500 | +0.500 (0.400 to 0.600) | 0.0200 |" in table
    assert table.endswith("Dense perplexity 10.000; text, test split: 8 windows.")


@pytest.fixture(scope="module")
def rows(llama_checkpoint: Path, text: TextConfig, tmp_path_factory: pytest.TempPathFactory) -> list[quality.QualityRow]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_HOME", str(tmp_path_factory.mktemp("home")))
        return quality.quality_table(ModelSource(str(llama_checkpoint)), text, [0.4, 0.97], variants=True)


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


def test_a_ratio_out_of_reach_is_told_in_its_row_and_the_others_go_on(rows: list[quality.QualityRow]) -> None:
    failed = {row.recipe: row.error for row in rows if row.error}
    assert "can't be met" in failed["bolaco"]
    assert any(row.compression_ratio == 0.97 and not row.error for row in rows) or len(failed) == len({row.recipe for row in rows})


def test_the_table_and_the_figure_show_losers_and_failures(rows: list[quality.QualityRow]) -> None:
    table = quality.as_markdown(rows)
    assert all(row.label in table for row in rows)
    assert "test split" in table
    assert "can't be met" in table
    figure = quality_figure([row.to_mapping() for row in rows])
    drawn = {name for trace in figure.data for name in trace.y}
    assert {row.label for row in rows if not row.error} == drawn
    assert "Not measured" in figure.layout.annotations[-1].text


def test_a_plot_that_can_not_be_written_is_told_before_the_work(capsys: pytest.CaptureFixture[str], llama_checkpoint: Path) -> None:
    arguments = ["benchmark", "quality", "--model", str(llama_checkpoint), "--text", "file:nowhere.txt", "--plot", "/nowhere/plot.html"]
    assert main(arguments) == 2
    assert "/nowhere is no folder" in capsys.readouterr().err


def test_speed_is_a_ratio_of_two_things_measured_in_turns() -> None:
    fast, slow = [], []

    def work(rounds: int) -> int:
        return sum(range(rounds))

    row = speed.compared("more", lambda: fast.append(work(40_000)), "less", lambda: slow.append(work(4_000)), "sums")
    assert 3 < row.ratio < 30
    assert row.low <= row.ratio <= row.high
    assert len(fast) >= row.turns
    assert "| more | less | sums |" in speed.as_markdown([row])
