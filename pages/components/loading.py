"""Loads that are kept between redraws, keyed by path and time of change: arrays are never hashed."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from lowrank_core.runs import Run
from lowrank_core.spectra import LayerSpectrum, load_spectra

__all__ = ["spectra_of"]


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
