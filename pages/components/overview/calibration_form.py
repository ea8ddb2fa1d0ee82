"""The form that starts a calibration."""

from __future__ import annotations

import streamlit as st

from lowrank_core.config import BOS_RULES, DTYPES, GROUP_WEIGHTS, ROBUST_RULES, CalibrationConfig, ModelSource, RunConfig, TextConfig
from lowrank_core.documents import HUB_TEXTS
from lowrank_core.studio.overview.checkpoint import ModelOnDisk
from lowrank_core.studio.overview.source_checks import TEXTS
from lowrank_core.studio.overview.text_preview import TextPreview, check_long_enough
from pages.components.boundary import boundary
from pages.components.loading import model_on_disk, preview_of
from pages.components.overview import preflight
from pages.components.start import start

__all__ = ["calibration_form"]

_MODELS = {"demo": "Bundled demo", "other": "Folder or hub id"}
_TEXT, _CALIBRATION = TextConfig(), CalibrationConfig()


def calibration_form() -> None:
    """Draw the form; a press on its button starts a run and selects it."""
    st.caption("Runs the model over some text and measures where its features are low-rank. What is measured is kept for searches.")
    left, right = st.columns(2, gap="large")
    with left:
        reference = _model_reference()
    with right:
        text = _text_reference()
    windows, context = _sizes()
    text_options, calibration, dtype = _advanced()
    model, preview, valid = _checked(reference, text)
    config: RunConfig | None = None
    if valid:
        with boundary():
            options = TextConfig(reference=text, context=context, calibration_windows=windows, **text_options)  # type: ignore[arg-type]
            if preview is not None:
                check_long_enough(preview, options)
            config = RunConfig(model=ModelSource(reference, dtype=dtype), text=options, calibration=calibration)
    with st.container(horizontal=True, vertical_alignment="center"):
        pressed = st.button("Start calibration", key="start_calibration", type="primary", icon=":material/play_arrow:")
        if model is not None and config is not None:
            preflight.fit_line(model, config)
    if pressed and config is not None:
        with boundary():
            start(config)
    preflight.show(reference, model, preview, config)


def _model_reference() -> str:
    choice = st.segmented_control(
        "Model", list(_MODELS), key="model_choice", default="demo", required=True, format_func=_MODELS.__getitem__, persist_state="session"
    )
    if choice != "other":
        return "demo"
    return st.text_input(
        "Folder or hub id",
        key="model_reference",
        placeholder="/models/llama-2-7b or owner/name",
        help="A folder that save_pretrained wrote, on the machine that runs the dashboard, or an id on the Hugging Face hub.",
        persist_state="session",
    )


def _text_reference() -> str:
    choice = st.selectbox("Text", list(TEXTS), key="text_choice", format_func=TEXTS.__getitem__, persist_state="session")
    if choice == "file":
        place = st.text_input(
            "Path of the file",
            key="text_path",
            placeholder="/data/notes.txt",
            help="UTF-8 .txt, .jsonl or .parquet with a `text` column.",
            persist_state="session",
        )
        return f"file:{place}"
    if choice in HUB_TEXTS:
        folder = st.text_input(
            "Folder of a local copy (else it is downloaded)",
            key="text_folder",
            placeholder="/data/wikitext",
            help="In the form of the hub: .parquet or .json files with the name of the split in theirs.",
            persist_state="session",
        )
        return f"{choice}:{folder}" if folder.strip() else str(choice)
    return str(choice)


def _sizes() -> tuple[int, int]:
    left, right = st.columns(2, gap="large")
    windows = left.number_input(
        "Calibration windows",
        min_value=1,
        value=_TEXT.calibration_windows,
        step=32,
        key="calibration_windows",
        help="Pieces of text that the statistics are measured on. More windows: steadier small eigenvalues, longer calibration.",
        persist_state="session",
    )
    context = right.number_input(
        "Context (tokens in a window)",
        min_value=2,
        value=_TEXT.context,
        step=64,
        key="context",
        help="BOS included. At most what the model takes.",
        persist_state="session",
    )
    return int(windows), int(context)


def _advanced() -> tuple[dict[str, object], CalibrationConfig, str]:
    with st.expander("Advanced"):
        first, second, third = st.columns(3)
        group = first.number_input(
            "Group size (windows)",
            min_value=1,
            value=_CALIBRATION.group_size,
            key="group_size",
            help="Consecutive windows in a group of the pooled covariance. A remainder forms its own group.",
        )
        weights = second.selectbox(
            "Group weights", GROUP_WEIGHTS, key="group_weights", help="equal: as in the paper; dof: by degrees of freedom."
        )
        batch = third.number_input(
            "Windows in a forward pass",
            min_value=1,
            value=_CALIBRATION.batch_size,
            key="batch_size",
            help="Changes speed and memory, not results.",
        )
        validation = first.number_input(
            "Search-validation windows",
            min_value=1,
            value=_TEXT.validation_windows,
            key="validation_windows",
            help="What a search sees in each trial.",
        )
        test = second.number_input(
            "Test windows", min_value=1, value=_TEXT.test_windows, key="test_windows", help="What final figures are measured on."
        )
        bos = third.selectbox(
            "BOS", BOS_RULES, key="bos", help="window: first in every window; none: nowhere; auto: as the tokenizer does."
        )
        seed = first.number_input("Seed", min_value=0, value=_TEXT.seed, key="text_seed", help="Of the draw of calibration windows.")
        robust = second.selectbox(
            "Robust pooling",
            ROBUST_RULES,
            key="robust",
            help="trimmed: without the tenth of the groups with the largest, and with the smallest, variance. "
            "downweighted: tokens far longer than their window's median count less.",
        )
        dtype = third.selectbox(
            "Weights held as",
            DTYPES,
            key="model_dtype",
            help="auto: float32 on a CPU, as stored on a GPU. bfloat16 halves the memory and rounds what is measured.",
        )
    text = {"validation_windows": int(validation), "test_windows": int(test), "bos": bos, "seed": int(seed)}
    return text, CalibrationConfig(group_size=int(group), group_weights=weights, batch_size=int(batch), robust=robust), dtype


def _checked(reference: str, text: str) -> tuple[ModelOnDisk | None, TextPreview | None, bool]:
    """Return what is known of model and text, and whether both can be used; say what is wrong with those that can't."""
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
        st.caption("Enter the path that is missing above.")
    return model, preview, checked == 2
