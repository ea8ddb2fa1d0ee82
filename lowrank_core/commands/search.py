"""Commands around a search: start, resume, queue an allocation, export a trial."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lowrank_core.allocation import RULES, allocation_from_ranks, read_allocation, unspent_parameters
from lowrank_core.commands.shared import Stages, estimate_result, reported
from lowrank_core.compression.estimate import TimedPieces
from lowrank_core.compression.pipeline import Pipeline
from lowrank_core.config import CalibrationConfig, ExportConfig, ModelSource, RunConfig, SearchConfig, TextConfig, check_choice
from lowrank_core.coverage import Coverage
from lowrank_core.errors import Cancelled, ConfigError, LowRankError
from lowrank_core.export import check_form, check_free, check_precision, export, held_out
from lowrank_core.export.card import written_words
from lowrank_core.export.manifest import report_of
from lowrank_core.metrics import metric_of
from lowrank_core.parameters import Unit
from lowrank_core.runs import JsonMapping, Run, client, create_run, open_run
from lowrank_core.runs.stage_times import TimeEstimate, stages_of
from lowrank_core.studies.gain import extension, flat_words, search_gain
from lowrank_core.studies.naming import model_name, trial_label
from lowrank_core.studies.published import ALLOCATIONS, POOL_RATIO
from lowrank_core.studies.records import MANUAL, TrialRecord, best_trial, counts_of, pareto_front, read_trials
from lowrank_core.studies.requests import CompareAnswer, MeasureRequest, answers_of
from lowrank_core.studies.storage import open_database
from lowrank_core.types import Result
from lowrank_core.worker.context import complete_trial
from lowrank_core.worker.handlers import export_trial, metrics_of_trial, provenance_of, unspent_of
from lowrank_core.worker.identity import EXPORT, RunIdentity, identity_of_factors, identity_of_model, identity_of_texts
from lowrank_core.worker.joining import join_run
from lowrank_core.worker.main import run_worker

__all__ = ["SearchPlace", "enqueue", "estimate", "export_from", "join", "search_in", "work"]

_FRONT = "Pareto front, on validation text:"


@dataclass(frozen=True)
class SearchPlace:
    """Location and workers of a search.

    Attributes:
        folder: new folder for the run.
        storage_url: of a database that other machines reach; None keeps the study in the folder.
        workers: processes on this machine.
        ranks: file of a manual allocation that is measured first.
        complete: allocator that completes it.
    """

    folder: Path
    storage_url: str | None = None
    workers: int = 1
    ranks: Path | None = None
    complete: str | None = None


def _figures(trial: TrialRecord, coverage: Coverage) -> Result:
    ratio = trial.compression_ratio
    figures = {"trial": trial.number, "label": trial.label, "value": trial.value, "kl": trial.kl, "perplexity": trial.perplexity}
    return {**figures, "compression_ratio": ratio, "model_compression_ratio": None if ratio is None else coverage.of_model(ratio)}


def search_in(
    source: ModelSource,
    text: TextConfig,
    calibration: CalibrationConfig,
    config: SearchConfig,
    place: SearchPlace,
    protocol_of: Callable[[Run], str],
) -> Result:
    """Make a run, work through it here, and export its best trial."""
    metric_of(config.compression)
    if place.workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {place.workers}.")
    given = _read_given(place.ranks, place.complete)
    run = create_run(RunConfig(model=source, text=text, calibration=calibration, search=config), path=place.folder)
    try:
        if place.storage_url is not None:
            open_database(place.storage_url)  # checked before minutes of work
            run.keep_study_at(place.storage_url, run.id)
        if given is not None:
            client.submit(run, given, launch=False)
        session, bench = run_worker(run, verbose=sys.stderr.isatty(), helpers=place.workers - 1)
    except LowRankError as error:
        if not isinstance(error, Cancelled) and not _has_begun(run):
            shutil.rmtree(run.path)  # bad input: no trial was begun, and the folder was empty or not there
        raise
    assert bench is not None
    if config.max_ratio is not None:
        return _front_found(run, config, session.handle.coverage, protocol_of)
    trials = read_trials(run)
    best, coverage = _best_found(run, trials, config), session.handle.coverage
    assert best.compression_ratio is not None  # it is complete
    path = export_trial(run, session, bench, best.number)
    allocation = allocation_from_ranks(best.label, bench.space.units, best.ranks)
    baselines = {trial.label: _figures(trial, coverage) for trial in trials if trial.label not in ("sampled", "manual") and trial.finished}
    lines = [f"{model_name(name, trials)}: {config.objective} {figures['value']:.4g}" for name, figures in baselines.items()]
    lines += [f"best: {trial_label(best)}, {config.objective} {best.value:.4g}, on validation text", counts_of(trials).words]
    removed = f"removed: {coverage.ratio_words(best.compression_ratio)}. {coverage.statement()}."
    result = {
        **_figures(best, coverage),
        "ranks": dict(best.ranks),
        "unspent_parameters": unspent_parameters(bench.space.units, config.compression_ratio, allocation),
        "export": path,
        "pruned": counts_of(trials).pruned,
        "baselines": baselines,
    }
    around = [*lines, f"  {protocol_of(run)}", removed], [f"exported to {path}"]
    return result | _outcome(run, config, coverage, protocol_of(run), around, unspent_of(config, allocation))


def estimate(source: ModelSource, text: TextConfig, calibration: CalibrationConfig, config: SearchConfig) -> Result:
    """Time pieces of every stage of ``search_in``; nothing is searched, and nothing written but the machine's record.

    Raises:
        LowRankError: as ``search_in``, as far as the pieces reach.
    """
    run = RunConfig(source, text, calibration, config)
    pipeline = Pipeline(source, text, calibration=calibration, compression=config.compression)
    pieces, windows = TimedPieces(pipeline), config.selected_windows or text.validation_windows
    searched = {"Searching": config.trials * windows, "Selecting": ALLOCATIONS * round(POOL_RATIO * config.selected_windows)}
    stages = [pieces.evaluating(name, searched[name]) if name in searched else pieces.stage(name) for name in stages_of(run)]
    return estimate_result(TimeEstimate(tuple(stages)), pipeline, config)


def _outcome(
    run: Run, config: SearchConfig, coverage: Coverage, protocol: str, lines: tuple[list[str], list[str]], unspent: tuple[str, ...] = ()
) -> Result:
    """Return what every search tells; ``lines`` stand before and after the measurements on test text."""
    trials, confirmed, added = read_trials(run), _confirmed(run), search_gain(run)
    counts, flat = counts_of(trials), flat_words(trials, config)
    warnings = [*unspent, *_warnings(run, confirmed)]
    before, after = lines
    return {
        "objective": config.objective,
        "run": str(run.path),
        "trials": counts.complete,
        "counts": asdict(counts),
        "protocol": protocol,
        "coverage": coverage.to_mapping(),
        "confirmed": confirmed,
        "gain": added.to_mapping(),
        "stopped_when_flat": flat,
        "warnings": warnings,
        "text": "\n".join(
            [*before, *filter(None, [flat]), *_confirmed_lines(confirmed), *(f"warning: {each}" for each in warnings), *after, added.words]
        ),
    }


def _has_begun(run: Run) -> bool:
    """Return whether a study is there, or may be: a database that does not answer keeps what it has."""
    if run.storage_url is None:
        return run.journal.exists()
    try:
        return bool(read_trials(run))
    except LowRankError:
        return True


def _best_found(run: Run, trials: list[TrialRecord], config: SearchConfig) -> TrialRecord:
    best = best_trial(trials)
    outside = sum(trial.state == "infeasible" for trial in trials)
    if best is None and outside:
        raise ConfigError(
            f"none of the {outside} trials removed between {config.compression_ratio:g} and a tenth more, as the published search "
            f"requires. Give it more --trials, or search without --preset: then every trial meets the ratio."
        )
    if best is None:
        raise ConfigError(
            f"the search in {run.path} was stopped before a trial was complete. Go on with `lowrank worker --run {run.path}`."
        )
    return best


def _front_found(run: Run, config: SearchConfig, coverage: Coverage, protocol_of: Callable[[Run], str]) -> Result:
    trials = read_trials(run)
    front = [(trial, trial.compression_ratio) for trial in pareto_front(trials) if trial.compression_ratio is not None]
    if not front:
        raise ConfigError(f"the search in {run.path} has no complete trial. Go on with `lowrank worker --run {run.path}`.")
    take = f"Take one of them with `lowrank export --run {run.path} --trial N --out DIR`."
    lines = [f"{coverage.ratio_words(ratio)} removed: {config.objective} {t.value:.4g} ({trial_label(t)})" for t, ratio in front]
    before = [_FRONT, *lines, f"{coverage.statement()}.", f"  {protocol_of(run)}"]
    result = {"front": [_figures(trial, coverage) for trial, _ in front]}
    return result | _outcome(run, config, coverage, protocol_of(run), (before, [counts_of(trials).words, take]))


def _warnings(run: Run, confirmed: list[JsonMapping]) -> list[str]:
    """Return the distinct warnings of the measurements."""
    reported = [warning for row in confirmed for warning in row["warnings"]]
    of_text = (run.part("text") or {}).get("warnings", [])
    return list(dict.fromkeys([*of_text, *run.status().dense_warnings, *reported]))


def _confirmed(run: Run) -> list[JsonMapping]:
    """Return the measurements on test text, the lowest KL first."""
    names = (
        *("perplexity", "perplexity_difference_interval", "dense_perplexity", "kl"),
        *("compression_ratio", "model_compression_ratio", "protocol"),
    )
    trials = read_trials(run)
    result: list[JsonMapping] = [
        {
            "trial": answer.trial,
            "label": answer.label,
            "name": model_name(answer.label, trials),
            **{name: answer.report.get(name) for name in names},
            "warnings": answer.report.get("warnings", []),
        }
        for answer in answers_of(run, CompareAnswer)
    ]
    return sorted(result, key=lambda row: float(row["kl"]))


def _confirmed_lines(confirmed: list[JsonMapping]) -> list[str]:
    if not confirmed:
        return []
    rows = [
        f"  {row['name']}: perplexity {row['perplexity']:.3f} (dense {row['dense_perplexity']:.3f}), KL {row['kl']:.3g}"
        for row in confirmed
    ]
    return ["measured on test text, unseen by all trials:", *rows, f"  {confirmed[0]['protocol']}"]


def _read_given(ranks: Path | None, complete: str | None) -> MeasureRequest | None:
    """Return the request to measure a file's allocation."""
    if complete is not None:
        check_choice("complete", complete, RULES)
    if ranks is None:
        if complete is not None:
            raise ConfigError("--complete completes a file of ranks; give one with --ranks.")
        return None
    file = read_allocation(ranks)
    return MeasureRequest(dict(file.ranks if complete is None else file.fixed), complete)


