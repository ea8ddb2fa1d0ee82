"""Manual allocation: the rank of each module, with its cost."""

from __future__ import annotations

import streamlit as st

from lowrank_core.studies.records import read_trials
from lowrank_core.studio.manual.expected_kl import trial_predictions
from lowrank_core.studio.manual.starting_points import Recipe
from lowrank_core.studio.shared.model_facts import model_facts
from lowrank_core.studio.shared.run_list import is_busy, is_working
from pages.components import layout, navigation
from pages.components.boundary import boundary, live
from pages.components.loading import curves_of
from pages.components.manual import draft_state, export, layer_map, meter, rank_table, starting_point
from pages.components.manual import measurement as hand_measure

layout.header("Manual allocation", "Set the rank of each module and see what it costs.")


@st.fragment
def bench(editor: draft_state.DraftState) -> None:
    """Draw the draft as a fragment, so that an edit redraws nothing else."""
    with boundary():
        history = draft_state.history(editor)
        draft, tick = history.present, 1.0 if is_busy(editor.run) else None

        def expectation() -> None:
            hand_measure.expectation(editor, draft)

        def measurement() -> None:
            hand_measure.status(editor, draft)

        def result() -> None:
            hand_measure.result(editor, draft)

        predictions = trial_predictions(read_trials(editor.run), editor.recipe.record)
        # Each part in a place of its own: what comes and goes in one, such as a warning, moves no other, which would be there twice
        # until the page is drawn.
        with st.container():
            starting_point.show(editor)
        with st.container():
            meter.meter(editor, history)
        live(expectation, tick)
        with st.container(horizontal=True, gap="small", vertical_alignment="center"):
            meter.steps(editor, history)
            hand_measure.button(editor, draft)
        live(measurement, tick)
        left, right = st.columns([1, 4.3], gap="medium")
        with left:
            rank_table.sliders(editor, draft)
        with right:
            rank_table.table(editor, draft)
            layer_map.show(editor, draft)
        live(result, tick)
        hand_measure.trusted(editor, draft, predictions)
        export.show(editor, draft)


with boundary():
    run = layout.page_run()
    search = run.config.search if run is not None else None
    if run is None or search is None:
        text = "Manual allocation needs a search: it factorises every module once, and measures your ranks. Start a search first."
        layout.empty("No search in this run", text, icon=":material/tune:", page=navigation.SEARCH, label="Start a search")
        st.stop()
    facts = model_facts(run)
    if facts is None and is_working(run.status()):
        st.info("The worker is reading the model. This page fills in by itself.", icon=":material/hourglass_top:")
    elif facts is None or not facts.matrices:
        text = f"This run ended before its model was read. {run.status().message}"
        layout.empty("No modules in this run", text, icon=":material/warning:", page=navigation.SEARCH, label="Start another search")
    else:
        units = facts.units(search.compression)
        bench(draft_state.DraftState(run, search, facts, Recipe(units, search, curves_of(run))))
