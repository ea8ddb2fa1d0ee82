"""Compare: what does the compressed model lose, measured on test text?"""

from __future__ import annotations

import streamlit as st

from lowrank_core.search.records import read_trials
from lowrank_core.views.compare import answers, comparisons, continuations, label_of, last_failure
from lowrank_core.views.runs import is_busy
from pages.components import healing, layout, measured, navigation
from pages.components import requests as asking
from pages.components.boundary import boundary, live

layout.header("Compare", "What does the compressed model lose, measured on text that nothing was chosen on?")

with boundary():
    run = layout.page_run()
    if run is None:
        text = "A comparison needs an allocation. Start a search; its baselines are there within a minute."
        layout.empty("Nothing to compare yet", text, icon=":material/balance:", page=navigation.SEARCH, label="Start a search")
        st.stop()
    search = run.config.search
    trials = read_trials(run) if search is not None else []
    candidates = asking.candidates(trials, search) if search is not None else {}
    if not candidates:
        text = "This run has no complete trial. Start a search, or wait for its first trial."
        layout.empty("No allocation in this run", text, icon=":material/balance:", page=navigation.SEARCH, label="Go to the rank search")
        st.stop()

    trial = asking.measure_form(run, candidates)
    live(lambda: asking.waiting(run), 1.0 if is_busy(run) else None)

    bodies = answers(run)
    failure = last_failure(bodies)
    if failure is not None:
        st.error(f"The last request ({failure.kind}) failed: {failure.error}", icon=":material/error:")
    found = comparisons(bodies)
    if found:
        measured.show(found, label_of(trial, trials))
    else:
        st.info("Nothing measured yet. Press “Measure on test text”: original and compressed see the same windows.", icon=":material/info:")

    st.subheader("The same prompt, continued by both", anchor=False)
    asking.prompt_form(run, trial)
    measured.show_continuations(continuations(bodies))

    st.subheader("Win some of it back", anchor=False)
    asking.heal_form(run, trial)
    live(lambda: healing.show(run), 2.0 if is_busy(run) else None)

    st.page_link(navigation.EXPORT, label="Take it away: the Export page writes the model and proves it", icon=":material/save:")
