from pathlib import Path

from lowrank_core.benchmarks import AllocationRow, allocation_table, as_markdown
from lowrank_core.config import ModelSource, TextConfig


def test_the_table_measures_each_allocation_at_equal_parameters(llama_checkpoint: Path, text_file: Path) -> None:
    text = TextConfig(f"file:{text_file}", context=32, calibration_windows=40, validation_windows=4, test_windows=8)
    rows = allocation_table(ModelSource(str(llama_checkpoint)), text, [0.3], seeds=2, trials=3)
    assert [(row.seed, row.allocation) for row in rows] == [
        (seed, name) for seed in (0, 1) for name in ("uniform", "lord_manual", "search's best")
    ]
    for seed in (0, 1):
        uniform, lord, best = (row for row in rows if row.seed == seed)
        assert best.search_value <= min(uniform.search_value, lord.search_value)
        assert max(row.parameters for row in (uniform, lord, best)) - min(row.parameters for row in (uniform, lord, best)) < 112
        assert uniform.dense_perplexity == lord.dense_perplexity == best.dense_perplexity
    assert "test split" in rows[0].protocol


def test_the_markdown_carries_the_figures_and_their_protocol() -> None:
    row = AllocationRow(0.2, 1, "uniform", 1234, 0.01234, 10.5, 10.0, (0.4, 0.6), 0.02, "text, test split: 8 windows")
    table = as_markdown([row])
    assert "| 20% | 1 | uniform | 1,234 | 0.0123 | 10.500 | +0.500 (0.400 to 0.600) | 0.0200 |" in table
    assert table.endswith("Dense perplexity 10.000; text, test split: 8 windows.")
