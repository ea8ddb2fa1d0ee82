"""Compare: quality, size and speed against the dense model on test text."""

from __future__ import annotations

import streamlit as st

from lowrank_core.runs.client import results
from lowrank_core.studies.records import read_trials
from lowrank_core.studio.compare.behaviour import behaviours
from lowrank_core.studio.compare.comparison import comparisons, label_of, last_failure, other_texts, refusals, unspent_notes
from lowrank_core.studio.compare.continuations import prompts
from lowrank_core.studio.compare.healing_runs import healings
from lowrank_core.studio.compare.loss_details import window_table
from lowrank_core.studio.compare.measured_speed import speeds
from lowrank_core.studio.compare.token_losses import strips
from lowrank_core.studio.shared.model_facts import model_facts
from lowrank_core.studio.shared.model_refs import candidates, healable
from lowrank_core.studio.shared.run_list import is_busy
from pages.components import coverage, layout, navigation, request_controls, state
from pages.components.boundary import boundary, live
from pages.components.compare import behaviour, healing, loss_details, measured, models, prompt, second_text, token_strip
from pages.components.compare import speed as timing
from pages.components.widgets import choose

LOOKS = {
    "windows": "Windows",
    "positions": "Positions",
    "tokens": "Token by token",
    "text": "Second text",
    "prompt": "Continuations",
    "speed": "Speed and memory",
}

layout.header("Compare", "How much quality does compression cost on held-out test text?")

with boundary():
    run = layout.page_run()
    if run is None:
        text = "A comparison needs an allocation. Start a search; its baselines are measured within a minute."
        layout.empty("Nothing to compare yet", text, icon=":material/balance:", page=navigation.SEARCH, label="Start a search")
        st.stop()
    search = run.config.search
    trials = read_trials(run) if search is not None else []
    options = candidates(trials, search, healings(run), state.selection().trial) if search is not None else {}
    if not options:
        text = "This run has no complete trial. Start a search, or wait for its first trial."
        layout.empty("No allocation in this run", text, icon=":material/balance:", page=navigation.SEARCH, label="Go to the rank search")
        st.stop()

    bodies = results(run)
    found = comparisons(bodies, trials)
    picked = models.choose(run, options, trials, found)
    live(request_controls.waiting, 1.0 if is_busy(run) else None, run)
    failure = last_failure(bodies)
    if failure is not None:
        st.error(f"The last request ({failure.kind}) failed: {failure.error}", icon=":material/error:")
    if found:
        measured.show_all(found)
        coverage.show(model_facts(run))
        measured.show_unspent(unspent_notes(found, search) if search is not None else [])
    else:
        st.info(
            "Nothing measured yet. Press “Measure on test text”: the dense and the compressed models see the same windows.",
            icon=":material/info:",
        )
    measured.show_refusals(refusals(bodies))
    others = other_texts(bodies, trials)
    second_text.say(found, others)

    st.subheader("Diagnostics", anchor=False)
    look = choose("Diagnostics of", LOOKS, key="compare_look", label_visibility="collapsed")
    first = label_of(picked[0], trials) if picked else ""
    if look in ("windows", "positions") and found:
        one = loss_details.one_model(found, first)
        (loss_details.windows if look == "windows" else loss_details.positions)(one)
    elif look == "tokens":
        worst = next((window_table(comparison) for comparison in found if comparison.key == first), None)
        token_strip.show(run, {subject: options[subject] for subject in picked}, strips(bodies, trials), worst)
    elif look == "text":
        second_text.show(run, picked, trials, found, others)
    elif look == "prompt":
        prompt.show(run, picked, prompts(bodies, trials))
        behaviour.show(run, picked, behaviours(bodies, trials))
    elif look == "speed":
        timing.show(run, picked, speeds(bodies, trials))

    made = healable(options)
    trial = next((subject for subject in picked if subject in made), next(iter(made)))
    st.subheader("Healing (recovery fine-tuning)", anchor=False)
    healing.form(run, made, trial)
    live(healing.show, 2.0 if is_busy(run) else None, run)

    st.page_link(navigation.EXPORT, label="Export: write the model and verify it", icon=":material/save:")
