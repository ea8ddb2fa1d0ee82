"""Rank metrics over all modules, and the spectra of a single one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from lowrank_core.parameters import MatrixShape, Unit
from lowrank_core.spectra.heavy_tails import bulk_edges, entry_variance
from lowrank_core.spectra.spectrum import LayerSpectrum, effective_rank, rank_for_energy
from lowrank_core.studio.shared.formatting import DASH, number
from lowrank_core.studio.shared.layer_map import LayerMap, layer_map
from lowrank_core.studio.shared.module_choices import RunFacts
from lowrank_core.studio.shared.table import Column, Metrics, Table
from lowrank_core.studio.spectra.map_metrics import METRICS, SOURCES, Metric, Reading
from lowrank_core.types import Vector

__all__ = [
    "METRICS",
    "SOURCES",
    "RankMark",
    "ScreeCurves",
    "atlas",
    "atlas_spec",
    "atlas_table",
    "log_ranks",
    "module_facts",
    "rank_marks",
    "scree_curves",
    "scree_table",
    "spectrum_named",
]

ALWAYS_DRAWN = 32  # the ranks where spectra fall fastest
CURVE_POINTS = 200
_NOTHING = RunFacts()
_ITS_OWN = "value"


def _readings(spectra: Sequence[LayerSpectrum], metric: Metric, source: str, facts: RunFacts) -> list[Reading | None]:
    return [metric.read(spectrum, source, facts) for spectrum in spectra]


def _columns(metric: Metric) -> dict[str, str]:
    """Return column -> source of a metric."""
    return {source: source for source in metric.sources} or {_ITS_OWN: ""}


def atlas_table(spectra: Sequence[LayerSpectrum], metric: str, facts: RunFacts = _NOTHING) -> pd.DataFrame:
    """Return a row for each module: the metric of each source (``features``, ``weights``), or of the module itself (``value``).

    Metrics that count ranks are there as a share of full rank, too (``features_relative``). NaN where a metric is not defined.
    """
    result = METRICS[metric]
    table = pd.DataFrame(
        {
            "module": [spectrum.shape.name for spectrum in spectra],
            "kind": [spectrum.shape.kind for spectrum in spectra],
            "depth": [spectrum.shape.depth for spectrum in spectra],
            "shape": [f"{spectrum.shape.d_out} × {spectrum.shape.d_in}" for spectrum in spectra],
            "full_rank": [spectrum.shape.max_rank for spectrum in spectra],
            "break_even": [spectrum.shape.break_even_rank for spectrum in spectra],
        }
    )
    for column, source in _columns(result).items():
        readings = _readings(spectra, result, source, facts)
        table[column] = [math.nan if reading is None else reading.value for reading in readings]
    for column in _columns(result) if result.ranks else ():
        table[f"{column}_relative"] = table[column] / table["full_rank"]
    return table


def atlas_spec(spectra: Sequence[LayerSpectrum], metric: str, facts: RunFacts = _NOTHING) -> Table:
    """Return ``atlas_table`` as it is shown."""
    result = METRICS[metric]
    measure, decimals = ("ranks", 1) if result.ranks else (result.measure, 2)
    columns = (
        Column.text("module", "Module", width="medium"),
        Column.short("shape", "Shape (out × in)"),
        Column.number("features", f"Features ({measure})", decimals),
        Column.share("features_relative", "Features, of full rank"),
        Column.number("weights", f"Weights ({measure})", decimals),
        Column.share("weights_relative", "Weights, of full rank"),
        Column.share(_ITS_OWN, result.measure) if result.share else Column.number(_ITS_OWN, result.measure),
        Column.whole("break_even", "Break-even rank"),
    )
    return Table(atlas_table(spectra, metric, facts), columns, f"{result.label} of every module", "spectra")


def atlas(spectra: Sequence[LayerSpectrum], metric: str, source: str, *, relative: bool, facts: RunFacts = _NOTHING) -> LayerMap:
    """Return the map of ``metric`` (a name in METRICS) for ``source``, if it has any.

    ``relative`` shows ranks as a share of full rank. What is not defined is NaN, and says why.
    """
    result = METRICS[metric]
    readings = _readings(spectra, result, source, facts)
    relative = relative and result.ranks
    values = [
        math.nan if reading is None else reading.value / (spectrum.shape.max_rank if relative else 1)
        for spectrum, reading in zip(spectra, readings, strict=True)
    ]
    labels = [f"{DASH} {result.missing}" if reading is None else reading.words for reading in readings]
    measure = "Share of full rank" if relative else result.measure
    view = layer_map([spectrum.shape for spectrum in spectra], values, labels, measure, percent=relative or result.share, log=result.log)
    finite = [value for value in values if math.isfinite(value)]
    return view if result.from_zero or result.log or not finite else replace(view, low=min(finite))


def spectrum_named(spectra: Sequence[LayerSpectrum], module: str) -> LayerSpectrum:
    return next(spectrum for spectrum in spectra if spectrum.shape.name == module)


def log_ranks(full: int, points: int = CURVE_POINTS) -> npt.NDArray[np.int64]:
    """Return about ``points`` ranks from 1 to ``full``: the first 32 all, the rest log-spaced, the last always."""
    if full <= max(points, ALWAYS_DRAWN):
        return np.arange(1, full + 1)
    spaced = np.geomspace(ALWAYS_DRAWN, full, points - ALWAYS_DRAWN).round().astype(np.int64)
    return np.unique(np.concatenate([np.arange(1, ALWAYS_DRAWN + 1), spaced]))


def _normalised(values: Vector, ranks: npt.NDArray[np.int64], by: float | None = None) -> Vector:
    """Return values over the first, or ``by``; zeros are NaN, as a log axis has none."""
    by = by if by is not None else float(values[0]) if values.size else 0.0
    if not by > 0:
        return np.full(ranks.size, np.nan)
    chosen = values[ranks - 1] / by
    return np.where(chosen > 0, chosen, np.nan)


@dataclass(frozen=True)
class RankMark:
    """A marked rank with its label."""

    rank: int
    label: str


def rank_marks(shape: MatrixShape, facts: RunFacts = _NOTHING) -> tuple[RankMark, ...]:
    """Return the break-even ranks of plain and pivoted factors, and the chosen trial's rank; by rank."""
    pivoted = Unit((shape,), storage="pivoted").break_even_rank
    choice = facts.choices.get(shape.name)
    marks = [RankMark(shape.break_even_rank, "break-even rank"), RankMark(pivoted, "pivoted break-even rank")]
    if choice is not None and choice.rank is not None:
        marks.append(RankMark(choice.rank, f"{facts.trial}: rank"))
    return tuple(sorted((mark for mark in marks if mark.rank > 0), key=lambda mark: mark.rank))


