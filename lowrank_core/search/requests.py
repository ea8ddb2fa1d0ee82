"""Answers to what users ask of a worker: measure a trial on test text or an allocation of their own, continue a prompt, export."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType

import optuna
import torch

from lowrank_core.allocation import ALLOCATORS, RankAllocation, allocation_from_ranks
from lowrank_core.compression import CompressedModel
from lowrank_core.config import ExportConfig, SearchConfig, from_mapping
from lowrank_core.errors import Cancelled, ConfigError, LowRankError
from lowrank_core.evaluation import evaluate
from lowrank_core.export import HeldOut, export, figures_of, verify
from lowrank_core.generation import continue_prompt
from lowrank_core.jobs import TEMPERATURE, pending_requests
from lowrank_core.runs import Run, read_json, write_json
from lowrank_core.search.healed import heal_allocation, healing_config
from lowrank_core.search.records import MANUAL, TrialRecord, best_trial, pareto_front, read_trials
from lowrank_core.search.reporter import Reporter
from lowrank_core.search.session import Session, record_curves
from lowrank_core.search.study import TrialBench, enqueue_allocation

__all__ = ["Desk", "answer_requests", "chosen_model", "complete_trial", "confirm", "export_trial", "figures_of_trial", "provenance_of"]

Answer = dict[str, object]


@dataclass(frozen=True)
class Desk:
    """What a worker answers with: the run and what it holds ready; ``bench`` and ``study`` are None where nothing is searched."""

    run: Run
    session: Session
    reporter: Reporter
    bench: TrialBench | None = None
    study: optuna.Study | None = None

    @property
    def search(self) -> tuple[TrialBench, optuna.Study, SearchConfig]:
        """Return what a search has.

        Raises:
            ConfigError: nothing is searched.
        """
        config = self.run.config.search
        if self.bench is None or self.study is None or config is None:
            raise ConfigError("this run only analyses the model. Start a rank search first.")
        return self.bench, self.study, config


def complete_trial(run: Run, number: int | None) -> TrialRecord:
    """Return trial ``number``, or the best one.

    Raises:
        ConfigError: it is not complete.
    """
    trials = read_trials(run)
    search = run.config.search
    if number is None and search is not None and search.most_ratio is not None:
        front = ", ".join(str(trial.number) for trial in pareto_front(trials))
        raise ConfigError(
            f"a search over a range of ratios has no single best trial. Choose one of its Pareto front: {front or 'none yet'}."
        )
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
        return bench.space.by_allocator(trial, bench.space.compression_ratio, influence=bench.decomposed.statistics.influence)
    if trial is not None and trial != "best" and type(trial) is not int:
        raise ConfigError(f"trial must be a number, `best` or one of {', '.join(ALLOCATORS)}; got {trial!r}.")
    record = complete_trial(run, trial if type(trial) is int else None)
    config = run.config.search
    single = config is not None and config.most_ratio is None
    # Only a rule at the one ratio of the search is known by its name; a second hand-picked trial would pass for the first.
    label = record.label if single and record.label in ALLOCATORS else f"trial {record.number}"
    return allocation_from_ranks(label, bench.space.units, record.ranks)


def chosen_model(run: Run, session: Session, bench: TrialBench, trial: object) -> tuple[RankAllocation, CompressedModel]:
    """Return what ``trial`` (a number, None or ``best``, or an allocator's name) allocates, and the model compressed so.

    Raises:
        ConfigError: there is no such trial.
    """
    allocation = _chosen_allocation(run, bench, trial)
    return allocation, bench.decomposed.compress(allocation, session.windows.calibration)


def _compare(desk: Desk, arguments: Mapping[str, object]) -> Answer:
    bench, _, _ = desk.search
    session, trial = desk.session, arguments.get("trial")
    allocation, model = chosen_model(desk.run, session, bench, trial)
    test = session.windows.test
    with desk.reporter.stage(f"Measuring {allocation.allocator} on test text", test.windows) as progress:
        report = evaluate(model.handle, test, against=session.handle, batch_size=bench.batch_size, progress=progress)
    return {"trial": trial, "label": allocation.allocator, "ranks": dict(allocation.ranks), "report": report.to_mapping()}


def _generate(desk: Desk, arguments: Mapping[str, object]) -> Answer:
    bench, _, _ = desk.search
    session, trial, prompt = desk.session, arguments.get("trial"), str(arguments.get("prompt", ""))
    tokens, seed = int(str(arguments.get("tokens", 64))), int(str(arguments.get("seed", 0)))
    temperature = float(str(arguments.get("temperature", TEMPERATURE)))
    allocation, model = chosen_model(desk.run, session, bench, trial)
    with desk.reporter.stage("Continuing the prompt"):
        texts = {
            "dense_text": continue_prompt(session.handle, prompt, tokens=tokens, seed=seed, temperature=temperature),
            "compressed_text": continue_prompt(model.handle, prompt, tokens=tokens, seed=seed, temperature=temperature),
        }
    chosen = {"prompt": prompt, "tokens": tokens, "seed": seed, "temperature": temperature}
    return {"trial": trial, "label": allocation.allocator, **chosen, **texts}


def _measure(desk: Desk, arguments: Mapping[str, object]) -> Answer:
    """Put a hand-picked allocation in line; a partial one is completed by an allocator within the budget."""
    bench, study, config = desk.search
    ranks, allocator = arguments.get("ranks"), arguments.get("complete")
    if not isinstance(ranks, Mapping) or not all(rank is None or type(rank) is int for rank in ranks.values()):
        raise ConfigError("an allocation maps unit names to whole ranks, or to null for dense.")
    if allocator:
        found = bench.space.by_allocator(
            str(allocator), config.compression_ratio, fixed=dict(ranks), influence=bench.decomposed.statistics.influence
        )
    else:
        found = allocation_from_ranks(MANUAL, bench.space.units, dict(ranks))
    enqueue_allocation(study, found.ranks, request=str(arguments.get("id", "")))
    return {"ranks": dict(found.ranks), "compression_ratio": found.compression_ratio}


def export_trial(run: Run, session: Session, bench: TrialBench, trial: object, config: ExportConfig | None = None) -> str:
    """Write the compressed model of ``trial`` under the run's exports, and return its folder; one that is there is kept."""
    config = config or ExportConfig()
    allocation = _chosen_allocation(run, bench, trial)
    words = [allocation.allocator, *(value for value, usual in _choices(config) if value != usual)]
    folder = run.path / "exports" / "-".join(words).replace(" ", "-")
    if not folder.exists():
        model = bench.decomposed.compress(allocation, session.windows.calibration)
        number = complete_trial(run, trial if type(trial) is int else None).number if trial not in ALLOCATORS else None
        command = shlex.join(["lowrank", "export", "--run", str(run.path), "--trial", str(number), "--out", folder.name])
        provenance = provenance_of(run, allocation) | ({} if number is None else {"command": command})
        figures = {} if number is None else figures_of_trial(run, number)
        test = HeldOut(run.config.text, session.windows.test)
        export(model, folder, provenance=provenance, config=config, figures=figures, test=test)
    return str(folder)


def _choices(config: ExportConfig) -> list[tuple[str, str]]:
    """Return what tells the folders of one trial apart, beside what is usual."""
    return [
        (config.form, "compressed"),
        ("with-code" if config.with_code else "", ""),
        (config.dtype, "auto"),
        (config.quantization, "none"),
    ]


def provenance_of(run: Run, allocation: RankAllocation) -> dict[str, object]:
    """Return how a trial's model was made, for its folder."""
    config = run.config
    assert config.search is not None
    made = {"run": run.id, "allocation": allocation.allocator, "text": config.text.reference, "seed": config.text.seed}
    return {**made, **asdict(config.search.compression)}


def figures_of_trial(run: Run, number: int) -> dict[str, object]:
    """Return what was measured of a trial on test text, if it was: for its folder's card."""
    bodies = [read_json(path) or {} for path in sorted((run.path / "results").glob("[0-9]*.json"))]
    found = [body["report"] for body in bodies if body.get("kind") == "compare" and body.get("ok") and body.get("trial") == number]
    return figures_of(found[-1]) if found else {}


def _export(desk: Desk, arguments: Mapping[str, object]) -> Answer:
    bench, _, _ = desk.search
    config = from_mapping(ExportConfig, {f.name: arguments[f.name] for f in fields(ExportConfig) if f.name in arguments})
    with desk.reporter.stage("Writing the compressed model"):
        path = export_trial(desk.run, desk.session, bench, arguments.get("trial"), config)
    return {"trial": arguments.get("trial"), "path": path}


def _heal(desk: Desk, arguments: Mapping[str, object]) -> Answer:
    bench, _, _ = desk.search
    config, trial = healing_config(arguments), arguments.get("trial")
    allocated = chosen_model(desk.run, desk.session, bench, trial)
    how = provenance_of(desk.run, allocated[0])
    return {"trial": trial, **heal_allocation(desk.run, desk.session, desk.reporter, allocated, config, how)}


def _verify(desk: Desk, arguments: Mapping[str, object]) -> Answer:
    """Check an export of this run, and measure it again in a fresh process."""
    exports = desk.run.path / "exports"
    folder = exports / Path(str(arguments.get("path", ""))).name
    if folder == exports or not folder.is_dir():
        raise ConfigError(f"this run has no export {folder.name!r}. Export a trial first.")
    with desk.reporter.stage("Measuring the exported folder again"):
        found = verify(folder, device=desk.run.config.model.device)
    return {"path": str(folder), "verification": asdict(found)}


def _curves(desk: Desk, arguments: Mapping[str, object]) -> Answer:
    """Write the error curves, for a run of an older version; a worker of this one has, as it began."""
    bench, _, config = desk.search
    return {"estimate": record_curves(desk.run, config, bench)}


_KINDS: Mapping[str, Callable[[Desk, Mapping[str, object]], Answer]] = MappingProxyType(
    {
        "compare": _compare,
        "generate": _generate,
        "export": _export,
        "measure": _measure,
        "verify": _verify,
        "heal": _heal,
        "curves": _curves,
    }
)


def answer_requests(desk: Desk) -> bool:
    """Answer every waiting request, errors included; return whether there was one."""
    waiting = pending_requests(desk.run)
    for request in waiting:
        arguments = request.get("arguments")
        _answer(desk, str(request["id"]), str(request.get("kind")), arguments if isinstance(arguments, Mapping) else {})
    return bool(waiting)


def _answer(desk: Desk, request: str, kind: str, arguments: Mapping[str, object]) -> None:
    try:
        if kind not in _KINDS:
            raise ConfigError(f"no request is called {kind!r}; there are {', '.join(_KINDS)}.")
        answer: Answer = {"ok": True, **_KINDS[kind](desk, {**arguments, "id": request})}
    except Cancelled:
        answer = {"ok": False, "error": "Stopped before it was done. Ask again."}
    except (LowRankError, torch.OutOfMemoryError, ValueError) as error:
        answer = {"ok": False, "error": str(error) or type(error).__name__}
    answer |= {"kind": kind, "arguments": dict(arguments), "time": time.time()}
    write_json(desk.run.path / "results" / f"{request}.json", answer)


def confirm(desk: Desk) -> None:
    """Measure the best complete trials of a finished search on test text, as if a user had asked; each only once."""
    _, _, config = desk.search
    for trial in _worth_confirming(read_trials(desk.run), config):
        if trial.number not in _compared(desk.run) and not desk.reporter.paused:
            _answer(desk, f"{time.time_ns()}-best", "compare", {"trial": trial.number})


def _worth_confirming(trials: list[TrialRecord], config: SearchConfig) -> list[TrialRecord]:
    """Return the best trials, the best first; over a range of ratios some of the Pareto front, evenly spaced."""
    if config.most_ratio is None:
        complete = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
        distinct = {tuple(trial.ranks.items()): trial for trial in sorted(complete, key=lambda t: (t.value, t.number), reverse=True)}
        return sorted(distinct.values(), key=lambda t: (t.value, t.number))[: config.confirmed]
    front = pareto_front(trials)
    count = min(config.confirmed, len(front))
    return [front[round(index * (len(front) - 1) / max(1, count - 1))] for index in range(count)]


def _compared(run: Run) -> set[object]:
    bodies = (read_json(path) or {} for path in (run.path / "results").glob("[0-9]*.json"))
    return {body.get("trial") for body in bodies if body.get("kind") == "compare" and body.get("ok")}
