"""Compare: what does the compressed model lose, measured on test text?"""

from __future__ import annotations

import streamlit as st

from lowrank_core.jobs import answers
from lowrank_core.search.records import read_trials
from lowrank_core.views.compare import comparisons, label_of, last_failure, other_texts, refusals, unspent_notes
from lowrank_core.views.healing import healings
from lowrank_core.views.losses import window_table
from lowrank_core.views.model import model_facts
from lowrank_core.views.prompts import prompts
from lowrank_core.views.runs import is_busy
from lowrank_core.views.speed import speeds
from lowrank_core.views.subjects import candidates, healable
from lowrank_core.views.token_losses import strips
from pages.components import (
    asking,
    closer,
    coverage,
    healing,
    layout,
    measured,
    navigation,
    prompt,
    second_text,
    state,
    subjects,
    token_strip,
)
from pages.components import speeds as timing
from pages.components.boundary import boundary, live

LOOKS = {
    "windows": "Windows",
    "positions": "Positions",
    "tokens": "Token by token",
    "text": "Second text",
    "prompt": "Same prompt",
    "speed": "Speed and memory",
}

layout.header("Compare", "What does the compressed model lose, measured on text that nothing was chosen on?")

with boundary():
    run = layout.page_run()
    if run is None:
        text = "A comparison needs an allocation. Start a search; its baselines are there within a minute."
        layout.empty("Nothing to compare yet", text, icon=":material/balance:", page=navigation.SEARCH, label="Start a search")
        st.stop()
    search = run.config.search
    trials = read_trials(run) if search is not None else []
    options = candidates(trials, search, healings(run), state.selection().trial) if search is not None else {}
    if not options:
        text = "This run has no complete trial. Start a search, or wait for its first trial."
        layout.empty("No allocation in this run", text, icon=":material/balance:", page=navigation.SEARCH, label="Go to the rank search")
        st.stop()

    bodies = answers(run)
    found = comparisons(bodies, trials)
    picked = subjects.choose(run, options, trials, found)
    live(asking.waiting, 1.0 if is_busy(run) else None, run)
    failure = last_failure(bodies)
    if failure is not None:
        st.error(f"The last request ({failure.kind}) failed: {failure.error}", icon=":material/error:")
    if found:
        measured.show_all(found)
        coverage.show(model_facts(run))
        measured.show_unspent(unspent_notes(found, search) if search is not None else [])
    else:
        st.info("Nothing measured yet. Press “Measure on test text”: original and compressed see the same windows.", icon=":material/info:")
    measured.show_refusals(refusals(bodies))
    others = other_texts(bodies, trials)
    second_text.say(found, others)

    st.subheader("Look closer", anchor=False)
    look = st.segmented_control(
        "Look closer at",
        list(LOOKS),
        key="compare_look",
        default="windows",
        required=True,
        format_func=LOOKS.__getitem__,
        label_visibility="collapsed",
        persist_state="session",
    )
    first = label_of(picked[0], trials) if picked else ""
    if look in ("windows", "positions") and found:
        one = closer.one_model(found, first)
        (closer.windows if look == "windows" else closer.positions)(one)
    elif look == "tokens":
        worst = next((window_table(comparison) for comparison in found if comparison.key == first), None)
        token_strip.show(run, {subject: options[subject] for subject in picked}, strips(bodies, trials), worst)
    elif look == "text":
        second_text.show(run, picked, trials, found, others)
    elif look == "prompt":
        prompt.show(run, picked, prompts(bodies, trials))
    elif look == "speed":
        timing.show(run, picked, speeds(bodies, trials))

    made = healable(options)
    trial = next((subject for subject in picked if subject in made), next(iter(made)))
    st.subheader("Win some of it back", anchor=False)
    healing.form(run, made, trial)
    live(healing.show, 2.0 if is_busy(run) else None, run)

    st.page_link(navigation.EXPORT, label="Take it away: the Export page writes the model and proves it", icon=":material/save:")
