"""Sections of the Overview page."""

from __future__ import annotations

import contextlib

import streamlit as st

from lowrank_core.errors import ModelError
from lowrank_core.runs import Run
from lowrank_core.studio.overview.calibration_quality import CalibrationFacts, inputs_spec, quality_metrics, quality_table, quality_warnings
from lowrank_core.studio.overview.text_facts import TextFacts, splits_spec
from lowrank_core.studio.shared.model_facts import ModelFacts, model_metrics, model_words, modules_spec
from pages.components import coverage, navigation, tables
from pages.components.boundary import boundary
from pages.components.layout import metrics_row
from pages.components.loading import model_on_disk
from pages.components.overview import preflight

__all__ = ["calibration_section", "failure", "model_section", "next_steps", "text_section"]


def failure(run: Run) -> None:
    """Show the error of a failed run, with the end of its log."""
    status = run.status()
    if status.state == "failed":
        st.error(f"This run failed. {status.message}", icon=":material/error:")
        with st.expander("End of the worker's log"):
            st.code(run.log_tail() or "The log is empty.", language=None)
    for warning in (*status.warnings, *status.dense_warnings):
        st.warning(warning, icon=":material/info:")


def model_section(model: ModelFacts, reference: str) -> None:
    st.subheader("Model structure", anchor=False)
    coverage.warn(model)
    metrics_row(model_metrics(model))
    st.caption(model_words(model))
    coverage.show(model)
    for reason in (*model.left_fused, *model.heads_dropped, *filter(None, [model.dense_merge_note])):
        st.caption(reason)
    tables.show(modules_spec(model), key="module_table")
    _tree(reference)


def _tree(reference: str) -> None:
    """Draw all modules of the checkpoint, if it still exists."""
    with contextlib.suppress(ModelError):  # shown below
        preflight.notes(model_on_disk(reference))
    with st.expander("All modules, with reasons for those not compressed", icon=":material/account_tree:", key="tree_panel"), boundary():
        result = model_on_disk(reference)
        if result is None:
            st.caption(f"{reference} is no longer in the cache of the hub: its modules are listed once it is on this machine again.")
        else:
            preflight.tree(result, key="run_tree")


def text_section(text: TextFacts) -> None:
    st.subheader("Calibration text", anchor=False)
    for warning in text.warnings:
        st.warning(warning, icon=":material/warning:")
    st.caption(text.words)
    left, right = st.columns([3, 2], gap="small") if text.preview else (st.container(), None)
    with left:
        tables.show(splits_spec(text), key="split_table")
    if right is not None:
        right.code(text.preview, language=None, height=142)


def calibration_section(run: Run, calibration: CalibrationFacts) -> None:
    st.subheader("Calibration quality", anchor=False)
    said = run.status().warnings  # at the top of the page
    for warning in quality_warnings(calibration):
        if warning not in said:
            st.warning(warning, icon=":material/warning:")
    metrics_row(quality_metrics(calibration))
    with st.expander(f"All {len(calibration.inputs)} distinct inputs"):
        tables.show(inputs_spec(quality_table(calibration)), key="quality_table")


def next_steps(run: Run) -> None:
    if (run.path / "spectra.npz").exists():
        with st.container(horizontal=True):
            st.page_link(navigation.SPECTRA, label="Spectra of the model", icon=":material/grid_view:")
            st.page_link(navigation.SEARCH, label="Start a rank search", icon=":material/query_stats:")
