"""Handlers of requests: measurements (``worker.evaluations``), manual allocations, exports, healings."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from types import MappingProxyType

import torch

from lowrank_core.allocation import RankAllocation, allocation_from_ranks, unspent_words
from lowrank_core.config import ExportConfig, SearchConfig, from_mapping
from lowrank_core.config.directions import DirectionsConfig
from lowrank_core.config.flags import command_line, flags_of
from lowrank_core.errors import Cancelled, ConfigError, LowRankError
from lowrank_core.export import HeldOut, export, metrics_of, verify
from lowrank_core.parameters import budget_of
from lowrank_core.runs import Run, write_json
from lowrank_core.runs.client import BACKGROUND, pending_requests, request_path, result_path, results_of
from lowrank_core.search.study import TrialBench, check_rules, enqueue_allocation
from lowrank_core.statistics.directions import top_directions
from lowrank_core.studies.model_ref import ModelRef
from lowrank_core.studies.records import MANUAL, TrialRecord, pareto_front, read_trials
from lowrank_core.types import Progress
from lowrank_core.worker import evaluations
from lowrank_core.worker.context import WorkerContext, chosen_allocation, chosen_model, complete_trial
from lowrank_core.worker.healing import export_healed, heal_allocation, healing_config
from lowrank_core.worker.reporter import Reporter
from lowrank_core.worker.session import RunContext, record_curves

__all__ = ["Kind", "answer", "answer_requests", "confirm", "export_trial", "metrics_of_trial", "provenance_of", "unspent_of"]

Answer = dict[str, object]


def _measure(worker: WorkerContext, arguments: Mapping[str, object]) -> Answer:
    """Queue a manual allocation; an allocator completes a partial one within the budget."""
    bench, study, config = worker.search
    check_rules(study, config)
    ranks, allocator = arguments.get("ranks"), arguments.get("complete")
    if not isinstance(ranks, Mapping) or not all(rank is None or type(rank) is int for rank in ranks.values()):
        raise ConfigError("an allocation maps unit names to whole ranks, or to null for dense.")
    if allocator:
        result = bench.space.by_allocator(
            str(allocator), config.compression_ratio, fixed=dict(ranks), influence=bench.decomposed.statistics.influence
        )
    else:
        result = allocation_from_ranks(MANUAL, bench.space.units, dict(ranks))
    enqueue_allocation(study, result.ranks, request=str(arguments.get("id", "")))
    return {"ranks": dict(result.ranks), "compression_ratio": result.compression_ratio}


def export_trial(
    run: Run, session: RunContext, bench: TrialBench, trial: object, config: ExportConfig | None = None, reporter: Reporter | None = None
) -> str:
    """Write the compressed model of ``trial`` under the run's exports, and return its folder; an existing one is kept."""
    config = config or ExportConfig()
    ref = ModelRef.parse(trial)
    allocation = chosen_allocation(run, bench, ref)
    folder = run.path / "exports" / config.folder_name(allocation.label)
    if not folder.exists():
        with _told(reporter, "Building the compressed model") as progress:
            model = bench.decomposed.compress(allocation, session.windows.calibration, progress=progress)
        number = None if ref.kind == "allocator" else complete_trial(run, ref.number).number
        provenance = provenance_of(run, allocation) | ({} if number is None else {"command": _command(run, number, folder.name, config)})
        figures = {} if number is None else metrics_of_trial(run, number)
        test = HeldOut(run.config.text, session.windows.test)
        with _told(reporter, "Writing it, and measuring what was written") as progress:
            export(model, folder, provenance=provenance, config=config, figures=figures, test=test, progress=progress)
    return str(folder)


def _told(reporter: Reporter | None, stage: str) -> AbstractContextManager[Progress | None]:
    return nullcontext() if reporter is None else reporter.stage(stage)


def _command(run: Run, number: int, out: str, config: ExportConfig) -> str:
    return command_line("export", {"run": run.path, "trial": number, "out": out, **flags_of(config)})


def provenance_of(run: Run, allocation: RankAllocation) -> dict[str, object]:
    """Return the provenance of a trial's model."""
    config = run.config
    assert config.search is not None
    made = {"run": run.id, "allocation": allocation.label, "text": config.text.reference, "seed": config.text.seed}
    return {**made, **asdict(config.search.compression), "warnings": list(unspent_of(config.search, allocation))}


def unspent_of(search: SearchConfig, allocation: RankAllocation) -> tuple[str, ...]:
    """Return a note where rounding left part of the search's budget; nothing over a range of ratios."""
    if search.max_ratio is not None:
        return ()
    ratio, dense = search.compression_ratio, allocation.dense_parameters
    return unspent_words(budget_of(dense, ratio), allocation.parameters, dense, ratio, search.compression.rank_multiple)


def metrics_of_trial(run: Run, number: int) -> dict[str, object]:
    """Return a trial's test measurements, if any, for its model card."""
    result = [body["report"] for body in results_of(run, "compare") if body.get("trial") == number]
    return metrics_of(result[-1]) if result else {}


def _export(worker: WorkerContext, arguments: Mapping[str, object]) -> Answer:
    bench, _, _ = worker.search
    config = from_mapping(ExportConfig, {f.name: arguments[f.name] for f in fields(ExportConfig) if f.name in arguments})
    healed, trial = arguments.get("healed"), arguments.get("trial")
    if healed is not None:
        return {"healed": healed, "trial": trial, "path": export_healed(worker, str(healed), config)}
    return {"trial": trial, "path": export_trial(worker.run, worker.session, bench, trial, config, worker.reporter)}


