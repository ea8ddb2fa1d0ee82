"""Choice of models on the Compare page, and the buttons to measure them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import streamlit as st

from lowrank_core.runs import Run, client
from lowrank_core.studies.model_ref import ModelKey
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studies.requests import CompareRequest
from lowrank_core.studio.compare.comparison import Comparison
from lowrank_core.studio.shared.formatting import percent
from lowrank_core.studio.shared.model_refs import PRESET_KEYS, preset_notes, unmeasured, usual_choice
from pages.components import state
from pages.components.request_controls import ask, why_not
from pages.components.widgets import pressed

__all__ = ["choose"]

_PRESETS = (
    "Complete published recipes, each with its own error metric, storage and ranks, on this run's calibration. Some measure gradients "
    "first or fit block by block: minutes on a large model; ASVD cuts each matrix to nine sizes: longer."
)


def choose(run: Run, options: Mapping[ModelKey, str], trials: Sequence[TrialRecord], result: Sequence[Comparison]) -> list[ModelKey]:
    """Draw the choice of models and the buttons to measure them on test text; return the choice."""
    picked = state.selection().trial
    chosen = st.multiselect(
        "Compressed models",
        list(options),
        default=usual_choice(options, trials, picked),
        key=f"subjects_{run.id}_{picked}",
        format_func=lambda key: options.get(key, str(key)),
        help=f"Trials by their value, then healed models, rules and presets. First in the list: {next(iter(options.values()))}.",
        placeholder="Choose trials, baselines, healed models or presets",
        persist_state="session",
    )
    search = run.config.search
    assert search is not None
    waiting = [request for request in client.pending_requests(run) if request.get("kind") == "compare"]
    missing = unmeasured(chosen, trials, result, waiting)
    presets = unmeasured(PRESET_KEYS, trials, result, waiting)
    ratio = percent(search.compression_ratio, 0)
    with st.container(horizontal=True, vertical_alignment="center"):
        done = None if missing else "All chosen models are measured."
        if pressed(
            "Measure on test text",
            key="measure",
            type="primary",
            icon=":material/straighten:",
            why_not=why_not(run) or done,
            help="Each on the same windows as the dense model.",
        ):
            ask(run, map(CompareRequest, missing))
        if pressed(
            f"Every preset at {ratio} removed",
            key="measure_presets",
            icon=":material/playlist_add:",
            why_not=why_not(run) or (None if presets else f"All presets are measured or queued. {_PRESETS}"),
            help=_PRESETS,
        ):
            ask(run, map(CompareRequest, presets))
        st.caption(f"{len(chosen) - len(missing)} of {len(chosen)} measured or queued", width="content")
    notes = preset_notes(chosen)
    if notes:
        with st.expander("How these presets differ from their papers", icon=":material/difference:"):
            for note in notes:
                st.markdown(note)
    return chosen
