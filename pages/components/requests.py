"""What the Compare page asks of the worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import streamlit as st

from lowrank_core import jobs
from lowrank_core.allocation import ALLOCATORS
from lowrank_core.config import SearchConfig
from lowrank_core.jobs import TEMPERATURE
from lowrank_core.runs import Run
from lowrank_core.search.records import TrialRecord
from lowrank_core.search.space import BASELINES
from lowrank_core.views.formatting import number, percent
from lowrank_core.views.runs import is_working, status_words
from lowrank_core.views.trials import answers_of, trial_label
from pages.components import healing, state
from pages.components.boundary import boundary
from pages.components.sidebar import resume_button

__all__ = ["Trial", "candidates", "export_form", "heal_form", "measure_form", "prompt_form", "verify_button", "waiting"]

Trial = int | str
"""A trial's number, or an allocator's name."""

_PICKER = "allocation_picker"
_WORDS = {
    "compare": "Measuring on test text",
    "generate": "Continuing the prompt",
    "export": "Writing the model",
    "measure": "Putting an allocation in line",
    "heal": "Healing",
    "verify": "Measuring the exported folder again",
    "sensitivity": "Measuring sensitivity",
}
_RECORDED = "A recorded run has no worker: start a search of your own to measure."
_PROMPT = "def mean(values):\n    "


def candidates(trials: Sequence[TrialRecord], search: SearchConfig) -> dict[Trial, str]:
    """Return what can be measured: the best trial (or the Pareto front), the one picked by the user, then what allocators choose."""
    answers = answers_of(trials, search)
    if not answers:
        return {}
    found: dict[Trial, str] = {trial.number: _answer_label(trial, search) for trial in answers}
    picked = next((t for t in trials if t.number == state.selection().trial and t.state == "complete"), None)
    if picked is not None and picked.number not in found:
        found[picked.number] = f"Chosen: {trial_label(picked)}, value {number(picked.value, 4)}"
    at = "" if search.most_ratio is None else f" at {percent(search.compression_ratio, 0)} removed"
    rules: dict[Trial, str] = {
        name: f"{'Baseline' if name in BASELINES else 'Allocator'}: {method.label}{at}" for name, method in ALLOCATORS.items()
    }
    return found | rules


def _answer_label(trial: TrialRecord, search: SearchConfig) -> str:
    if search.most_ratio is None:
        return f"Best: {trial_label(trial)}, value {number(trial.value, 4)}"
    return f"Front: {trial_label(trial)}, {percent(trial.compression_ratio)} removed, value {number(trial.value, 4)}"


def measure_form(run: Run, found: Mapping[Trial, str]) -> Trial:
    """Draw the choice of an allocation and the buttons that have it measured; return the choice."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        options = list(found)
        picked = state.selection().trial
        index = options.index(picked) if picked in options else 0
        trial: Trial = st.selectbox(
            "Allocation", options, index, key=f"{_PICKER}_{run.id}_{picked}", format_func=lambda key: found.get(key, str(key)), width=380
        )
        one = st.button(
            "Measure on test text",
            key="measure",
            type="primary",
            icon=":material/straighten:",
            disabled=run.recorded,
            help=_RECORDED if run.recorded else None,
        )
        several = st.button(
            "This and the baselines",
            key="measure_all",
            disabled=run.recorded,
            help=_RECORDED if run.recorded else "Measures the chosen allocation and every baseline.",
        )
    if one:
        _ask(run, "compare", [trial])
    if several:
        _ask(run, "compare", list(dict.fromkeys([trial, *BASELINES])))
    return trial


def prompt_form(run: Run, trial: Trial) -> None:
    """Draw the prompt and the button that has it continued by both models."""
    with st.form("prompt_form"):
        prompt = st.text_area("Prompt", _PROMPT, key="prompt", height=110)
        with st.container(horizontal=True, vertical_alignment="bottom"):
            tokens = st.number_input("New tokens, at most", 1, 512, 64, key="prompt_tokens", width=180)
            temperature = st.number_input(
                "Temperature", 0.0, 2.0, TEMPERATURE, 0.1, key="prompt_temperature", width=160, help="0 always takes the likeliest token."
            )
            seed = st.number_input("Seed", 0, 2**31 - 1, 0, key="prompt_seed", width=140, help="Both models draw with it.")
            pressed = st.form_submit_button(
                "Continue with both",
                key="continue",
                icon=":material/edit_note:",
                disabled=run.recorded,
                help=_RECORDED if run.recorded else None,
            )
    if pressed and not prompt.strip():
        st.warning("The prompt is empty: write something to continue.")
    elif pressed:
        _ask(run, "generate", [trial], prompt=prompt, tokens=int(tokens), temperature=float(temperature), seed=int(seed))


def export_form(run: Run, trial: Trial) -> None:
    """Draw the button that has the compressed model written."""
    if st.button(
        "Export this allocation", key="export", icon=":material/save:", disabled=run.recorded, help=_RECORDED if run.recorded else None
    ):
        _ask(run, "export", [trial])


def heal_form(run: Run, trial: Trial) -> None:
    """Draw the settings of a healing and the button that has the chosen allocation healed."""
    healing.form(run, lambda settings: _ask(run, "heal", [trial], healing=settings), why_not=_RECORDED if run.recorded else None)


def verify_button(run: Run, name: str) -> None:
    """Draw the button that has an export loaded in a fresh process and measured again."""
    if st.button("Reload and measure again", key=f"verify_{name}", icon=":material/verified:", disabled=run.recorded):
        with boundary():
            jobs.ask(run, "verify", path=name)
            st.rerun()


def waiting(run: Run) -> None:
    """Say what the worker has still to answer; nothing if all is answered."""
    open_requests = jobs.pending_requests(run)
    if not open_requests:
        return
    status = run.status()
    kind = str(open_requests[0].get("kind"))
    more = f", {len(open_requests) - 1} more after it" if len(open_requests) > 1 else ""
    if run.worker_alive():
        st.progress(
            status.fraction or 0.0,
            text=f"{_WORDS.get(kind, kind)}{more} · {status.stage} {status_words(status) if is_working(status) else ''}",
        )
        return
    st.warning(f"{len(open_requests)} requests wait for a worker, which is not running.", icon=":material/pause:")
    resume_button(run, key="resume_requests", width="content")


def _ask(run: Run, kind: str, trials: Sequence[Trial], **arguments: object) -> None:
    with boundary():
        for trial in trials:
            jobs.ask(run, kind, trial=trial, **arguments)
        st.rerun()
