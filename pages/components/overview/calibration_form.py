"""The form that starts a calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from lowrank_core.config import CalibrationConfig, ModelSource, RunConfig, TextConfig
from lowrank_core.documents import HUB_TEXTS
from lowrank_core.studio.overview.checkpoint import ModelOnDisk
from lowrank_core.studio.overview.source_checks import TEXTS
from lowrank_core.studio.overview.text_preview import TextPreview, check_long_enough
from pages.components.boundary import boundary
from pages.components.loading import model_on_disk, preview_of
from pages.components.overview import preflight
from pages.components.pickers import own_file
from pages.components.request_controls import start
from pages.components.widgets import choose, draw, draw_all, pick

__all__ = ["calibration_form"]

_KEYS = {(TextConfig, "seed"): "text_seed", (ModelSource, "dtype"): "model_dtype", (ModelSource, "memory"): "model_memory"}
_MODELS = {"demo": "Bundled demo", "other": "Folder, GGUF file or hub id"}


def calibration_form() -> None:
    """Draw the form; a press on its button starts a run and selects it."""
    st.caption("Runs the model over calibration text and computes feature and weight spectra. Searches reuse the statistics.")
    left, right = st.columns(2, gap="large")
    with left:
        reference = _model_reference()
    with right:
        text = _text_reference()
    windows, context = _sizes()
    chosen = _advanced()
    model, preview, valid = _checked(reference, text)
    config: RunConfig | None = None
    if valid:
        with boundary():
            options = TextConfig(reference=text, context=context, calibration_windows=windows, **chosen[TextConfig])
            if preview is not None:
                check_long_enough(preview, options)
            source = ModelSource(reference, **chosen[ModelSource])
            config = RunConfig(model=source, text=options, calibration=CalibrationConfig(**chosen[CalibrationConfig]))
    with st.container(horizontal=True, vertical_alignment="center"):
        pressed = st.button("Start calibration", key="start_calibration", type="primary", icon=":material/play_arrow:")
        if model is not None and config is not None:
            preflight.fit_line(model, config)
    if pressed and config is not None:
        start(config)
    preflight.show(reference, model, preview, config)


def _model_reference() -> str:
    choice = choose("Model", _MODELS, key="model_choice")
    if choice != "other":
        return "demo"
    return st.text_input(
        "Folder, GGUF file or hub id",
        key="model_reference",
        placeholder="/models/llama-2-7b, /models/name.gguf or owner/name",
        help="A folder in save_pretrained format or a GGUF file, on the machine of the dashboard, or an id on the Hugging Face hub.",
        persist_state="session",
    )


def _text_reference() -> str:
    choice = pick("Text", TEXTS, key="text_choice", persist_state="session")
    if choice == "file":
        return f"file:{own_file('text_path', 'UTF-8 .txt, .jsonl or .parquet with a `text` column.')}"
    if choice in HUB_TEXTS:
        folder = st.text_input(
            "Folder of a local copy (else it is downloaded)",
            key="text_folder",
            placeholder="/data/wikitext",
            help="As on the hub: .parquet or .json files named by their split.",
            persist_state="session",
        )
        return f"{choice}:{folder}" if folder.strip() else str(choice)
    return str(choice)


def _sizes() -> tuple[int, int]:
    left, right = st.columns(2, gap="large")
    windows = draw(TextConfig, "calibration_windows", key="calibration_windows", place=left)
    return windows, draw(TextConfig, "context", key="context", place=right)


_ADVANCED: Mapping[type, Sequence[str]] = {
    CalibrationConfig: ("group_size", "group_weights", "batch_size", "robust", "gradient_windows", "gradient_seed", "precision"),
    TextConfig: ("validation_windows", "test_windows", "bos", "seed"),
    ModelSource: ("dtype", "memory"),
}
"""Config -> fields of what stands under Advanced."""


def _advanced() -> dict[type, dict[str, Any]]:
    """Return config class -> field -> value."""
    with st.expander("Advanced"):
        columns = st.columns(3)
        return {kind: draw_all(kind, {name: _KEYS.get((kind, name), name) for name in names}, columns) for kind, names in _ADVANCED.items()}


def _checked(reference: str, text: str) -> tuple[ModelOnDisk | None, TextPreview | None, bool]:
    """Return the facts of model and text, and whether both are usable; show errors of those that are not."""
    model, preview, checked = None, None, 0
    if reference.strip():
        with boundary():
            model = model_on_disk(reference)
            checked += 1
    if text != "file:":
        with boundary():
            preview = preview_of(text)
            checked += 1
    if not reference.strip() or text == "file:":
        st.caption("Enter the missing path above.")
    return model, preview, checked == 2
