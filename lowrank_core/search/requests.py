"""Answers to what users ask of a worker: measure a trial on test text, continue a prompt, export."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from lowrank_core.allocation import ALLOCATORS, RankAllocation, allocation_from_ranks
from lowrank_core.compression import CompressedModel
from lowrank_core.errors import Cancelled, ConfigError, LowRankError
from lowrank_core.evaluation import evaluate
from lowrank_core.export import export
from lowrank_core.generation import continue_prompt
from lowrank_core.jobs import TEMPERATURE, pending_requests
from lowrank_core.runs import Run, write_json
from lowrank_core.search.records import TrialRecord, best_trial, read_trials
from lowrank_core.search.reporter import Reporter
from lowrank_core.search.session import Session
from lowrank_core.search.study import TrialBench

__all__ = ["answer_requests", "chosen_model", "complete_trial", "export_trial"]

Answer = dict[str, object]


def complete_trial(run: Run, number: int | None) -> TrialRecord:
    """Return trial ``number``, or the best one.

    Raises:
        ConfigError: it is not complete.
    """
    trials = read_trials(run)
    if number is None:
        best = best_trial(trials)
        if best is None:
            raise ConfigError("no trial of this run is complete yet. Wait for one, or resume the search.")
        return best
    chosen = next((trial for trial in trials if trial.number == number), None)
    if chosen is None or chosen.state != "complete":
        raise ConfigError(
            f"trial {number} of this run is not complete; it has {sum(t.state == 'complete' for t in trials)} complete trials."
        )
    return chosen


def _chosen_allocation(run: Run, bench: TrialBench, trial: object) -> RankAllocation:
    """Return the allocation of ``trial``: a number, None or ``best``, or an allocator's name.

    Raises:
        ConfigError: there is no such trial.
    """
    if isinstance(trial, str) and trial in ALLOCATORS:
        return bench.decomposed.allocate(trial, bench.space.compression_ratio)
    if trial is not None and trial != "best" and type(trial) is not int:
        raise ConfigError(f"trial must be a number, `best` or one of {', '.join(ALLOCATORS)}; got {trial!r}.")
    record = complete_trial(run, trial if type(trial) is int else None)
    label = f"trial {record.number}" if record.label == "sampled" else record.label
    return allocation_from_ranks(label, bench.space.units, record.ranks)


def chosen_model(run: Run, session: Session, bench: TrialBench, trial: object) -> tuple[RankAllocation, CompressedModel]:
    """Return what ``trial`` (a number, None or ``best``, or an allocator's name) allocates, and the model compressed so.

    Raises:
        ConfigError: there is no such trial.
    """
    allocation = _chosen_allocation(run, bench, trial)
    return allocation, bench.decomposed.compress(allocation, session.windows.calibration)


def _compare(run: Run, session: Session, bench: TrialBench, arguments: Mapping[str, object], reporter: Reporter) -> Answer:
    allocation, model = chosen_model(run, session, bench, arguments.get("trial"))
    with reporter.stage(f"Measuring {allocation.allocator} on test text", session.windows.test.windows) as progress:
        report = evaluate(model.handle, session.windows.test, against=session.handle, batch_size=bench.batch_size, progress=progress)
    return {"trial": arguments.get("trial"), "label": allocation.allocator, "ranks": dict(allocation.ranks), "report": report.to_mapping()}


def _generate(run: Run, session: Session, bench: TrialBench, arguments: Mapping[str, object], reporter: Reporter) -> Answer:
    prompt = str(arguments.get("prompt", ""))
    tokens, seed = int(str(arguments.get("tokens", 64))), int(str(arguments.get("seed", 0)))
    temperature = float(str(arguments.get("temperature", TEMPERATURE)))
    allocation, model = chosen_model(run, session, bench, arguments.get("trial"))
    with reporter.stage("Continuing the prompt"):
        texts = {
            "dense_text": continue_prompt(session.handle, prompt, tokens=tokens, seed=seed, temperature=temperature),
            "compressed_text": continue_prompt(model.handle, prompt, tokens=tokens, seed=seed, temperature=temperature),
        }
    chosen = {"prompt": prompt, "tokens": tokens, "seed": seed, "temperature": temperature}
    return {"trial": arguments.get("trial"), "label": allocation.allocator, **chosen, **texts}


def export_trial(run: Run, session: Session, bench: TrialBench, trial: object) -> str:
    """Write the compressed model of ``trial`` under the run's exports, and return its folder; one that is there is kept."""
    allocation = _chosen_allocation(run, bench, trial)
    folder = run.path / "exports" / allocation.allocator.replace(" ", "-")
    if not folder.exists():
        model = bench.decomposed.compress(allocation, session.windows.calibration)
        export(model, folder, provenance={"run": run.id, "basis": _basis(run), "allocation": allocation.allocator})
    return str(folder)


def _basis(run: Run) -> str:
    search = run.config.search
    return search.compression.basis if search else ""


def _export(run: Run, session: Session, bench: TrialBench, arguments: Mapping[str, object], reporter: Reporter) -> Answer:
    with reporter.stage("Writing the compressed model"):
        return {"trial": arguments.get("trial"), "path": export_trial(run, session, bench, arguments.get("trial"))}


_KINDS: Mapping[str, Callable[[Run, Session, TrialBench, Mapping[str, object], Reporter], Answer]] = MappingProxyType(
    {"compare": _compare, "generate": _generate, "export": _export}
)


def answer_requests(run: Run, session: Session, bench: TrialBench | None, reporter: Reporter) -> bool:
    """Answer every waiting request, errors included; return whether there was one."""
    waiting = pending_requests(run)
    for request in waiting:
        kind, arguments = str(request.get("kind")), request.get("arguments")
        arguments = arguments if isinstance(arguments, Mapping) else {}
        try:
            if bench is None:
                raise ConfigError("this run only analyses the model. Start a rank search first.")
            if kind not in _KINDS:
                raise ConfigError(f"no request is called {kind!r}; there are {', '.join(_KINDS)}.")
            answer: Answer = {"ok": True, **_KINDS[kind](run, session, bench, arguments, reporter)}
        except Cancelled:
            answer = {"ok": False, "error": "Stopped before it was done. Ask again."}
        except (LowRankError, torch.OutOfMemoryError, ValueError) as error:
            answer = {"ok": False, "error": str(error) or type(error).__name__}
        answer |= {"kind": kind, "arguments": dict(arguments), "time": time.time()}
        write_json(run.path / "results" / f"{request['id']}.json", answer)
    return bool(waiting)
