"""Where a model is low-rank: metrics over all modules, and the spectra of a single one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from lowrank_core.accounting import MatrixShape
from lowrank_core.spectra import LayerSpectrum, effective_rank, participation_ratio, rank_for_energy, stable_rank
from lowrank_core.views.formatting import number, percent
from lowrank_core.views.layermap import LayerMap, layer_map

__all__ = [
    "METRICS",
    "SOURCES",
    "Metric",
    "ScreeCurves",
    "atlas",
    "atlas_table",
    "log_ranks",
    "module_facts",
    "scree_curves",
    "spectrum_named",
]

Vector = npt.NDArray[np.float64]

ALWAYS_DRAWN = 32  # the ranks where spectra fall fastest
CURVE_POINTS = 200


@dataclass(frozen=True)
class Metric:
    """A figure of a descending vector of energies, in ranks."""

    name: str
    label: str
    meaning: str
    of: Callable[[Vector], float]


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("effective_rank", "Effective rank", "exp of the entropy of the energies", effective_rank),
        Metric("stable_rank", "Stable rank", "all energy over the largest", stable_rank),
        Metric(
            "participation_ratio", "Participation ratio", "squared sum of the energies over the sum of their squares", participation_ratio
        ),
        Metric(
            "rank_90",
            "Rank for 90 % energy",
            "the smallest rank that retains 90 %",
            lambda energies: float(rank_for_energy(energies, 0.90)),
        ),
        Metric(
            "rank_95",
            "Rank for 95 % energy",
            "the smallest rank that retains 95 %",
            lambda energies: float(rank_for_energy(energies, 0.95)),
        ),
        Metric(
            "rank_99",
            "Rank for 99 % energy",
            "the smallest rank that retains 99 %",
            lambda energies: float(rank_for_energy(energies, 0.99)),
        ),
    )
}

SOURCES: dict[str, str] = {"features": "Features (outputs)", "weights": "Weights"}


def _energies(spectrum: LayerSpectrum, source: str) -> Vector:
    return spectrum.feature_eigenvalues if source == "features" else spectrum.weight_energy


def atlas_table(spectra: Sequence[LayerSpectrum], metric: str) -> pd.DataFrame:
    """Return a row for each module: the metric of features and weights, in ranks and relative to full rank."""
    rows = []
    for spectrum in spectra:
        shape = spectrum.shape
        values = {source: METRICS[metric].of(_energies(spectrum, source)) for source in SOURCES}
        rows.append(
            {
                "module": shape.name,
                "kind": shape.kind,
                "depth": shape.depth,
                "shape": f"{shape.d_out} × {shape.d_in}",
                "full_rank": shape.max_rank,
                "break_even": shape.break_even_rank,
                **values,
                **{f"{source}_relative": value / shape.max_rank for source, value in values.items()},
            }
        )
    return pd.DataFrame(rows)


def atlas(spectra: Sequence[LayerSpectrum], metric: str, source: str, *, relative: bool) -> LayerMap:
    """Return the map of ``metric`` (a name in METRICS) of ``source`` (a name in SOURCES)."""
    table = atlas_table(spectra, metric)
    values = table[f"{source}_relative" if relative else source]
    measure = "Share of full rank" if relative else "Ranks"
    labels = [
        f"{number(ranks)} of {full} ranks ({percent(share, 0)})"
        for ranks, full, share in zip(table[source], table["full_rank"], table[f"{source}_relative"], strict=True)
    ]
    return layer_map([spectrum.shape for spectrum in spectra], list(values), labels, measure, percent=relative)


def spectrum_named(spectra: Sequence[LayerSpectrum], module: str) -> LayerSpectrum:
    return next(spectrum for spectrum in spectra if spectrum.shape.name == module)


def log_ranks(full: int, points: int = CURVE_POINTS) -> npt.NDArray[np.int64]:
    """Return about ``points`` ranks from 1 to ``full``: the first 32 all, the rest log-spaced, the last always."""
    if full <= max(points, ALWAYS_DRAWN):
        return np.arange(1, full + 1)
    spaced = np.geomspace(ALWAYS_DRAWN, full, points - ALWAYS_DRAWN).round().astype(np.int64)
    return np.unique(np.concatenate([np.arange(1, ALWAYS_DRAWN + 1), spaced]))


def _normalised(values: Vector, ranks: npt.NDArray[np.int64]) -> Vector:
    """Return values over the first; NaN (a gap) where nothing is left, as a log axis has no zero."""
    if not values.size or not values[0] > 0:
        return np.full(ranks.size, np.nan)
    chosen = values[ranks - 1] / values[0]
    return np.where(chosen > 0, chosen, np.nan)


@dataclass(frozen=True)
class ScreeCurves:
    """Singular values of W and √ feature eigenvalues over their first, at ``ranks``."""

    shape: MatrixShape
    ranks: npt.NDArray[np.int64]
    weights: Vector
    features: Vector


def scree_curves(spectrum: LayerSpectrum) -> ScreeCurves:
    """Return both spectra of a module on one scale."""
    ranks = log_ranks(spectrum.shape.max_rank)
    features = np.sqrt(np.maximum(spectrum.feature_eigenvalues, 0.0))
    return ScreeCurves(spectrum.shape, ranks, _normalised(spectrum.weight_singular_values, ranks), _normalised(features, ranks))


def module_facts(spectrum: LayerSpectrum) -> dict[str, tuple[str, str]]:
    """Return what characterises a module: label -> value in words, meaning."""
    shape, features, weights = spectrum.shape, spectrum.feature_eigenvalues, spectrum.weight_energy
    ranks = [effective_rank(features), effective_rank(weights), rank_for_energy(features, 0.95), rank_for_energy(weights, 0.95)]
    return {
        "Shape (out × in)": (f"{shape.d_out} × {shape.d_in}", f"{shape.dense_parameters:,} parameters."),
        "Break-even rank": (f"{shape.break_even_rank}", "The largest rank whose two factors cost less than the matrix."),
        "Effective rank, features / weights": (f"{number(ranks[0])} / {number(ranks[1])}", METRICS["effective_rank"].meaning),
        "Rank for 95 %, features / weights": (f"{ranks[2]} / {ranks[3]}", METRICS["rank_95"].meaning),
    }
