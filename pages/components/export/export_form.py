"""Export form: source, form and preview."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import streamlit as st

from lowrank_core.config import ExportConfig, SearchConfig
from lowrank_core.parameters import Unit
from lowrank_core.runs import Run
from lowrank_core.runs.client import results
from lowrank_core.studies.records import read_trials
from lowrank_core.studies.requests import ExportRequest
from lowrank_core.studio.compare.comparison import last_failure
from lowrank_core.studio.compare.healing_commands import HealingCommands, healing_commands
from lowrank_core.studio.export.export_list import loading_of
from lowrank_core.studio.export.export_plan import (
    Planned,
    Source,
    files_of,
    folder_name_of,
    folder_of,
    forms_table,
    healed_sources,
    planned,
    runtimes,
    trial_source,
)
from lowrank_core.studio.shared.formatting import count, percent, size
from lowrank_core.studio.shared.model_facts import ModelFacts, model_facts
from lowrank_core.studio.shared.model_refs import candidates, healable
from lowrank_core.studio.shared.reproduce import compress_command, export_command
from lowrank_core.studio.shared.table import Column, Table
from pages.components import coverage, layout, navigation, state, tables
from pages.components.request_controls import ask, why_not
from pages.components.widgets import draw, pick, pressed

__all__ = ["show"]

_RECORDED = (
    "A recorded run has no worker: use the line under “Command” in a terminal, or start a search of your own. All downloads are below."
)
_NO_PLACE = "A dense merge has no place for the biases of this metric: turn on “Drop biases without a place”, or choose the form Factors."


def show(run: Run) -> Source | None:
    """Draw the choice, its preview and the button; return the chosen source, None without one.

    Raises:
        LowRankError: a file of the run is damaged, or the choice can't be written.
    """
    search, facts = run.config.search, model_facts(run)
    units = facts.units(search.compression) if search is not None and facts is not None else ()
    result = _sources(run, search, units) if search is not None else {}
    if search is None or not result:
        text = "This run only analyses the model." if search is None else "This run has no complete trial."
        text += " A search has its first allocations within a minute."
        layout.empty("No allocation to export", text, icon=":material/save:", page=navigation.SEARCH, label="Go to the rank search")
        return None
    failure = last_failure([body for body in results(run) if body.get("kind") == "export"])
    if failure is not None:
        st.error(f"The last export failed: {failure.error}", icon=":material/error:")
    left, right = st.columns([1, 1.6], gap="large")
    with left:
        source, config = _choice(run, result, facts)
    if facts is not None:
        with right:
            _plan(run, source, config, (search, facts, units))
    with left:
        _write_button(run, source, config, facts)
    return source


def _sources(run: Run, search: SearchConfig, units: Sequence[Unit]) -> dict[str, Source]:
    trials, bodies = read_trials(run), results(run)
    listed = healable(candidates(trials, search, picked=state.selection().trial))
    chosen = [trial_source(trial, label, trials, search, (units, bodies)) for trial, label in listed.items()]
    return {str(source.healed or source.trial): source for source in [*chosen, *healed_sources(run, trials)]}


def _choice(run: Run, result: dict[str, Source], facts: ModelFacts | None) -> tuple[Source, ExportConfig]:
    """Raises: ConfigError: a size that is none."""
    picked = state.selection().trial
    key = pick(
        "Allocation or healed model",
        {name: source.label for name, source in result.items()},
        str(picked),
        key=f"export_what_{run.id}_{picked}",
        help="An allocation is exported as compressed (one-shot). A healed model has the same ranks and trained factors.",
    )
    form = draw(ExportConfig, "form", key="export_form", side_by_side=True)
    dense, compressed = form == "dense", form == "compressed"
    code = draw(ExportConfig, "with_code", key="export_with_code", disabled=not compressed)
    drop = draw(ExportConfig, "drop_biases", key="export_drop_biases", disabled=not dense)
    if facts is not None and facts.dense_merge_note:
        st.caption(facts.dense_merge_note)
    with st.container(horizontal=True):
        dtype = draw(ExportConfig, "dtype", key="export_dtype")
        shard = draw(ExportConfig, "max_shard_size", key="export_shard")
    grids = _grids(floats_alone=not compressed)
    return result[key], ExportConfig(form, code and compressed, dtype, shard.strip(), drop_biases=drop and dense, **grids)


def _grids(*, floats_alone: bool) -> dict[str, str]:
    """Draw how matrices are quantised; nothing is where the form has floats alone."""
    with st.container(horizontal=True):
        names = ("quantization", "dense_quantization")
        grids: dict[str, str] = {name: draw(ExportConfig, name, key=f"export_{name}", disabled=floats_alone) for name in names}
        floats = floats_alone or set(grids.values()) == {"none"}
        rounding = draw(ExportConfig, "rounding", key="export_rounding", disabled=floats)
    return {} if floats else grids | {"rounding": rounding}


def _plan(run: Run, source: Source, config: ExportConfig, model: tuple[SearchConfig, ModelFacts, Sequence[Unit]]) -> None:
    """Preview the export."""
    search, facts, units = model
    result = planned(facts, units, source, search, config)
    st.markdown("**What will be written**")
    layout.metrics_row(
        {
            "Weights": (_bounded(size(result.bytes), result), f"{result.bytes:,} bytes of {result.dtype}; without the file's header."),
            "Of the dense model": (
                percent(result.bytes / max(1, facts.bytes)),
                f"That has {size(facts.bytes)} in {facts.stored_dtype or facts.dtype}.",
            ),
            "Parameters": (_bounded(count(result.parameters), result), f"{result.parameters:,}: biases, indices and scales counted."),
        }
    )
    coverage.show(facts, source.removed(units))
    if not result.exact:
        why = "its ranks are known once the worker has built it" if source.ranks is None else "a merge may add biases"
        st.caption(f"At most, because {why}: these are upper bounds.")
    sizes, files, who, again, loading = st.tabs(["Sizes", "Files", "Runtimes", "Command", "Load it"])
    folder = folder_of(run, source, config)
    with sizes:
        _sizes(forms_table(facts, units, source, search, config))
    with files:
        st.caption(f"A new folder, `{folder}`:")
        st.markdown("\n".join(f"* `{name}`: {meaning}" for name, meaning in files_of(result, config)))
    with who:
        rows = runtimes(config).itertuples(index=False)
        st.markdown("\n".join(f"* {row.runtime}: **{row.loads}**, {row.how}" for row in rows))
    with again:
        _command(run, source, config)
    with loading:
        _loading(folder, source, config, facts.auto_class)


def _bounded(words: str, result: Planned) -> str:
    return words if result.exact else f"≤ {words}"


def _sizes(frame: pd.DataFrame) -> None:
    columns = (
        Column.text("chosen", "", "The chosen form.", 30),
        Column.text("form", "Form", "“At most” where the exact count is known only after building.", 165),
        Column.text("dtype", "Floats", width=75),
        Column.whole("parameters", "Parameters", "Numbers in the files: biases, indices and scales counted."),
        Column.whole("bytes", "Bytes", "Of the tensors; without a header of some kilobytes."),
        Column.share("share", "Share", "Of the dense model's bytes."),
    )
    tables.show(Table(frame, columns, "Bytes of each form"), key="export_sizes")
    st.caption(
        "Counted from the ranks, not measured. The dense model is that of a plain checkpoint, also where it was read from a quantised file."
    )


def _command(run: Run, source: Source, config: ExportConfig) -> None:
    """Show the equivalent command."""
    ranks = f"{source.name}.json".replace(" ", "-")
    if source.healed:
        _healed_command(healing_commands(run, source, config))
    elif source.number is not None:
        line = export_command(str(run.path), source.number, config, out=folder_name_of(source, config))
        st.code(line, language="bash", wrap_lines=True)
    else:
        st.caption(f"`lowrank export` takes trials. Save “Allocation (JSON)” below as {ranks}, and make the model of it:")
        st.code(compress_command(run.config, ranks, folder_name_of(source, config), config), language="bash", wrap_lines=True)


def _healed_command(result: HealingCommands) -> None:
    """Show the commands that reproduce the healed model."""
    first = (
        f"Save “Allocation (JSON)” below as {result.ranks}; then make the one-shot model of it"
        if result.ranks
        else "Write the one-shot model"
    )
    st.caption(f"{first}, and heal that model:")
    st.code(result.lines, language="bash", wrap_lines=True)
    st.caption(
        "`lowrank heal` starts from the factors as stored, the worker started from those in memory: results may differ by rounding, "
        "unless both are float32 (“Stored as”)."
    )


def _loading(folder: Path, source: Source, config: ExportConfig, auto_class: str) -> None:
    """Show how to load the command's output, by the same relative path."""
    name = folder_name_of(source, config)
    st.caption(f"In the folder of `{name}`: the command writes to the current folder, the button to `{folder.parent}`.")
    for way in loading_of(Path(name), config.form, with_code=config.with_code, auto_class=auto_class):
        st.caption(way.title)
        st.code(way.code, language=way.language, wrap_lines=True)


def _write_button(run: Run, source: Source, config: ExportConfig, facts: ModelFacts | None) -> None:
    """Draw the export button, disabled where it is known that the export would be refused."""
    refused = facts is not None and facts.biases_without_place > 0 and config.form == "dense" and not config.drop_biases
    there = "Already written: see below." if folder_of(run, source, config).exists() else None
    reason = why_not(run, _RECORDED) or there or (_NO_PLACE if refused else None)
    write = pressed("Write it", key="export", type="primary", icon=":material/save:", why_not=reason)
    if reason is not None:
        st.caption(reason)
    if write:
        ask(run, [ExportRequest(source.trial, source.healed or None, config)])
