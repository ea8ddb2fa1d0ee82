"""Loads that are kept between redraws, keyed by path and time of change: arrays are never hashed."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from lowrank_core.curves import CURVES_FILE, CurveRecord, load_curves
from lowrank_core.runs import Run
from lowrank_core.spectra import LayerSpectrum, load_spectra

__all__ = ["curves_of", "spectra_of"]


@st.cache_resource(max_entries=4, show_spinner=False)
def _spectra(path: str, changed: int) -> tuple[LayerSpectrum, ...]:
    # A resource, not data: frozen values that nobody writes to, so that a redraw copies no arrays.
    return load_spectra(Path(path))


def spectra_of(run: Run) -> tuple[LayerSpectrum, ...] | None:
    """Return the spectra of ``run``, or None before its calibration is done.

    Raises:
        RunError: the file is damaged.
    """
    path = run.path / "spectra.npz"
    try:
        changed = path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
    return _spectra(str(path), changed)


@st.cache_resource(max_entries=4, show_spinner=False)
def _curves(path: str, changed: int) -> CurveRecord | None:
    return load_curves(Path(path))


def curves_of(run: Run) -> CurveRecord | None:
    """Return the error curves of ``run``; None where its worker has not written them.

    Raises:
        RunError: the file is damaged.
    """
    path = run.path / CURVES_FILE
    try:
        changed = path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
    return _curves(str(path), changed)
