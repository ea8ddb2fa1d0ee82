"""Report section: healing."""

from __future__ import annotations

from lowrank_core.runs import Run
from lowrank_core.studies.records import read_trials
from lowrank_core.studio.compare.healing_chart import healing_chart
from lowrank_core.studio.compare.healing_commands import healing_commands
from lowrank_core.studio.compare.healing_runs import Healing, ends_in_words, healings
from lowrank_core.studio.export.export_plan import healed_source
from lowrank_core.studio.report.blocks import Block, Code, Prose, Section
from lowrank_core.studio.shared.formatting import number, percent

__all__ = ["healing_section"]


def healing_section(run: Run) -> Section:
    """Raises: RunError, ConfigError: a file of a healing, or the study, is damaged."""
    result = healings(run)
    blocks: list[Block] = [
        block
        for healing in result
        for block in (_told(healing), *([healing_chart(healing)] if healing.history else []), *_again(run, healing))
    ]
    if not blocks:
        blocks = [Prose("No model of this run was healed.")]
    return Section("healing", "Healing", "Recovery by fine-tuning the factors, and its cost.", tuple(blocks))


def _told(healing: Healing) -> Block:
    report = healing.report
    if report is None:
        done = healing.history[-1].step if healing.history else 0
        return Prose(
            f"{healing.name}: {healing.method}, not done when this was written; validated up to step {done:,} of {healing.steps:,}."
        )
    return Prose(
        f"{healing.name}: {report.label}, {report.steps:,} steps on {report.tokens:,} tokens in {report.seconds:,.0f} s, largest rate "
        f"{number(report.learning_rate, 2)}, {report.trained_parameters:,} numbers trained. KL on validation text "
        f"{number(report.kl_before)} before, {number(report.kl_after)} after ({percent(report.recovered)} of it gone). "
        f"{ends_in_words(report)}"
    )


def _again(run: Run, healing: Healing) -> tuple[Block, ...]:
    """Return the commands that reproduce a healing; nothing if they need a file outside the report."""
    search = run.config.search
    if search is None or healing.report is None:
        return ()
    result = healing_commands(run, healed_source(healing, read_trials(run), search))
    return () if result.ranks else (Code(f"Write the one-shot model, and repeat healing {healing.name}", result.lines),)
