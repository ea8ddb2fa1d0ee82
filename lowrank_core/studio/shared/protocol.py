"""Protocol lines of charts and tables."""

from __future__ import annotations

from lowrank_core.runs import Run
from lowrank_core.studio.overview.calibration_quality import calibration_facts
from lowrank_core.studio.overview.text_facts import bos_words, text_facts, trial_windows
from lowrank_core.studio.shared.model_facts import model_facts

__all__ = ["spectra_protocol", "trial_protocol"]


def spectra_protocol(run: Run) -> str:
    """Return the protocol line of spectra: model, text, tokens, dtype.

    Raises:
        RunError: a file of the run is damaged.
    """
    model, text, calibration = model_facts(run), text_facts(run), calibration_facts(run)
    words = [
        f"Model {model.reference} held as {model.dtype}" if model else "",
        f"{text.reference}, calibration split, context {text.context}, {bos_words(text.bos)}" if text else "",
        f"{calibration.tokens:,} tokens" if calibration else "",
        "statistics in float64",
    ]
    return "; ".join(word for word in words if word) + "."


def trial_protocol(run: Run) -> str:
    """Return the protocol line of trials: text, windows, tokens, dtype.

    Raises:
        RunError: a file of the run is damaged.
    """
    model, text, search, windows = model_facts(run), text_facts(run), run.config.search, trial_windows(run)
    dtype = "bfloat16 (autocast)" if search is not None and search.autocast else model.dtype if model else ""
    words = [
        f"{text.reference}, validation split" if text else "validation split",
        f"{windows.words}, {bos_words(text.bos)}" if text and windows else "",
        f"model {model.reference} held as {dtype}" if model else "",
        f"KL on the {search.top_k} likeliest tokens and the rest: a lower bound" if search is not None and search.top_k else "",
    ]
    return "; ".join(word for word in words if word) + "."
