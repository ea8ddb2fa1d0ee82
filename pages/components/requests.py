"""What the Compare page asks of the worker beyond measuring: a healing, an export, and its proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import streamlit as st

from lowrank_core import jobs
from lowrank_core.runs import Run
from pages.components import healing
from pages.components.boundary import boundary

__all__ = ["Trial", "export_form", "heal_form", "verify_button"]

Trial = int | str
"""A trial's number, or an allocator's name."""

_RECORDED = "A recorded run has no worker: start a search of your own to measure."


def export_form(run: Run, trial: Trial) -> None:
    """Draw the button that has the compressed model written."""
    if st.button(
        "Export this allocation", key="export", icon=":material/save:", disabled=run.recorded, help=_RECORDED if run.recorded else None
    ):
        _ask(run, "export", [trial])


def heal_form(run: Run, found: Mapping[Trial, str], first: Trial) -> None:
    """Draw the choice of an allocation, the settings of a healing, and the button that has it healed."""
    options = list(found)
    index = options.index(first) if first in options else 0
    trial = st.selectbox(
        "Allocation to heal",
        options,
        index,
        key=f"heal_trial_{run.id}_{first}",
        format_func=lambda key: found.get(key, str(key)),
        width=380,
    )
    healing.form(run, lambda settings: _ask(run, "heal", [trial], healing=settings), why_not=_RECORDED if run.recorded else None)


def verify_button(run: Run, name: str) -> None:
    """Draw the button that has an export loaded in a fresh process and measured again."""
    if st.button("Reload and measure again", key=f"verify_{name}", icon=":material/verified:", disabled=run.recorded):
        with boundary():
            jobs.ask(run, "verify", path=name)
            st.rerun()


def _ask(run: Run, kind: str, trials: Sequence[Trial], **arguments: object) -> None:
    with boundary():
        for trial in trials:
            jobs.ask(run, kind, trial=trial, **arguments)
        st.rerun()
