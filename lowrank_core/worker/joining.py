"""Further workers of a study: on this machine through the run directory, on others through the database that holds the study.

A worker that joins prepares model, text, statistics and factors itself, or reads the statistics where they are stored, and refuses to
measure anything if they are not those of the study.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace

import optuna

from lowrank_core.config import RunConfig, SearchConfig, from_mapping, to_mapping
from lowrank_core.config.mapping import build
from lowrank_core.errors import ConfigError, RunError
from lowrank_core.runs import Run, home, write_json
from lowrank_core.search.samplers import phase
from lowrank_core.search.selection import Selection
from lowrank_core.search.study import TrialBench, completed_trials, equip, running_trials, trials_left, waiting_trials
from lowrank_core.studies.storage import open_database, open_storage, redacted
from lowrank_core.worker.identity import JOIN, RunIdentity
from lowrank_core.worker.main import TrialRunner
from lowrank_core.worker.reporter import Reporter
from lowrank_core.worker.session import fingerprint, prepare, search_bench

__all__ = ["join_run", "run_of_study"]

_POLL_SECONDS = 0.5


def run_of_study(url: str, study_name: str, *, model: str | None = None, text: str | None = None, device: str | None = None) -> Run:
    """Return a local run directory for a study in a database, with its config.

    Args:
        model, text, device: where they are on this machine, if not where the study's first worker had them.

    Raises:
        ConfigError: the database can't be reached, or has no such study of ours.
    """
    storage = open_database(url)
    try:
        study = optuna.load_study(study_name=study_name, storage=storage)
        config = from_mapping(RunConfig, json.loads(study.user_attrs["run"]))
    except KeyError as error:
        names = ", ".join(sorted(optuna.get_all_study_names(storage))) or "none"
        raise ConfigError(
            f"{redacted(url)} has no study {study_name!r} that a search has begun; there are: {names}. "
            "Begin it with `lowrank search --storage-url`."
        ) from error
    source = replace(config.model, reference=model or config.model.reference, device=device or config.model.device)
    config = replace(config, model=source, text=replace(config.text, reference=text or config.text.reference))
    run = Run(home() / "joined" / re.sub(r"[^\w.-]|^\.+", "_", study_name))
    record = {"id": study_name, "name": study_name, "kind": "search", "created": time.time(), "config": to_mapping(config)}
    write_json(run.path / "run.json", {**record, "versions": {}, "recorded": False})
    run.keep_study_at(url, study_name)
    return run


def join_run(run: Run, *, warm_seconds: float = 0.0, verbose: bool = True) -> int:
    """Run trials of the study of ``run`` until none are left, wait ``warm_seconds`` for more; return their number.

    Raises:
        RunError: nobody has begun the search.
        ConfigError: this worker's model, text or statistics are not the study's; says which.
        LowRankError: as ``run_worker``.
        Cancelled: the search was stopped while this worker prepared.
    """
    run.refuse_if_recorded()
    reporter = Reporter(run, verbose=verbose, leads=False)
    try:
        study = _begun(run, reporter)
        session = prepare(run, reporter, leads=False)
        body = json.loads(study.user_attrs.get("selection", "null"))
        known = None if body is None else build(Selection, body, "the selection of the study")
        bench = search_bench(session, _wanted(study), reporter, selection=known)
        RunIdentity.of(run, JOIN).check(fingerprint(session, bench))
        return _take_trials(run, study, bench, reporter, warm_seconds)
    finally:
        reporter.close("finished")


def _begun(run: Run, reporter: Reporter) -> optuna.Study:
    """Wait for the study to start, and return it."""
    with reporter.stage("Waiting for the first worker"):
        while True:
            reporter.check_stop()
            try:
                study = optuna.load_study(study_name=run.study_name, storage=open_storage(run))
                if "search" in study.user_attrs:
                    return study
            except KeyError:
                pass
            if run.storage_url is None and not run.worker_alive():
                raise RunError(f"nobody works on {run.path}, so there is nothing to join. Begin with `lowrank worker --run {run.path}`.")
            time.sleep(_POLL_SECONDS)


def _wanted(study: optuna.Study) -> SearchConfig:
    """Return the search as its first worker runs it now."""
    return from_mapping(SearchConfig, json.loads(study.user_attrs["search"]))


def _take_trials(run: Run, study: optuna.Study, bench: TrialBench, reporter: Reporter, warm_seconds: float) -> int:
    measured, runner, last = 0, TrialRunner(study, bench), time.monotonic()
    config: SearchConfig | None = None
    while True:
        wanted, paused = _wanted(study), bool(study.user_attrs.get("paused")) or reporter.paused
        if wanted != config:
            config = wanted
            equip(study, config, bench.space)
        done, left = completed_trials(study), trials_left(study, config)
        free = left > running_trials(study) or waiting_trials(study) > 0
        if free and not paused:
            reporter.say(state="running", stage=f"Searching ({phase(config, done)})", done=measured, total=0)
            runner.run(config)
            measured, last = measured + 1, time.monotonic()
            continue
        if not left and time.monotonic() - last > warm_seconds:
            return measured
        if paused and time.monotonic() - last > max(warm_seconds, _POLL_SECONDS):
            return measured
        reporter.say(state="idle", stage="", done=measured, total=0)
        time.sleep(_POLL_SECONDS)
