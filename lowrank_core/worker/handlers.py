"""Handlers of requests: measurements (``worker.evaluations``), manual allocations, exports, healings."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lowrank_core.allocation import RankAllocation, allocation_from_ranks, unspent_words
from lowrank_core.config import ExportConfig, SearchConfig, to_mapping
from lowrank_core.config.flags import command_line, flags_of
from lowrank_core.errors import Cancelled, ConfigError, LowRankError
from lowrank_core.export import HeldOut, export, metrics_of, verify
from lowrank_core.parameters import budget_of
from lowrank_core.runs import Run, write_json
from lowrank_core.runs.client import BACKGROUND, pending_requests, request_path, result_path
from lowrank_core.search.study import TrialBench, check_rules, enqueue_allocation
from lowrank_core.statistics.directions import top_directions
from lowrank_core.studies import requests
from lowrank_core.studies.gain import gain_of
from lowrank_core.studies.model_ref import ModelRef
from lowrank_core.studies.records import MANUAL, TrialRecord, pareto_front, read_trials
from lowrank_core.studies.requests import Answer, CompareAnswer, Request, answers_of, request_of
from lowrank_core.types import Stage, silent
from lowrank_core.worker import evaluations
from lowrank_core.worker.context import WorkerContext, chosen_allocation, chosen_model, complete_trial
from lowrank_core.worker.healing import behaviour_of, export_healed, heal_allocation
from lowrank_core.worker.session import RunContext, record_curves

__all__ = ["Handler", "answer", "answer_requests", "confirm", "export_trial", "metrics_of_trial", "provenance_of", "unspent_of"]


def _measure(worker: WorkerContext, request: requests.MeasureRequest) -> requests.MeasureAnswer:
    """Queue a manual allocation; an allocator completes a partial one within the budget."""
    bench, study, config = worker.search
    check_rules(study, config)
    if request.complete:
        influence = bench.decomposed.statistics.influence
        result = bench.space.by_allocator(request.complete, config.compression_ratio, fixed=request.ranks, influence=influence)
    else:
        result = allocation_from_ranks(MANUAL, bench.space.units, request.ranks)
    enqueue_allocation(study, result.ranks, request=worker.reporter.request)
    return requests.MeasureAnswer(ranks=dict(result.ranks), compression_ratio=result.compression_ratio)


def export_trial(
    run: Run, session: RunContext, bench: TrialBench, trial: object, config: ExportConfig | None = None, stage: Stage = silent
) -> str:
    """Write the compressed model of ``trial`` under the run's exports, and return its folder; an existing one is kept."""
    config = config or ExportConfig()
    ref = ModelRef.parse(trial)
    allocation = chosen_allocation(run, bench, ref)
    folder = run.path / "exports" / config.folder_name(allocation.label)
    if not folder.exists():
        with stage("Building the compressed model", 0) as progress:
            model = bench.decomposed.compress(allocation, session.windows.calibration, progress=progress)
        number = None if ref.kind == "allocator" else complete_trial(run, ref.number).number
        provenance, figures = provenance_of(run, allocation), {} if number is None else metrics_of_trial(run, number)
        if number is not None:
            provenance["command"] = command_line("export", {"run": run.path, "trial": number, "out": folder.name, **flags_of(config)})
        test = HeldOut(run.config.text, session.windows.test)
        with stage("Writing it, and measuring what was written", 0) as progress:
            moments = session.pipeline.input_moment
            export(model, folder, provenance=provenance, config=config, figures=figures, test=test, moments=moments, progress=progress)
    return str(folder)


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
    reports = [answer.report for answer in answers_of(run, CompareAnswer) if answer.trial == number]
    return {**(metrics_of(reports[-1]) if reports else {}), **behaviour_of(run, number)}


def _export(worker: WorkerContext, request: requests.ExportRequest) -> requests.ExportAnswer:
    bench, _, _ = worker.search
    if request.healed is not None:
        path = export_healed(worker, request.healed, request.config)
    else:
        path = export_trial(worker.run, worker.session, bench, request.ref, request.config, worker.reporter.stage)
    return requests.ExportAnswer(trial=request.trial, healed=request.healed, path=path)


def _heal(worker: WorkerContext, request: requests.HealRequest) -> requests.HealAnswer:
    bench, _, _ = worker.search
    allocated = chosen_model(worker.run, worker.session, bench, request.ref)
    return heal_allocation(worker, request, allocated, provenance_of(worker.run, allocated[0]))


def _directions(worker: WorkerContext, request: requests.DirectionsRequest) -> requests.DirectionsAnswer:
    """Find the tokens that lie furthest along a module's top directions, in passes as large as the run's calibration takes them."""
    session = worker.session
    config = replace(request.config, batch_size=worker.run.config.calibration.batch_size)
    windows = session.windows.calibration
    with worker.reporter.stage("Reading the top directions", windows.first(config.windows).windows) as progress:
        return requests.DirectionsAnswer(result=top_directions(session.handle, windows, session.statistics, config, progress=progress))


