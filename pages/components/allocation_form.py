"""An allocation of the user's own, from a file or from a trial, measured next."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from lowrank_core import jobs
from lowrank_core.accounting import Unit
from lowrank_core.allocation import ALLOCATORS, AllocationFile, RankAllocation, allocation_from_ranks, parse_allocation
from lowrank_core.config import SearchConfig
from lowrank_core.errors import ConfigError
from lowrank_core.runs import Run
from lowrank_core.search.records import MANUAL, TrialRecord, best_trial, read_trials
from lowrank_core.views.allocation import Cost, cost_of, picked_file, rank_table, search_units
from lowrank_core.views.formatting import count, percent
from lowrank_core.views.model import ModelFacts
from lowrank_core.views.trials import trial_label
from pages.components import picked_answer, state, tables
from pages.components.boundary import boundary

__all__ = ["show"]

_AS_GIVEN = ""
_NUMBER = "hand_trial"


def show(run: Run, search: SearchConfig, facts: ModelFacts | None) -> None:
    """Draw the form, and what the worker said to the last one; nothing before the model was read."""
    if facts is None or not facts.matrices:
        return
    units = search_units(facts.matrices, search.compression, facts.head_units)
    with st.expander("Measure an allocation of your own", icon=":material/edit:", key="hand_panel"):
        if run.recorded:
            st.caption("A recorded run has no worker: start a search of your own to measure.")
            return
        with boundary():
            picked_answer.show(run)
        _form(run, search, units)


@st.fragment
def _form(run: Run, search: SearchConfig, units: Sequence[Unit]) -> None:
    """Draw the inputs; by themselves, so that an edit draws nothing else anew."""
    with boundary():
        found = _start(run, units)
        if found is None:
            st.caption("No trial has begun yet. Wait for one to start from, or give a file.")
            return
        start, source = found
        complete = st.selectbox(
            "Ranks that are not locked",
            [_AS_GIVEN, *ALLOCATORS],
            key="hand_complete",
            format_func=lambda name: f"Chosen by {ALLOCATORS[name].label}, within the budget" if name else "Exactly as in the table",
            help="With an allocator, only the locked ranks are yours; it spends what is left of the budget on the others.",
        )
        edited = _table(start, units, source)
        picked = picked_file(edited)
        cost = cost_of(picked, units, search, completed=bool(complete))
        _meter(cost, search)
        if st.button("Measure it next", key="measure_hand", type="primary", icon=":material/straighten:"):
            ranks = picked.fixed if complete else dict(picked.ranks)
            jobs.ask(run, "measure", ranks=ranks, **({"complete": complete} if complete else {}))
            st.rerun()


def _start(run: Run, units: Sequence[Unit]) -> tuple[RankAllocation, str] | None:
    """Draw the choice of what to start from; return it, and a name for it; None where there is nothing yet.

    Raises:
        ConfigError, RankError: the file holds no allocation of this model, or there is no such trial.
    """
    left, right = st.columns(2, gap="large")
    with left:
        file = st.file_uploader(
            "An allocation file (JSON)",
            type="json",
            key=f"hand_file_{run.id}",
            max_upload_size=20,
            help="As “Allocation (JSON)” above writes it: ranks by layer, null where it stays dense, and `locked` for those that an "
            "allocator must leave alone; without `locked` all are.",
        )
    if file is not None:
        right.caption(f"Starts from **{file.name}**. Remove the file to start from a trial.")
        return _from_file(file.getvalue(), file.name, units), str(file.file_id)
    trials = [trial for trial in read_trials(run) if trial.ranks]
    if not trials:
        return None
    with right:
        trial = _trial(run, trials)
    return allocation_from_ranks(MANUAL, units, trial.ranks), str(trial.number)


def _from_file(content: bytes, name: str, units: Sequence[Unit]) -> RankAllocation:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"ranks: {name} is not UTF-8 text. Give an allocation file, as “Allocation (JSON)” writes it.") from error
    given: AllocationFile = parse_allocation(text, name)
    return allocation_from_ranks(MANUAL, units, given.ranks, locked=given.locked)


def _trial(run: Run, trials: Sequence[TrialRecord]) -> TrialRecord:
    """Draw the choice of a trial.

    Raises:
        ConfigError: there is none of that number, or it has no ranks yet.
    """
    first = best_trial(trials) or trials[0]
    key = f"{_NUMBER}_{run.id}"
    number = int(
        st.number_input("Or the ranks of trial", min_value=0, value=first.number, key=key, help="Its number, from the table of trials.")
    )
    chosen = state.selection().trial
    if chosen is not None:
        st.button(f"Take the chosen trial ({chosen})", key="hand_take", on_click=state.control, args=(key, chosen))
    found = next((trial for trial in trials if trial.number == number), None)
    if found is None:
        raise ConfigError(f"there is no trial {number} with ranks. The last one is trial {trials[-1].number}.")
    st.caption(f"{trial_label(found)}: {percent(found.compression_ratio)} removed.")
    return found


def _table(start: RankAllocation, units: Sequence[Unit], source: str) -> pd.DataFrame:
    columns = {
        "layer": tables.text("Layer", "Block and module type; a stack or a pair of heads shares one rank."),
        "rank": st.column_config.NumberColumn("Rank", min_value=1, step=1, help="Empty: the layer stays dense."),
        "most": tables.whole("Most", "The largest rank that costs less than the dense layer; beyond it, the layer is stored dense."),
        "locked": st.column_config.CheckboxColumn("Locked", help="An allocator that completes the others leaves this rank alone."),
    }
    edited: pd.DataFrame = st.data_editor(
        rank_table(start, units),
        column_order=list(columns),
        column_config=columns,
        disabled=["layer", "most"],
        hide_index=True,
        height=300,
        key=f"hand_table_{source}",
        placeholder="dense",
        alt="Ranks by layer, to be edited",
    )
    return edited


def _meter(cost: Cost, search: SearchConfig) -> None:
    """Say what the allocation keeps, of what may be kept."""
    if cost.allowed is None:
        st.progress(cost.share, text=f"Keeps {count(cost.kept)} of {count(cost.dense)} parameters: {percent(cost.removed)} removed.")
    elif cost.completed:
        st.progress(
            cost.share,
            text=f"Locked and dense layers keep {count(cost.kept)} of {count(cost.allowed)} parameters; the allocator spends the rest.",
        )
    else:
        st.progress(cost.share, text=f"Keeps {count(cost.kept)} of {count(cost.allowed)} parameters: {percent(cost.removed)} removed.")
    if not cost.fits:
        st.warning(
            f"Over the budget of {percent(search.compression_ratio)} removed: it will be measured, and never counts as the best trial.",
            icon=":material/scale:",
        )