def enqueue(folder: Path, ranks: Path, complete: str | None, units_of: Callable[[Run], Sequence[Unit]]) -> Result:
    """Leave an allocation for a run's worker, which measures it next; without a worker it waits for one.

    Args:
        units_of: of the search of a run; none before its model was loaded, and then its worker checks the ranks.

    Raises:
        ConfigError, RankError: the ranks do not fit the model, or the run measures none.
    """
    run = open_run(folder)
    given = _read_given(ranks, complete)
    assert given is not None
    if run.config.search is None:
        raise ConfigError(f"{run.path} only analyses a model; it measures no allocations. Run `lowrank search`.")
    if units := units_of(run):
        allocation_from_ranks(MANUAL, units, given.ranks)
    request = client.submit(run, given, launch=False)
    next_step = "its worker measures it next" if run.status().active else f"`lowrank worker --run {run.path}` will measure it"
    return {"run": str(run.path), "request": request, "text": f"{ranks} is queued: {next_step}."}


def work(folder: Path, warm_seconds: float, *, keep_paused: bool = False, changes: Mapping[str, object] | None = None) -> Result:
    """Do what is left to do in a run, also in one that was stopped, unless it shall stay so and only requests be answered.

    ``changes``: of the search: ``more_trials``, and fields of ``SearchConfig``.
    """
    run = open_run(folder)
    _change(run, dict(changes or {}))
    if not keep_paused:
        run.pause_marker.unlink(missing_ok=True)
    run_worker(run, warm_seconds=warm_seconds)
    trials, state = read_trials(run), run.status().state
    counts, result = counts_of(trials), Result({"run": str(run.path), "state": state})
    lines = [f"{run.path}: {state}, {counts.words}"]
    if run.config.search is not None and trials:
        added, flat = search_gain(run), flat_words(trials, run.config.search)
        lines += [*filter(None, [flat]), added.words]
        result |= {"gain": added.to_mapping(), "stopped_when_flat": flat}
    return {**result, "trials": counts.complete, "counts": asdict(counts), "text": "\n".join(lines)}