@dataclass(frozen=True)
class ScreeCurves:
    """Singular values of W and √ feature eigenvalues over their first, at ``ranks``.

    Attributes:
        shuffled: singular values of W with its entries in random places, over the first of W; None where they were not measured.
        bulk_edge: √x₊ N s² of the Marchenko-Pastur law, over the first of W; None for a matrix of zeros.
        marks: ranks to be marked.
    """

    shape: MatrixShape
    ranks: npt.NDArray[np.int64]
    weights: Vector
    features: Vector
    shuffled: Vector | None = None
    bulk_edge: float | None = None
    marks: tuple[RankMark, ...] = ()


def scree_curves(spectrum: LayerSpectrum, facts: RunFacts = _NOTHING) -> ScreeCurves:
    """Return both spectra of a module on one scale, with the random-matrix reference and marked ranks."""
    shape, weights = spectrum.shape, spectrum.weight_singular_values
    ranks = log_ranks(shape.max_rank)
    features = np.sqrt(np.maximum(spectrum.feature_eigenvalues, 0.0))
    first = float(weights[0]) if weights.size else 0.0
    shuffled = spectrum.shuffled_singular_values
    return ScreeCurves(
        shape,
        ranks,
        _normalised(weights, ranks),
        _normalised(features, ranks),
        _normalised(shuffled, ranks, first) if shuffled is not None else None,
        _bulk_edge(spectrum) / first if first > 0 else None,
        rank_marks(shape, facts),
    )


def _bulk_edge(spectrum: LayerSpectrum) -> float:
    """Return √(x₊ N s²), the largest singular value of a large random matrix with the variance of W's entries."""
    shape = spectrum.shape
    minimum, maximum = shape.max_rank, max(shape.d_out, shape.d_in)
    variance = entry_variance(spectrum.weight_energy, shape.d_out, shape.d_in)
    return math.sqrt(bulk_edges(minimum / maximum)[1] * maximum * variance)


def scree_table(curves: ScreeCurves) -> pd.DataFrame:
    """Return a row for each drawn rank, without unmeasured columns."""
    frame = pd.DataFrame({"rank": curves.ranks, "weights": curves.weights, "features": curves.features})
    if curves.shuffled is not None:
        frame["shuffled_weights"] = curves.shuffled
    if curves.bulk_edge is not None:
        frame["bulk_edge"] = curves.bulk_edge
    return frame


def module_facts(spectrum: LayerSpectrum) -> Metrics:
    """Return shape and ranks of a module."""
    shape, features, weights = spectrum.shape, spectrum.feature_eigenvalues, spectrum.weight_energy
    known = [features, weights] if spectrum.calibrated else [weights]
    of = "features / weights" if spectrum.calibrated else "weights"
    return {
        "Shape (out × in)": (f"{shape.d_out} × {shape.d_in}", f"{shape.dense_parameters:,} parameters."),
        "Break-even rank": (f"{shape.break_even_rank}", "The largest rank whose two factors cost less than the matrix."),
        f"Effective rank, {of}": (" / ".join(number(effective_rank(energies)) for energies in known), METRICS["effective_rank"].meaning),
        f"Rank for 95 %, {of}": (" / ".join(str(rank_for_energy(energies, 0.95)) for energies in known), METRICS["rank_95"].meaning),
    }
