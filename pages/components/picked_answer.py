"""What became of the last hand-picked allocation."""

from __future__ import annotations

import streamlit as st

from lowrank_core import jobs
from lowrank_core.runs import Run
from lowrank_core.search.records import read_trials
from lowrank_core.views.allocation import trial_of_ranks
from lowrank_core.views.compare import answers, last_measured
from lowrank_core.views.formatting import percent
from lowrank_core.views.trials import trial_label
from pages.components.sidebar import resume_button

__all__ = ["show"]


def show(run: Run) -> None:
    """Say whether an allocation waits for the worker, and what the worker said to the last one.

    Raises:
        RunError: an answer, or the journal, is damaged.
    """
    waiting = [request for request in jobs.pending_requests(run) if request.get("kind") == "measure"]
    if waiting:
        words = "1 allocation waits" if len(waiting) == 1 else f"{len(waiting)} allocations wait"
        st.info(f"{words} for the worker, which looks between two trials.", icon=":material/hourglass_top:")
        if not run.worker_alive():
            resume_button(run, key="resume_measure", width="content")
        return
    answer = last_measured(answers(run))
    if answer is None:
        return
    if answer.error:
        st.error(f"The worker refused the last allocation: {answer.error}", icon=":material/error:")
        return
    trial = trial_of_ranks(read_trials(run), answer.ranks)
    where = "it is the next trial" if trial is None else f"{trial_label(trial)} above"
    st.success(f"The last allocation was accepted: {percent(answer.compression_ratio)} removed; {where}.", icon=":material/check:")
