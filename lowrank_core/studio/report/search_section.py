"""Report section: the search, its results and all trials."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_core.config import OBJECTIVES, SAMPLERS, SearchConfig
from lowrank_core.runs import Run
from lowrank_core.studies.gain import flat_words, search_gain
from lowrank_core.studies.records import TrialRecord, read_trials
from lowrank_core.studio.report.blocks import Block, Facts, Folded, Note, Section, json_link
from lowrank_core.studio.search.history import Progress, headline, history, progress, search_variables, trials_spec
from lowrank_core.studio.search.pareto_chart import front, front_spec
from lowrank_core.studio.search.static_chart import front_declared, history_declared
from lowrank_core.studio.shared.allocation_map import allocation_map, allocation_of, rank_table
from lowrank_core.studio.shared.formatting import short_duration
from lowrank_core.studio.shared.layer_map_chart import allocation_chart
from lowrank_core.studio.shared.model_facts import ModelFacts, model_facts
from lowrank_core.studio.shared.protocol import trial_protocol
from lowrank_core.studio.shared.summary import unfinished_table
from lowrank_core.studio.shared.table import Column, Table
from lowrank_core.studio.shared.trial_names import answers_of, ratio_words, trial_label

__all__ = ["search_section"]

_MAX_MAPS = 3
_MAX_VARIABLES = 8  # columns of a table; all of them are in its CSV


def search_section(run: Run) -> Section:
    """Raises: RunError: the study or model.json is damaged, or the database of the study does not answer."""
    search = run.config.search
    if search is None:
        blocks: tuple[Block, ...] = (Note("info", "This run only analyses the model: it has no search. `lowrank search` starts one."),)
    else:
        trials = read_trials(run)
        blocks = (_choices(search, model_facts(run)), *(_found(run, search, trials) if trials else (_no_trial(run),)))
    return Section("search", "The rank search", "Search rank allocations under a parameter budget.", blocks)


def _no_trial(run: Run) -> Note:
    return Note("missing", f"No trial has begun yet. `lowrank worker --run {run.path}` goes on with this run.")


def _choices(search: SearchConfig, facts: ModelFacts | None) -> Facts:
    meaning = "of the compressible linears' parameters" if facts is None else facts.coverage.ratio_words(search.compression_ratio)
    compression = search.compression
    value_words = "value projections stay dense" if compression.value_dense else "value projections are compressed too"
    spent = "projected onto the budget" if search.projected else "as published until one meets the budget"
    return Facts(
        {
            "To remove": (ratio_words(search), meaning),
            "Objective": (OBJECTIVES[search.objective], "on search-validation text; lower is better"),
            "Sampler": (SAMPLERS[search.sampler], f"seed {search.seed}, {search.startup_trials} points before its model"),
            "Space": (search.space, f"variables: {search.variables}; points are {spent}"),
            "Basis": (compression.basis, f"storage {compression.storage}; {value_words}"),
            "Stopping early": (search.pruner, "rule that stops bad trials"),
        }
    )


def _found(run: Run, search: SearchConfig, trials: Sequence[TrialRecord]) -> tuple[Block, ...]:
    now, protocol = progress(trials, search), search_protocol(run)
    added = tuple(Note("info", words) for words in (flat_words(trials, search), search_gain(run).words) if words)
    best = (_headline(now, search), *_verdict(now), history_declared(history(trials, search.objective), protocol=protocol))
    if search.max_ratio is not None:  # no single best value, so no history of it
        best = _front(trials, search, protocol)
    facts = model_facts(run)
    maps = _allocations(run, trials, search, facts, protocol) if facts is not None else ()
    return (*best, *added, *maps, _unfinished(trials), _all_trials(trials, search))


def search_protocol(run: Run) -> str:
    """Return the protocol line of a search."""
    return f"{trial_protocol(run)} Search-validation values are minimised, so optimistic; report test values."


def _headline(now: Progress, search: SearchConfig) -> Facts:
    done = {"Trials complete": (f"{now.complete} of {now.wanted}", ", ".join(now.counts.parts))}
    return Facts({**done, **headline(now, search), "Time of a trial": (short_duration(now.seconds), "Median.")})


def _verdict(now: Progress) -> list[Note]:
    """Return a warning if no trial is complete or none beats uniform."""
    if now.best is None:
        return [Note("missing", "No trial is complete, so there is no best one.")]
    if now.gain is not None and now.gain <= 0:
        return [Note("warning", "The search found nothing better than the uniform baseline.")]
    return []


def _front(trials: Sequence[TrialRecord], search: SearchConfig, protocol: str) -> tuple[Block, ...]:
    view = front(trials, search.objective)
    if view.best.empty:
        return (Note("missing", "No trial is complete, so there is no Pareto front."),)
    return front_declared(view, protocol=protocol), front_spec(trials, search)


def _allocations(run: Run, trials: Sequence[TrialRecord], search: SearchConfig, facts: ModelFacts, protocol: str) -> list[Block]:
    """Return the allocation maps of the results: the best trial, or points of the front, evenly spaced."""
    results = [trial for trial in answers_of(trials, search) if trial.ranks]
    count = min(_MAX_MAPS, len(results))
    chosen = [results[round(index * (len(results) - 1) / max(1, count - 1))] for index in range(count)]
    return [block for trial in chosen for block in _allocation(run, trial, search, facts, protocol)]


def _allocation(run: Run, trial: TrialRecord, search: SearchConfig, facts: ModelFacts, protocol: str) -> tuple[Block, ...]:
    units = facts.units(search.compression)
    result = allocation_of(trial, units)
    ranks, name = rank_table(result, units), f"trial-{trial.number}"
    view, ratio = allocation_map(result, units), result.compression_ratio
    figure = allocation_chart(view, trial_label(trial), ratio, name=f"allocation-{name}", protocol=protocol)
    columns = (Column.text("layer", "Unit"), Column.whole("rank", "Rank (– is dense)"), Column.whole("most", "Largest rank that saves"))
    rows = Table(ranks.reset_index(), columns, f"Ranks of {trial_label(trial)}", f"ranks-{name}")
    file = json_link(result.to_json(), f"{run.id}-{name}.json", "Allocation (JSON), for `lowrank compress --ranks`")
    return figure, Folded(f"Ranks of {trial_label(trial)}", (file, rows))


def _unfinished(trials: Sequence[TrialRecord]) -> Block:
    frame = unfinished_table(trials)
    if frame.empty:
        return Note("info", "Every trial was measured to the end, within the budget.")
    columns = (Column.text("name", "Trial"), Column.text("state", "Kind"), Column.text("reason", "Outcome"))
    caption = "Trials that do not count: stopped early, outside the budget, failed, or not at their end"
    return Table(frame, columns, caption, "unfinished-trials")


def _all_trials(trials: Sequence[TrialRecord], search: SearchConfig) -> Block:
    rows = trials_spec(trials, search, _MAX_VARIABLES)
    hidden = len(search_variables(trials, search)) - _MAX_VARIABLES
    notes = (Note("info", f"{hidden} more variables of the space are in the CSV file."),) if hidden > 0 else ()
    return Folded(f"All {len(trials)} trials", (*notes, rows))
