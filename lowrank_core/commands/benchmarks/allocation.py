"""Allocations of the paper's basis side by side: uniform, fixed ratios, and what a search finds."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowrank_core.allocation import allocation_from_ranks
from lowrank_core.catalogue import as_markdown
from lowrank_core.config import ModelSource, RunConfig, SearchConfig, TextConfig, to_mapping
from lowrank_core.config.benchmarks import AllocationBenchmark
from lowrank_core.evaluation import evaluate
from lowrank_core.runs import Run, create_run
from lowrank_core.search.study import TrialBench
from lowrank_core.studies.records import best_trial, read_trials
from lowrank_core.types import Result
from lowrank_core.wording import fixed, fixed_interval
from lowrank_core.worker.main import run_worker
from lowrank_core.worker.session import RunContext

__all__ = ["AllocationRow", "allocation_table", "benchmark", "markdown_of"]


@dataclass(frozen=True)
class AllocationRow:
    """One allocation, measured on test text; ``search_value`` is what the search saw on validation text."""

    compression_ratio: float
    seed: int
    allocation: str
    parameters: int
    search_value: float
    perplexity: float
    dense_perplexity: float
    difference_interval: tuple[float, float] | None
    kl: float
    protocol: str


def benchmark(source: ModelSource, text: TextConfig, config: AllocationBenchmark) -> Result:
    """Measure uniform, lord_manual and the search's best on test text."""
    rows = allocation_table(source, text, config)
    return {"rows": [to_mapping(row) for row in rows], "text": markdown_of(rows)}


def allocation_table(source: ModelSource, text: TextConfig, config: AllocationBenchmark) -> list[AllocationRow]:
    """Run a search for each ratio and seed, and measure its baselines and its best on test text."""
    rows: list[AllocationRow] = []
    with tempfile.TemporaryDirectory() as folder:
        for ratio in config.ratios:
            for seed in range(config.seeds):
                search = SearchConfig(compression_ratio=ratio, trials=config.trials, seed=seed, confirmed=0)
                run = create_run(RunConfig(source, replace(text, seed=seed), search=search), path=Path(folder) / f"{ratio}-{seed}")
                session, bench = run_worker(run)
                assert bench is not None
                rows.extend(_measured(run, session, bench, ratio, seed))
                print(f"ratio {ratio}, seed {seed}: done", file=sys.stderr)
    return rows


def _measured(run: Run, session: RunContext, bench: TrialBench, ratio: float, seed: int) -> Iterator[AllocationRow]:
    trials = read_trials(run)
    best = best_trial(trials)
    assert best is not None
    chosen = {trial.label: trial for trial in trials if trial.label != "sampled"} | {"search's best": best}
    for label, trial in chosen.items():
        allocation = allocation_from_ranks(label, bench.space.units, trial.ranks)
        model = bench.decomposed.compress(allocation, session.windows.calibration)
        report = evaluate(model.handle, session.windows.test, against=session.handle)
        assert report.dense_perplexity is not None
        assert report.kl is not None
        yield AllocationRow(
            compression_ratio=ratio,
            seed=seed,
            allocation=label,
            parameters=allocation.parameters,
            search_value=trial.value or 0.0,
            perplexity=report.perplexity,
            dense_perplexity=report.dense_perplexity,
            difference_interval=report.perplexity_difference_interval,
            kl=report.kl,
            protocol=report.protocol,
        )


def markdown_of(rows: Sequence[AllocationRow]) -> str:
    """Return the rows as a Markdown table, the protocol under it."""
    cells = [
        {
            "removed": f"{row.compression_ratio:.0%}",
            "seed": f"{row.seed}",
            "allocation": row.allocation,
            "parameters": f"{row.parameters:,}",
            "KL in the search": f"{row.search_value:.4f}",
            "test perplexity": f"{row.perplexity:.3f}",
            "above dense (95 % interval)": f"{fixed(row.perplexity - row.dense_perplexity, 3, signed=True)} "
            f"({fixed_interval(row.difference_interval, 3)})",
            "test KL": fixed(row.kl, 4),
        }
        for row in rows
    ]
    protocols = sorted({f"Dense perplexity {row.dense_perplexity:.3f}; {row.protocol}." for row in rows})
    return "\n".join([as_markdown(cells), "", *protocols])
