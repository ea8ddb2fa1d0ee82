"""Report sections of the Compare page: one model's losses, a second text, tokens, speed, healing."""

from __future__ import annotations

from markupsafe import Markup

from lowrank_core.runs import Run
from lowrank_core.runs.client import results
from lowrank_core.studies.records import read_trials, trials_of
from lowrank_core.studio.compare.comparison import comparisons, other_texts
from lowrank_core.studio.compare.comparison_chart import ratio_chart, speedup_chart
from lowrank_core.studio.compare.healing_chart import healing_chart
from lowrank_core.studio.compare.healing_commands import healing_commands
from lowrank_core.studio.compare.healing_runs import Healing, healings
from lowrank_core.studio.compare.loss_details import window_table
from lowrank_core.studio.compare.loss_details_chart import position_chart, window_charts
from lowrank_core.studio.compare.measured_speed import speed_spec, speeds
from lowrank_core.studio.compare.second_text import other_text, other_text_spec
from lowrank_core.studio.compare.token_losses import strip_html, strips, worst_spec
from lowrank_core.studio.export.export_plan import healed_source
from lowrank_core.studio.report.blocks import Block, Code, Folded, Note, Prose, Section, Strip

__all__ = ["healing_section", "loss_section", "second_text_section", "speed_section", "tokens_section"]

_WORST = 10  # tokens of a text
_NO_SECOND_TEXT = "No second text was measured, so the quality on other kinds of text is unknown. Measure one on the Compare page."
_NO_TIMES = "No model was timed: fewer parameters are not always faster. Measure it on the Compare page."


def loss_section(run: Run) -> Section:
    """Return the searched one-shot model of lowest perplexity, else the lowest of all, by window and position.

    Raises:
        RunError: an answer of the worker is damaged.
    """
    result = comparisons(results(run), trials_of(run))
    searched = [comparison for comparison in result if not comparison.given and comparison.form == "one-shot"]
    shown = min(searched or result, key=lambda comparison: comparison.perplexity, default=None)
    blocks: list[Block] = []
    if shown is not None and (view := window_table(shown)) is not None:
        blocks = [Prose(f"{shown.name}: {view.words}"), *(window_charts(shown) or ())]
    if shown is not None and (positions := position_chart(shown)) is not None:
        blocks.append(positions)
    return Section("closely", "Diagnostics of one model", "Distribution of the loss over windows and positions.", tuple(blocks))


def second_text_section(run: Run) -> Section:
    """Raises: RunError: an answer of the worker is damaged."""
    bodies, trials = results(run), trials_of(run)
    own = comparisons(bodies, trials)
    views = [view for result in other_texts(bodies, trials).values() if (view := other_text(own, result)) is not None]
    blocks: list[Block] = []
    for number, view in enumerate(views, 1):
        blocks += [Prose(view.words), ratio_chart(view, number), other_text_spec(view, number)]
    if own and not views:
        blocks = [Note("missing", _NO_SECOND_TEXT)]
    return Section("second-text", "A second text", "Quality on text of another kind.", tuple(blocks))


def tokens_section(run: Run) -> Section:
    """Raises: RunError: an answer of the worker is damaged."""
    blocks: list[Block] = []
    for number, strip in enumerate(strips(results(run), trials_of(run)), 1):
        words = f"Coloured by the extra loss of each token over the dense model. {strip.words}"
        worst = worst_spec(strip, _WORST, number)
        title = f"The {len(worst.frame)} tokens with the largest extra loss of {strip.name}"
        blocks += [Strip(strip.name, words, Markup(strip_html(strip)), strip.protocol), Folded(title, (worst,))]
    question = "Where in a text does a compressed model predict worse than the dense model?"
    return Section("tokens", "Token by token", question, tuple(blocks))


def speed_section(run: Run) -> Section:
    """Raises: RunError: an answer of the worker is damaged."""
    bodies = results(run)
    result = speeds(bodies, trials_of(run))
    blocks: list[Block] = [speedup_chart(result)] if result else [Note("missing", _NO_TIMES)] if comparisons(bodies) else []
    for number, speed in enumerate(result, 1):
        memory = f"Memory of {speed.name}: {speed.memory}." if speed.memory else f"Memory of {speed.name} was not measured."
        blocks += [speed_spec(speed, number), Prose(memory)]
    return Section("speed", "Speed and memory", "Speed and memory of the compressed models.", tuple(blocks))


def healing_section(run: Run) -> Section:
    """Raises: RunError, ConfigError: a file of a healing, or the study, is damaged."""
    blocks: list[Block] = []
    for healing in healings(run):
        blocks += [Prose(healing.words), *([healing_chart(healing)] if healing.history else []), *_again(run, healing)]
    if not blocks:
        blocks = [Prose("No model of this run was healed.")]
    return Section("healing", "Healing", "Recovery by fine-tuning the factors, and its cost.", tuple(blocks))


def _again(run: Run, healing: Healing) -> tuple[Block, ...]:
    """Return the commands that reproduce a healing; nothing if they need a file outside the report."""
    search = run.config.search
    if search is None or healing.report is None:
        return ()
    result = healing_commands(run, healed_source(healing, read_trials(run), search))
    return () if result.ranks else (Code(f"Write the one-shot model, and repeat healing {healing.name}", result.lines),)