def _heal(worker: WorkerContext, arguments: Mapping[str, object]) -> Answer:
    bench, _, _ = worker.search
    config, trial = healing_config(arguments), arguments.get("trial")
    allocated = chosen_model(worker.run, worker.session, bench, trial)
    how = provenance_of(worker.run, allocated[0])
    return {"trial": trial, **heal_allocation(worker, allocated, config, how)}


def _directions(worker: WorkerContext, arguments: Mapping[str, object]) -> Answer:
    """Find the tokens that lie furthest along a module's top directions."""
    session, calibration = worker.session, worker.run.config.calibration
    chosen = {f.name: arguments[f.name] for f in fields(DirectionsConfig) if f.name in arguments}
    config = from_mapping(DirectionsConfig, {"batch_size": calibration.batch_size, **chosen})
    windows = session.windows.calibration
    with worker.reporter.stage("Reading the top directions", windows.first(config.windows).windows) as progress:
        result = top_directions(session.handle, windows, session.statistics, config, progress=progress)
    return result.to_mapping()


def _verify(worker: WorkerContext, arguments: Mapping[str, object]) -> Answer:
    """Check an export of this run and measure it again in a fresh process."""
    exports = worker.run.path / "exports"
    folder = exports / Path(str(arguments.get("path", ""))).name
    if folder == exports or not folder.is_dir():
        raise ConfigError(f"this run has no export {folder.name!r}. Export a trial first.")
    with worker.reporter.stage("Measuring the exported folder again"):
        result = verify(folder, device=worker.run.config.model.device, waiting=worker.reporter.check_stop)
    return {"path": str(folder), "verification": asdict(result)}


def _curves(worker: WorkerContext, arguments: Mapping[str, object]) -> Answer:
    """Write the error curves of a run of an older version."""
    bench, _, config = worker.search
    return {"estimate": record_curves(worker.run, config, bench)}


Kind = Callable[[WorkerContext, Mapping[str, object]], Answer]
"""Kind of a request -> handler."""

_KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        **evaluations.KINDS,
        "curves": _curves,
        "directions": _directions,
        "export": _export,
        "heal": _heal,
        "measure": _measure,
        "verify": _verify,
    }
)


def answer_requests(worker: WorkerContext) -> bool:
    """Handle all waiting foreground requests, errors included; return whether there was one."""
    waiting = [request for request in pending_requests(worker.run) if request.get("kind") not in BACKGROUND]
    try:
        for request in waiting:
            answer(worker, request)
    finally:
        worker.last_built.clear()
    return bool(waiting)


def answer(worker: WorkerContext, request: Mapping[str, object], kinds: Mapping[str, Kind] | None = None) -> None:
    """Handle a request and write its result or error; a cancelled one gets none."""
    name, arguments = str(request["id"]), request.get("arguments")
    path = request_path(worker.run, name)
    if not path.exists():
        return
    worker.reporter.respect(path)
    try:
        _answer(worker, name, str(request.get("kind")), arguments if isinstance(arguments, Mapping) else {}, kinds)
    finally:
        worker.reporter.respect(None)


def _answer(
    worker: WorkerContext, request: str, kind: str, arguments: Mapping[str, object], kinds: Mapping[str, Kind] | None = None
) -> None:
    """Write the result of a request unless it was cancelled."""
    kinds = _KINDS if kinds is None else kinds
    try:
        if kind not in kinds:
            raise ConfigError(f"no request is called {kind!r}; there are {', '.join(kinds)}.")
        body: Answer = {"ok": True, **kinds[kind](worker, {**arguments, "id": request})}
    except Cancelled:
        if worker.reporter.cancelled:
            return
        body = {"ok": False, "error": "Stopped before it was done. Ask again."}
    except (LowRankError, torch.OutOfMemoryError, ValueError) as error:
        body = {"ok": False, "error": str(error) or type(error).__name__}
    body |= {"kind": kind, "arguments": dict(arguments), "time": time.time()}
    write_json(result_path(worker.run, request), body)


def confirm(worker: WorkerContext) -> None:
    """Measure the best complete trials of a finished search on test text, each once."""
    _, _, config = worker.search
    for trial in _worth_confirming(read_trials(worker.run), config):
        if trial.number not in _compared(worker.run) and not worker.reporter.paused:
            _answer(worker, f"{time.time_ns()}-best", "compare", {"trial": trial.number})


def _worth_confirming(trials: list[TrialRecord], config: SearchConfig) -> list[TrialRecord]:
    """Return the best trials in order; over a range of ratios points of the Pareto front, evenly spaced."""
    if config.max_ratio is None:
        complete = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
        distinct = {tuple(trial.ranks.items()): trial for trial in sorted(complete, key=lambda t: (t.value, t.number), reverse=True)}
        return sorted(distinct.values(), key=lambda t: (t.value, t.number))[: config.confirmed]
    front = pareto_front(trials)
    count = min(config.confirmed, len(front))
    return [front[round(index * (len(front) - 1) / max(1, count - 1))] for index in range(count)]


def _compared(run: Run) -> set[object]:
    return {body.get("trial") for body in results_of(run, "compare")}
