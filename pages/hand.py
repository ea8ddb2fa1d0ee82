"""Pick by hand: which rank would you give each module, and what would it cost?"""

from __future__ import annotations

import streamlit as st

from lowrank_core.search.records import read_trials
from lowrank_core.views.allocation import search_units
from lowrank_core.views.model import model_facts
from lowrank_core.views.prediction import trial_predictions
from lowrank_core.views.runs import is_busy, is_working
from lowrank_core.views.starts import Recipe
from pages.components import hand_desk, hand_export, hand_map, hand_measure, hand_meter, hand_start, hand_table, layout, navigation
from pages.components.boundary import boundary, live
from pages.components.loading import curves_of

layout.header("Pick by hand", "Which rank would you give each module, and what would it cost?")


@st.fragment
def bench(desk: hand_desk.Desk) -> None:
    """Draw the draft; by itself, so that an edit draws nothing else anew."""
    with boundary():
        history = hand_desk.history(desk)
        draft, tick = history.present, 1.0 if is_busy(desk.run) else None

        def expectation() -> None:
            hand_measure.expectation(desk, draft)

        def measurement() -> None:
            hand_measure.status(desk, draft)

        def result() -> None:
            hand_measure.result(desk, draft)

        predictions = trial_predictions(read_trials(desk.run), desk.recipe.record)
        # Each part in a place of its own: what comes and goes in one, such as a warning, moves no other, which would be there twice
        # until the page is drawn.
        with st.container():
            hand_start.show(desk)
        with st.container():
            hand_meter.meter(desk, history)
        live(expectation, tick)
        with st.container(horizontal=True, gap="small", vertical_alignment="center"):
            hand_meter.steps(desk, history)
            hand_measure.button(desk, draft)
        live(measurement, tick)
        left, right = st.columns([1, 4.3], gap="medium")
        with left:
            hand_table.sliders(desk, draft)
        with right:
            hand_table.table(desk, draft)
            hand_map.show(desk, draft)
        live(result, tick)
        hand_measure.trusted(desk, draft, predictions)
        hand_export.show(desk, draft)


with boundary():
    run = layout.page_run()
    search = run.config.search if run is not None else None
    if run is None or search is None:
        text = "Ranks are picked for a search: it factorises every module once, and measures what you pick. Start a search first."
        layout.empty("No search to pick ranks for", text, icon=":material/tune:", page=navigation.SEARCH, label="Start a search")
        st.stop()
    facts = model_facts(run)
    if facts is None and is_working(run.status()):
        st.info("The worker is reading the model. This page fills in by itself.", icon=":material/hourglass_top:")
    elif facts is None or not facts.matrices:
        text = f"This run ended before its model was read. {run.status().message}"
        layout.empty("No modules in this run", text, icon=":material/warning:", page=navigation.SEARCH, label="Start another search")
    else:
        units = search_units(facts.matrices, search.compression, facts.head_units)
        bench(hand_desk.Desk(run, search, facts, Recipe(units, search, curves_of(run))))
