"""Report sections: test results, exports, reproduction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from lowrank_core.runs import JsonMapping, Run
from lowrank_core.runs.client import results
from lowrank_core.studies.records import TrialRecord, trials_of
from lowrank_core.studio.compare.behaviour import BEHAVIOUR_MEANING, behaviours
from lowrank_core.studio.compare.comparison import Comparison, comparisons, confirmed, confirmed_spec, warnings_of
from lowrank_core.studio.compare.comparison_chart import difference_chart
from lowrank_core.studio.compare.continuations import prompts
from lowrank_core.studio.compare.loss_details import lost_spec, saved_spec
from lowrank_core.studio.export.export_list import Written, written_models
from lowrank_core.studio.report.blocks import Block, Code, Folded, Note, Prose, Section, json_link
from lowrank_core.studio.shared.formatting import number
from lowrank_core.studio.shared.reproduce import export_command, reproduction, test_command
from lowrank_core.studio.shared.summary import by_protocol, failures, flat_table, measured_table, protocol_of, seed_table
from lowrank_core.studio.shared.table import Column, Table, filled
from lowrank_core.studio.shared.trial_names import answers_of, model_name, trial_label

__all__ = ["configuration_section", "exports_section", "measured_section", "reproduction_section"]


def measured_section(run: Run) -> Section:
    """Raises: RunError: an answer of the worker, or the study, is damaged."""
    bodies, trials = results(run), trials_of(run)
    result = comparisons(bodies, trials)
    blocks: list[Block] = [Prose(_INTRODUCTION)] if result else []
    for protocol, alike in by_protocol(result).items():
        warnings = [Note("warning", warning) for warning in warnings_of(alike)]
        lost = replace(lost_spec(alike, protocol), data=measured_table(alike))
        blocks += [*warnings, difference_chart(alike, protocol), lost, saved_spec(alike)]
    seen = confirmed(bodies, trials)
    blocks += [confirmed_spec(seen)] if seen is not None else []
    blocks += [*_verdicts(result), *_missing(run, result, bodies, trials), *_failures(bodies), *_continued(bodies, trials)]
    return Section("measured", "Measured on test text", "Quality on held-out test text.", tuple(blocks))


_INTRODUCTION = (
    "Every model saw the same windows. Rows are the dense model, one-shot compressed models, and healed (fine-tuned) ones. Intervals are "
    "of 95 %, bootstrap over windows; that of the difference is paired by window."
)


def _verdicts(result: Sequence[Comparison]) -> list[Block]:
    """Return warnings where a baseline is at least as good as every searched trial."""
    notes: list[Block] = []
    for alike in by_protocol(result).values():
        searched = [each for each in alike if not each.given and each.form == "one-shot"]  # training would beat any rule
        rules = [each for each in alike if each.given]
        best = min(searched, key=lambda comparison: comparison.perplexity, default=None)
        better = [rule for rule in rules if best is not None and rule.perplexity <= best.perplexity]
        if best is not None and better:
            names = ", ".join(f"{rule.name} ({number(rule.perplexity, 5)})" for rule in better)
            notes.append(
                Note(
                    "warning",
                    f"No searched trial is better than {names} on {protocol_of(best)}: "
                    f"the best is {best.name}, {number(best.perplexity, 5)}.",
                )
            )
    return notes


def _missing(run: Run, result: Sequence[Comparison], bodies: Sequence[JsonMapping], trials: Sequence[TrialRecord]) -> list[Block]:
    """Return notes on missing measurements."""
    search = run.config.search
    if search is None:
        return [Note("info", "Nothing is compressed in a run that only analyses, so nothing was measured on test text.")]
    if not result:
        return [
            Note(
                "missing",
                "Nothing was measured on test text yet. A search measures its best trials when it ends; measure others "
                "on the Compare page.",
            )
        ]
    measured = {body.get("trial") for body in bodies if body.get("ok") and body.get("kind") == "compare"}
    names = [trial_label(trial) for trial in answers_of(trials, search) if trial.number not in measured and trial.label not in measured]
    blocks: list[Block] = []
    if names:
        blocks.append(Note("missing", f"Not measured on test text: {', '.join(names)} (the answer of the search, or part of it)."))
    if "uniform" not in measured and not any(comparison.label == "uniform" for comparison in result):
        blocks.append(Note("missing", "The uniform baseline was not measured on test text; do it on the Compare page."))
    return blocks


def _failures(bodies: Sequence[JsonMapping]) -> list[Block]:
    return [Note("error", f"A request ({failure.kind}) failed: {failure.error}") for failure in failures(bodies)]


def _continued(bodies: Sequence[JsonMapping], trials: Sequence[TrialRecord]) -> list[Block]:
    blocks: list[Block] = []
    for entry in prompts(bodies, trials):
        how = f"{entry.tokens} tokens, temperature {entry.temperature:g}, seed {entry.seed}"
        compressed = (Code(f"Compressed, {entry.label(name)}", text) for name, text in entry.texts)
        names = ", ".join(name for name, _ in entry.texts)
        blocks.append(
            Folded(f"The same prompt, continued by both ({names}; {how})", (Code(entry.label("Dense"), entry.original), *compressed))
        )
    tables = behaviours(bodies, trials)
    return [*blocks, *([Prose(BEHAVIOUR_MEANING)] if tables else []), *tables]


def exports_section(run: Run) -> Section:
    """Raises: RunError: an answer of the worker is damaged."""
    result = written_models(run, results(run))
    blocks: tuple[Block, ...] = (Note("missing", "No compressed model was written from this run yet."),)
    if result:
        trials = trials_of(run)
        columns = (
            Column.text("folder", "Folder").of(lambda entry: str(entry.path)),
            Column.text("allocation", "Allocation").of(lambda entry: model_name(entry.allocation, trials)),
            Column.share("removed", "Removed, linears", digits=2).of("compression_ratio"),
            Column.share("model_removed", "Removed, model", digits=2).of("model_compression_ratio"),
            Column("bytes", "Weight files", "bytes"),
            Column.text("state", "At the time of this report").of(_state),
            Column.number("perplexity", "Perplexity as written", help="On test windows, measured when it was written.", digits=5),
            Column.text("proof", "Read again in a fresh process", "Result of `lowrank verify`.").of("proof_words"),
        )
        blocks = (Table(filled(result, columns), columns, "Compressed models on disk, each a valid --model", "exports"),)
    return Section("exports", "Exports", "Compressed models on disk.", blocks)


def _state(entry: Written) -> str:
    if entry.damage:
        return f"damaged: {entry.damage}"
    merged = ", merged" if entry.form == "dense" else ""
    return f"there{merged}" if entry.bytes is not None else "gone"


def reproduction_section(run: Run) -> Section:
    """Raises: RunError: run.json, or the study, is damaged."""
    record, config = run.record, run.config
    result = reproduction(record, config)
    save = json_link(result.record, "run.json", "run.json")
    exact = "Save this run.json, which has every option, and give it to the command. Model and text must be where it says."
    blocks: list[Block] = [Prose(exact), save, Code("Repeat the run", result.exact)]
    blocks.append(Code("As command-line flags", result.options))
    trials = answers_of(trials_of(run), config.search) if config.search is not None else []
    if trials:
        number_of = trials[0].number
        lines = [export_command(str(run.path), number_of), test_command(config, f"trial-{number_of}")]
        blocks.append(Code(f"Write {trial_label(trials[0])}, and measure it on test text next to the dense model", "\n".join(lines)))
    blocks.append(Code("This report", f"lowrank report --run {run.path}"))
    return Section("reproduction", "Reproduction", "Commands that reproduce these numbers.", tuple(blocks))


def configuration_section(run: Run) -> Section:
    """Raises: RunError: run.json is damaged."""
    record = run.record
    config = dict(record["config"])
    versions = pd.DataFrame(list(dict(record.get("versions", {})).items()), columns=["name", "value"])
    pair = (Column.text("name", "Name"), Column.text("value", "Value"))
    blocks = (
        Table(seed_table(config), pair, "Seeds", "seeds"),
        Table(versions, pair, "Versions that the run was made with", "versions"),
        Folded("The whole configuration", (Table(flat_table(config), pair, "Configuration, as in run.json", "configuration"),)),
    )
    return Section("configuration", "Configuration, versions, seeds", "Configuration, versions and seeds of the run.", blocks)
