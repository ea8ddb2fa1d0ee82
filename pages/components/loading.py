"""Cached loads, keyed by path and modification time: arrays are never hashed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import streamlit as st

from lowrank_core.allocation.curves import CURVES_FILE, CurveRecord, load_curves
from lowrank_core.config import SearchConfig
from lowrank_core.parameters import Unit
from lowrank_core.runs import Run
from lowrank_core.spectra.spectrum import SPECTRA_FILE, WEIGHTS_FILE, LayerSpectrum, load_spectra
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studies.variables import Importances, read_importances
from lowrank_core.studio.overview.checkpoint import ModelOnDisk, read_model
from lowrank_core.studio.overview.source_checks import local_model
from lowrank_core.studio.overview.text_preview import TextPreview, text_preview
from lowrank_core.studio.shared.allocation_map import allocation_map, allocation_of
from lowrank_core.studio.shared.model_facts import model_facts
from lowrank_core.studio.shared.thumbnail_chart import thumbnail

__all__ = ["curves_of", "importances_of", "model_on_disk", "pictures_of", "preview_of", "spectra_of", "weight_spectra_of"]


@st.cache_resource(max_entries=4, show_spinner=False)
def _spectra(path: str, changed: int) -> tuple[LayerSpectrum, ...]:
    # A resource, not data: frozen values that nobody writes to, so that a redraw copies no arrays.
    return load_spectra(Path(path))


def spectra_of(run: Run) -> tuple[LayerSpectrum, ...] | None:
    """Return the spectra of ``run``; None before its calibration is done.

    Raises:
        RunError: the file is damaged.
    """
    path = run.path / SPECTRA_FILE
    changed = _changed(path)
    return None if changed is None else _spectra(str(path), changed)


def weight_spectra_of(run: Run) -> tuple[LayerSpectrum, ...]:
    """Return the spectra of weights of the blocks that are done, before the calibration of ``run`` is; none before the first.

    Raises:
        RunError: the file is damaged.
    """
    path = run.path / WEIGHTS_FILE
    changed = _changed(path)
    return () if changed is None else _spectra(str(path), changed)


def _changed(path: Path) -> int | None:
    """Return when ``path`` was written; None where it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


@st.cache_resource(max_entries=8, show_spinner=False)
def _model(place: str, changed: int) -> ModelOnDisk:
    return read_model(Path(place))


def model_on_disk(reference: str) -> ModelOnDisk | None:
    """Return a local model's contents from its headers, None for a hub id not downloaded yet.

    Raises:
        ModelError: there is no such folder, file or hub id, or it holds no model that can be compressed.
    """
    place = local_model(reference)
    if place is None:
        return None
    files = [path for path in place.iterdir() if path.suffix in (".json", ".safetensors")] if place.is_dir() else [place]
    return _model(str(place), max((path.stat().st_mtime_ns for path in files), default=0))


@st.cache_resource(max_entries=8, show_spinner="Reading the text")
def _preview(reference: str, changed: int) -> TextPreview:
    return text_preview(reference)


def preview_of(reference: str) -> TextPreview:
    """Return beginning and size of a text.

    Raises:
        TextError: it can't be read.
    """
    place = Path(reference.partition(":")[2]).expanduser()
    return _preview(reference, place.stat().st_mtime_ns if place.is_file() else 0)


@st.cache_resource(max_entries=8, show_spinner=False)
def _importances(path: str, measured: int) -> Importances:
    return read_importances(Run(Path(path)))


def importances_of(run: Run, trials: Sequence[TrialRecord]) -> Importances:
    """Return the importance of each variable over the measured ``trials``.

    Raises:
        RunError: the study is damaged.
    """
    return _importances(str(run.path), sum(trial.finished for trial in trials))


@st.cache_resource(max_entries=2000, show_spinner=False)
def _picture(path: str, number: int, begun: float | None, _trial: TrialRecord, _units: Sequence[Unit]) -> str:
    return thumbnail(allocation_map(allocation_of(_trial, _units), _units))


def pictures_of(run: Run, trials: Sequence[TrialRecord], search: SearchConfig) -> dict[int, str]:
    """Return thumbnails of the trials' allocations, drawn once; none before the model is loaded.

    Raises:
        RunError: model.json is damaged.
        ConfigError: a trial's ranks do not fit the model.
    """
    facts = model_facts(run)
    if facts is None:
        return {}
    units = facts.units(search.compression)
    return {trial.number: _picture(str(run.path), trial.number, trial.started, trial, units) for trial in trials if trial.ranks}


@st.cache_resource(max_entries=4, show_spinner=False)
def _curves(path: str, changed: int) -> CurveRecord | None:
    return load_curves(Path(path))


def curves_of(run: Run) -> CurveRecord | None:
    """Return the error curves of ``run``; None where its worker has not written them.

    Raises:
        RunError: the file is damaged.
    """
    path = run.path / CURVES_FILE
    changed = _changed(path)
    return None if changed is None else _curves(str(path), changed)