def _verify(worker: WorkerContext, request: requests.VerifyRequest) -> requests.VerifyAnswer:
    """Check an export of this run and measure it again in a fresh process."""
    exports = worker.run.path / "exports"
    folder = exports / Path(request.path).name
    if folder == exports or not folder.is_dir():
        raise ConfigError(f"this run has no export {folder.name!r}. Export a trial first.")
    with worker.reporter.stage("Measuring the exported folder again"):
        result = verify(folder, device=worker.run.config.model.device, waiting=worker.reporter.check_stop)
    return requests.VerifyAnswer(path=str(folder), verification=asdict(result))


def _curves(worker: WorkerContext, request: requests.CurvesRequest) -> requests.CurvesAnswer:
    """Write the error curves of a run of an older version."""
    bench, _, config = worker.search
    return requests.CurvesAnswer(estimate=record_curves(worker.run, config, bench))


Handler = Callable[[WorkerContext, Any], Answer]
"""Takes one class of ``studies.requests``, and returns its answer."""

HANDLERS: Mapping[type[Request], Handler] = {
    requests.CompareRequest: evaluations.compare,
    requests.OtherTextRequest: evaluations.compare_on_other_text,
    requests.TokensRequest: evaluations.compare_tokens,
    requests.GenerateRequest: evaluations.generate,
    requests.BehaviourRequest: evaluations.measure_behaviours,
    requests.SpeedRequest: evaluations.compare_speeds,
    requests.CurvesRequest: _curves,
    requests.DirectionsRequest: _directions,
    requests.ExportRequest: _export,
    requests.HealRequest: _heal,
    requests.MeasureRequest: _measure,
    requests.VerifyRequest: _verify,
}


def answer_requests(worker: WorkerContext) -> bool:
    """Handle all waiting foreground requests, errors included; return whether there was one."""
    waiting = [request for request in pending_requests(worker.run) if request.get("kind") not in BACKGROUND]
    try:
        for request in waiting:
            answer(worker, request)
    finally:
        worker.last_built.clear()
    return bool(waiting)


def answer(worker: WorkerContext, request: Mapping[str, object], handlers: Mapping[type[Request], Handler] = HANDLERS) -> None:
    """Handle a request of ``pending_requests`` and write its result or error; a cancelled one gets none."""
    name, arguments = str(request["id"]), request.get("arguments")
    path = request_path(worker.run, name)
    if not path.exists():
        return
    worker.reporter.respect(path)
    try:
        _answer(worker, name, str(request.get("kind")), arguments if isinstance(arguments, Mapping) else {}, handlers)
    finally:
        worker.reporter.respect(None)


def _answer(
    worker: WorkerContext, name: str, kind: str, arguments: Mapping[str, object], handlers: Mapping[type[Request], Handler] = HANDLERS
) -> None:
    """Write the result of a request unless it was cancelled."""
    try:
        request = request_of(kind, arguments)
        body: dict[str, object] = {"ok": True, **to_mapping(handlers[type(request)](worker, request))}
    except Cancelled:
        if worker.reporter.cancelled:
            return
        body = {"ok": False, "error": "Stopped before it was done. Ask again."}
    except (LowRankError, torch.OutOfMemoryError, ValueError) as error:
        body = {"ok": False, "error": str(error) or type(error).__name__}
        print(f"warning: the request to {kind} failed: {body['error']}", file=sys.stderr, flush=True)
    write_json(result_path(worker.run, name), body | {"kind": kind, "arguments": dict(arguments), "time": time.time()})


def confirm(worker: WorkerContext) -> None:
    """Measure the best complete trials of a finished search, and its best rule, on test text, each once."""
    _, _, config = worker.search
    for trial in _worth_confirming(read_trials(worker.run), config):
        if trial.number not in {answer.trial for answer in answers_of(worker.run, CompareAnswer)} and not worker.reporter.paused:
            _answer(worker, f"{time.time_ns()}-best", CompareAnswer.kind, {"trial": trial.number})


def _worth_confirming(trials: list[TrialRecord], config: SearchConfig) -> list[TrialRecord]:
    """Return the best trials in order, with those that say what the search added; over a range points of the front, evenly spaced."""
    if config.max_ratio is None:
        complete = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
        distinct = {tuple(trial.ranks.items()): trial for trial in sorted(complete, key=lambda t: (t.value, t.number), reverse=True)}
        result = sorted(distinct.values(), key=lambda t: (t.value, t.number))[: config.confirmed]
        return [*result, *(trial for trial in gain_of(trials, config).rivals if result and trial not in result)]
    front = pareto_front(trials)
    count = min(config.confirmed, len(front))
    return [front[round(index * (len(front) - 1) / max(1, count - 1))] for index in range(count)]
