"""Sections of the Overview page."""

from __future__ import annotations

import contextlib

import streamlit as st

from lowrank_core.config import TOKENS_PER_DIMENSION
from lowrank_core.errors import ModelError
from lowrank_core.runs import Run
from lowrank_core.studio.overview.calibration_quality import CalibrationFacts, inputs_spec, quality_table, quality_warnings
from lowrank_core.studio.overview.text_facts import TextFacts, splits_spec
from lowrank_core.studio.shared.formatting import count, duration, number, percent, size
from lowrank_core.studio.shared.model_facts import ModelFacts, modules_spec
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
    metrics_row(
        {
            "Parameters": (count(model.parameters), f"{model.parameters:,}"),
            "Compressible": (count(model.compressible_parameters), "In linear layers of the blocks, biases counted."),
            "Share compressible": (
                percent(model.compressible_share),
                "Of all parameters; the table lists the rest, and why it is not compressed.",
            ),
            "Size": (size(model.bytes), f"Of the checkpoint; loaded as {model.dtype}."),
            "Blocks × hidden": (f"{model.blocks} × {model.hidden:,}", "Number of blocks, and the width of the residual stream."),
            "Vocabulary": (
                f"{model.vocabulary:,}",
                "Embedding and head share one matrix." if model.tied_embeddings else "Embedding and head are separate.",
            ),
        }
    )
    st.caption(
        f"{model.architecture} · {model.dtype} · {model.device or 'cpu'} · context up to {model.max_context or '–'} · "
        f"embeddings {'tied' if model.tied_embeddings else 'not tied'} · fingerprint `{model.fingerprint[:12] or '–'}`"
    )
    coverage.show(model)
    for reason in model.heads_dropped:
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
    bos = "BOS first in every window" if text.bos == "window" else "no BOS"
    st.caption(f"{text.reference} · context {text.context} tokens · {bos} · seed {text.seed} · three disjoint splits")
    left, right = st.columns([3, 2], gap="small") if text.preview else (st.container(), None)
    with left:
        tables.show(splits_spec(text), key="split_table")
    if right is not None:
        right.code(text.preview, language=None, height=142)


def calibration_section(calibration: CalibrationFacts) -> None:
    st.subheader("Calibration quality", anchor=False)
    for warning in quality_warnings(calibration):
        st.warning(warning, icon=":material/warning:")
    took = "from the cache" if calibration.cached else f"in {duration(calibration.seconds)}"
    metrics_row(
        {
            "Calibration tokens": (count(calibration.tokens), f"{calibration.windows} windows, measured {took}."),
            "Tokens per dimension": (
                number(calibration.min_tokens_per_dimension),
                f"Minimum over all inputs. Below {TOKENS_PER_DIMENSION}, small eigenvalues are noisy.",
            ),
            "Worst condition": (
                calibration.condition_words,
                "Largest over smallest eigenvalue of an input's covariance, the largest over all inputs.",
            ),
            "Groups × windows": (
                f"{calibration.groups} × {calibration.group_size}",
                f"Weights: {calibration.group_weights}. The pooled covariance averages within groups.",
            ),
        }
    )
    with st.expander(f"All {len(calibration.inputs)} distinct inputs"):
        tables.show(inputs_spec(quality_table(calibration)), key="quality_table")


def next_steps(run: Run) -> None:
    if (run.path / "spectra.npz").exists():
        with st.container(horizontal=True):
            st.page_link(navigation.SPECTRA, label="Spectra of the model", icon=":material/grid_view:")
            st.page_link(navigation.SEARCH, label="Start a rank search", icon=":material/query_stats:")
