"""Controls that change or extend a search."""

from __future__ import annotations

from dataclasses import replace

import streamlit as st

from lowrank_core.config import SAMPLERS, SearchConfig
from lowrank_core.runs import Run, client
from lowrank_core.studies.gain import extension
from lowrank_core.studies.records import read_trials
from lowrank_core.studies.storage import dashboard_command
from lowrank_core.studio.search.search_plan import check_budget
from lowrank_core.studio.shared.model_facts import ModelFacts
from pages.components.boundary import boundary
from pages.components.widgets import pick, pressed

__all__ = ["show"]


def show(run: Run, search: SearchConfig, facts: ModelFacts | None) -> None:
    """Draw the controls of the search of ``run``; a recorded one is read-only."""
    with st.container(horizontal=True, gap="small"):
        if not run.recorded:
            _extension(run, search)
            _sampler(run, search, facts)
            _worker(run)
        _optuna(run)


def _extension(run: Run, search: SearchConfig) -> None:
    with st.popover("Extend", icon=":material/add:", key="extend_popover"):
        more = st.number_input(
            "Further trials",
            min_value=1,
            max_value=1000,
            value=20,
            key="extend_by",
            help=f"In addition to the {search.trials} of this search.",
        )
        st.caption("Continues the search with all its trials; starts a worker if none is running.")
        if st.button(f"Extend by {int(more)} trials", key="extend", type="primary"):
            with boundary():
                run.change_search(**extension(read_trials(run), search, int(more)))
                client.start_worker(run)
                st.rerun()


def _sampler(run: Run, search: SearchConfig, facts: ModelFacts | None) -> None:
    with st.popover("Sampler", icon=":material/shuffle:", key="sampler_popover"):
        help = "It uses all existing trials, whichever sampler proposed them."
        sampler = pick("Sampler from the next trial on", SAMPLERS, search.sampler, key=f"sampler_now_{run.id}", help=help)
        if st.button("Use it", key="use_sampler", disabled=sampler == search.sampler):
            with boundary():
                if facts is not None:  # e.g. too many variables for a Gaussian process
                    changed = replace(run.config, search=replace(search, sampler=sampler))
                    check_budget(changed, facts.matrices, facts.joint_units)
                run.change_search(sampler=sampler)
                st.rerun()


def _worker(run: Run) -> None:
    reason = None if run.worker_alive() else "No worker is running: extend or resume the search first."
    if pressed(
        "Add a worker",
        key="add_worker",
        icon=":material/group_add:",
        why_not=reason,
        help="One more process on this machine that runs trials. It loads the model again and needs as much memory again; useful with "
        "spare cores or devices.",
    ):
        with boundary():
            client.add_worker(run)
            st.toast("Another worker is starting; it is listed under Workers once it runs trials.", icon=":material/group_add:")


def _optuna(run: Run) -> None:
    with st.popover("Open in optuna-dashboard", icon=":material/open_in_new:", key="optuna_popover"):
        st.caption("Optuna's dashboard reads the study directly (`pip install optuna-dashboard`). In a terminal:")
        st.code(dashboard_command(run), language="bash", wrap_lines=True)