def _change(run: Run, changes: Result) -> None:
    more = changes.pop("more_trials", None)
    search = run.config.search
    if more is not None and int(str(more)) < 1:
        raise ConfigError(f"--more-trials must be at least 1, got {more}.")
    if more is not None and search is not None:
        changes |= extension(read_trials(run), search, int(str(more)))
    if changes:
        run.change_search(**changes)


def join(run: Run, warm_seconds: float) -> Result:
    """Help with the trials of a run: on its machine, or by its study in a database from any machine that has the model."""
    measured = join_run(run, warm_seconds=warm_seconds)
    return {"run": str(run.path), "measured": measured, "text": f"{run.study_name}: measured {measured} trials here"}


def _trial_number(trial: str) -> int | None:
    if trial == "best":
        return None
    if not trial.isdigit():
        raise ConfigError(f"--trial must be `best` or a number, got {trial!r}.")
    return int(trial)


def export_from(folder: Path, trial: str, out: Path, config: ExportConfig | None = None, *, command: str = "") -> Result:
    """Write the compressed model of a trial; a worker may be busy with the run meanwhile."""
    run: Run = open_run(folder)
    check_free(out)
    search = run.config.search
    if search is None:
        raise ConfigError(f"{run.path} only analyses a model; it has no trials to export. Run `lowrank search`.")
    record = complete_trial(run, _trial_number(trial))
    identity, begun = RunIdentity.of(run, EXPORT), run.config
    pipeline = Pipeline(
        begun.model,
        begun.text,
        calibration=begun.calibration,
        compression=search.compression,
        progress=Stages().stage,
        whole=run.layers,
    )
    handle = pipeline.handle
    identity.check(identity_of_model(handle))
    test = held_out(handle, begun.text)
    identity.check(identity_of_texts(handle, begun.calibration, pipeline.calibration_windows, test.windows))
    check_form(handle, metric_of(search.compression), config or ExportConfig())
    check_precision(handle, config or ExportConfig(), test.windows)
    reported(pipeline.statistics)
    identity.check(identity_of_factors(pipeline.decomposed))
    allocation = allocation_from_ranks(f"trial {record.number}", pipeline.units, record.ranks)
    model = pipeline.compress(allocation)
    provenance = {**provenance_of(run, allocation), "command": command}
    figures = metrics_of_trial(run, record.number)
    written = export(model, out, provenance=provenance, config=config, figures=figures, test=test, moments=pipeline.input_moment)
    report = report_of(written)  # of what was written: quantised matrices have scales
    return {
        "out": str(out),
        "trial": record.number,
        "compression_ratio": report.compression_ratio,
        "model_compression_ratio": report.model_compression_ratio,
        "coverage": report.dense_coverage.to_mapping(),
        "ranks": dict(allocation.ranks),
        "form": written.form,
        "written_parameters": written.written_parameters,
        "written_bytes": written.written_bytes,
        "perplexity": None if written.measured is None else written.measured.perplexity,
        "text": f"Wrote trial {record.number} to {out}: {written_words(written)}",
    }
