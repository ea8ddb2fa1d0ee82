"""Benchmark of search convergence over seeds, and of cheaper trials."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scipy.stats import kendalltau

from lowrank_core.allocation import RankAllocation, allocation_from_ranks
from lowrank_core.catalogue import as_markdown
from lowrank_core.config import CompressionConfig, ModelSource, RunConfig, SearchConfig, TextConfig, to_mapping
from lowrank_core.config.benchmarks import SearchBenchmark
from lowrank_core.errors import ConfigError
from lowrank_core.evaluation import DenseReference, score_windows
from lowrank_core.models import load_model
from lowrank_core.presets.recipes import PRESETS, search_by
from lowrank_core.runs import create_run
from lowrank_core.search.study import TrialBench, run_trial, study_in_memory
from lowrank_core.studies.records import TrialRecord, best_trial, records_of
from lowrank_core.text import load_windows
from lowrank_core.types import Result
from lowrank_core.worker.reporter import Reporter
from lowrank_core.worker.session import RunContext, prepare, search_bench

__all__ = ["SCHEMES", "CheaperTrial", "Curve", "benchmark", "cheaper_trials", "markdown_of", "search_curves"]

_MARKS = (1, 3, 5, 10, 20, 50, 100)
_POINTS = 24  # at which cheaper trials are compared with whole ones
_TOP_K = (16, 64)


@dataclass(frozen=True)
class Curve:
    """One search.

    Attributes:
        scheme, label: which, and in words.
        best: KL of the best trial after 1, 2, … of them, on the table's windows; None before the first that counts.
        seconds: in all.
        pruned: trials that were stopped early.
    """

    scheme: str
    label: str
    compression_ratio: float
    seed: int
    best: tuple[float | None, ...]
    seconds: float
    pruned: int


@dataclass(frozen=True)
class CheaperTrial:
    """A cheaper measurement next to the whole one, at the same points.

    Attributes:
        time_ratio: median time of the cheaper one over that of the whole one, in turns.
        agreement: Kendall's τ of the two rankings.
        same_best: whether both find the same point best.
        largest_change: largest relative difference of a value.
    """

    what: str
    compression_ratio: float
    time_ratio: float
    agreement: float
    same_best: bool
    largest_change: float


@dataclass(frozen=True)
class _Scheme:
    """``lagrangian``: whether it is among the baselines."""

    name: str
    label: str
    config: SearchConfig
    lagrangian: bool = True


def _schemes(ratio: float, trials: int) -> Iterator[_Scheme]:
    """Yield what is compared, all in the space 5x1; as published with its own objective and windows, the others by KL."""
    paper = replace(PRESETS["bolaco"].compression, value_dense=True)
    ours = replace(PRESETS["studio"].compression, basis="two_sided", stacks=False, heads=False)
    common = SearchConfig(compression_ratio=ratio, trials=trials, compression=ours)
    published = search_by(PRESETS["bolaco"], ratio)
    yield _Scheme("published", "Bolaco as published, its own factors", replace(published, trials=trials))
    yield _Scheme("published-on-ours", "Bolaco as published, on Studio's factors", replace(published, trials=trials, compression=ours))
    yield _Scheme("random", "Random kept fractions", replace(common, sampler="random"), lagrangian=False)
    yield _Scheme("kept", "Kept fractions after lagrangian, Gaussian process", common)
    around = replace(common, variables="error_weight")
    yield _Scheme("ours", "Error weights around lagrangian, Gaussian process", around)
    yield _Scheme("pruned", "The same, bad trials stopped early", replace(around, pruner="wilcoxon"))
    weighed = replace(paper, rank_multiple=1)
    pooled = replace(around, compression=weighed, error_weights=True)
    yield _Scheme("ours-on-theirs", "The same on the paper's factors, error weights measured", pooled)
    alternatives = replace(PRESETS["studio"].compression, basis="two_sided")
    yield _Scheme("studio", "The same, with stacks and heads", replace(around, compression=alternatives))


SCHEMES = tuple(scheme.name for scheme in _schemes(0.5, 1))
"""Names of what is compared, in the order of the table."""


@contextmanager
def _prepared(source: ModelSource, text: TextConfig) -> Iterator[tuple[RunContext, Reporter]]:
    with tempfile.TemporaryDirectory() as folder:
        run = create_run(RunConfig(source, text), path=Path(folder) / "run")
        reporter = Reporter(run, verbose=False)
        try:
            yield prepare(run, reporter), reporter
        finally:
            reporter.close("finished")


def benchmark(source: ModelSource, text: TextConfig, config: SearchBenchmark) -> Result:
    """Run searches side by side, and measure what a cheaper trial changes."""
    curves, cheaper = search_curves(source, text, config), cheaper_trials(source, text, config.ratios)
    windows = load_windows(text, load_model(source).tokenizer, "validation", count=text.validation_windows)
    protocol = f"KL to the dense model, nats per token, seeds 0 to {config.seeds - 1}; {windows.protocol}."
    return {
        "model": source.reference,
        "curves": [to_mapping(curve) for curve in curves],
        "cheaper": [to_mapping(row) for row in cheaper],
        "protocol": protocol,
        "text": markdown_of(curves, cheaper, protocol),
    }


def search_curves(source: ModelSource, text: TextConfig, config: SearchBenchmark) -> list[Curve]:
    """Run the schemes at every ratio with seeds from 0, on validation text.

    Raises:
        ConfigError: no such scheme.
        LowRankError: model or text can't be used, or a ratio can't be met.
    """
    unknown = sorted(set(config.schemes) - set(SCHEMES))
    if unknown:
        raise ConfigError(f"schemes must be among {', '.join(SCHEMES)}; got {unknown[0]!r}.")
    curves = []
    with _prepared(source, text) as (session, reporter):
        for ratio in config.ratios:
            for scheme in (scheme for scheme in _schemes(ratio, config.trials) if scheme.name in (config.schemes or SCHEMES)):
                bench = search_bench(session, _with_windows(scheme.config, text), reporter)
                judge = _judge(session, bench, scheme.config)
                for seed in range(config.seeds):
                    curves.append(_searched(scheme, bench, seed, judge))
                    print(json.dumps(to_mapping(curves[-1])), file=sys.stderr, flush=True)  # a line each: hours may be behind it
                print(f"{scheme.label} at {ratio:.0%}: done", file=sys.stderr, flush=True)
    return curves


def _with_windows(config: SearchConfig, text: TextConfig) -> SearchConfig:
    """Return the search with as many windows in a trial as all others of the table."""
    return config if config.projected else replace(config, selected_windows=text.validation_windows)


def _judge(session: RunContext, bench: TrialBench, config: SearchConfig) -> Callable[[TrialRecord], float | None]:
    """Return a function for the KL of a trial on the table's windows, reusing the trial's own where possible."""
    if config.projected:
        return lambda trial: trial.kl
    windows = session.windows.validation
    dense = DenseReference.compute(bench.handle, windows, batch_size=bench.batch_size)

    def judged(trial: TrialRecord) -> float:
        return _kl(replace(bench, windows=windows), allocation_from_ranks("", bench.space.units, trial.ranks), dense, False)[0]

    return judged


def _searched(scheme: _Scheme, bench: TrialBench, seed: int, judge: Callable[[TrialRecord], float | None]) -> Curve:
    config = replace(scheme.config, seed=seed)
    if not scheme.lagrangian:
        bench = replace(bench, space=replace(bench.space, curves=None))
    study = study_in_memory(config, bench.space)
    began = time.perf_counter()
    for _ in range(config.trials):
        run_trial(study, bench, config)
    seconds, result = time.perf_counter() - began, records_of(study)
    return Curve(
        scheme.name,
        scheme.label,
        config.compression_ratio,
        seed,
        _running_best(result, judge),
        seconds,
        sum(trial.state == "pruned" for trial in result),
    )


def _running_best(trials: Sequence[TrialRecord], judge: Callable[[TrialRecord], float | None]) -> tuple[float | None, ...]:
    """Return the KL of the trial that is best by its own objective after 1, 2, … of them."""
    best = [best_trial(trials[: done + 1]) for done in range(len(trials))]
    judged = {trial.number: judge(trial) for trial in best if trial is not None}
    return tuple(None if trial is None else judged[trial.number] for trial in best)


def cheaper_trials(source: ModelSource, text: TextConfig, ratios: Sequence[float]) -> list[CheaperTrial]:
    """Measure the same random points whole and in cheaper ways, in turns.

    Raises:
        LowRankError: as ``search_curves``.
    """
    rows = []
    with _prepared(source, text) as (session, reporter):
        for ratio in ratios:
            config = SearchConfig(compression_ratio=ratio, variables="error_weight", compression=_factors())
            bench = search_bench(session, config, reporter)
            points = _points(bench, config)
            for what, dense, autocast in _ways(bench):
                rows.append(_compared(what, ratio, bench, points, dense, autocast))
                print(f"{what} at {ratio:.0%}: done", file=sys.stderr, flush=True)
    return rows


def _factors() -> CompressionConfig:
    return replace(PRESETS["studio"].compression, basis="two_sided", stacks=False, heads=False)


def _ways(bench: TrialBench) -> Iterator[tuple[str, DenseReference, bool]]:
    for k in _TOP_K:
        coarse = DenseReference.compute(bench.handle, bench.windows, batch_size=bench.batch_size, top_k=k)
        yield f"KL on the {k} likeliest tokens", coarse, False
    yield "bfloat16", bench.dense, True


def _points(bench: TrialBench, config: SearchConfig) -> list[RankAllocation]:
    study = study_in_memory(replace(config, sampler="random"), bench.space, baselines=False)
    distributions: dict[str, Any] = dict(bench.space.distributions())
    return [bench.space.allocation(study.ask(distributions).params) for _ in range(_POINTS)]


def _kl(bench: TrialBench, allocation: RankAllocation, dense: DenseReference, autocast: bool) -> tuple[float, float]:
    """Return value and seconds."""
    began = time.perf_counter()
    with bench.decomposed.swapped(allocation.ranks):
        scores, _ = score_windows(bench.handle, bench.windows, batch_size=bench.batch_size, dense=dense, autocast=autocast)
    assert scores.kl is not None
    return float(scores.kl.mean()), time.perf_counter() - began


def _compared(
    what: str, ratio: float, bench: TrialBench, points: Sequence[RankAllocation], dense: DenseReference, autocast: bool
) -> CheaperTrial:
    _kl(bench, points[0], dense, autocast)  # warm
    pairs = [(_kl(bench, point, bench.dense, False), _kl(bench, point, dense, autocast)) for point in points]
    whole, cheap = ([pair[side][0] for pair in pairs] for side in (0, 1))
    times = [statistics.median(pair[side][1] for pair in pairs) for side in (0, 1)]
    return CheaperTrial(
        what,
        ratio,
        times[1] / times[0],
        float(kendalltau(whole, cheap).statistic),
        whole.index(min(whole)) == cheap.index(min(cheap)),
        max(abs(b - a) / a for a, b in zip(whole, cheap, strict=True)),
    )


def markdown_of(curves: Sequence[Curve], cheaper: Sequence[CheaperTrial], protocol: str) -> str:
    """Return a table of schemes for each ratio, one of cheaper trials, and the protocol."""
    parts = [_table(ratio, [c for c in curves if c.compression_ratio == ratio]) for ratio in sorted({c.compression_ratio for c in curves})]
    if cheaper:
        parts.append(_cheaper_table(cheaper))
    return "\n\n".join([*parts, protocol])


def _table(ratio: float, curves: Sequence[Curve]) -> str:
    trials = max(len(curve.best) for curve in curves)
    marks = [mark for mark in _MARKS if mark <= trials]
    rows = []
    for label in dict.fromkeys(curve.label for curve in curves):
        own = [curve for curve in curves if curve.label == label]
        best = {f"{mark}{' trials' * (mark == marks[-1])}": _spread([curve.best[mark - 1] for curve in own]) for mark in marks}
        seconds = statistics.median(curve.seconds / len(curve.best) for curve in own)
        stopped = statistics.median(curve.pruned for curve in own)
        named = {f"{ratio:.0%} removed: KL of the best after": label}
        rows.append({**named, **best, "seconds a trial": f"{seconds:.2f}", "stopped early": f"{stopped:g}"})
    return as_markdown(rows)


def _spread(values: Sequence[float | None]) -> str:
    """Return median (min to max) over the seeds."""
    result = [value for value in values if value is not None]
    if len(result) < len(values):
        return "–" if not result else f"– in {len(values) - len(result)} of {len(values)}"
    middle = f"{statistics.median(result):.4g}"
    return middle if min(result) == max(result) else f"{middle} ({min(result):.4g} to {max(result):.4g})"


def _cheaper_table(rows: Sequence[CheaperTrial]) -> str:
    return as_markdown(
        {
            "cheaper trial": row.what,
            "removed": f"{row.compression_ratio:.0%}",
            "time ratio": f"{row.time_ratio:.2f}",
            "Kendall's τ": f"{row.agreement:.3f}",
            "same best point": "yes" if row.same_best else "no",
            "largest change": f"{row.largest_change:.2%}",
        }
        for row in rows
    )
