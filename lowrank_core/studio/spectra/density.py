"""Eigenvalue density of a module, next to that of a random matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from lowrank_core.spectra.heavy_tails import bulk_density, bulk_edges, outliers
from lowrank_core.spectra.spectrum import LayerSpectrum
from lowrank_core.studio.spectra.map_metrics import energies_of, tail_words
from lowrank_core.types import Vector

__all__ = ["Density", "density", "density_table"]

_BINS_PER_DECADE = 12
_FLOOR = 1e-6  # of the mean: what lies below is rounding, or as good as nothing
_BULK_POINTS = 160


@dataclass(frozen=True)
class Density:
    """Eigenvalues over their mean, by decades.

    Attributes:
        source: ``weights`` (σ²) or ``features`` (λ).
        edges: of the bins (bins + 1,), log-spaced, in units of the mean eigenvalue.
        shares: share of all eigenvalues per decade in each bin (bins,).
        below: share of eigenvalues too small to be drawn.
        bulk: columns x, share_per_decade of a random matrix with the same variance of entries; empty for features.
        bulk_edge: x₊ of it; None for features.
        beyond: how many eigenvalues are outliers of the bulk; None for features.
        tail_from: where the fitted power law begins; None without one.
        tail: the fit in words.
    """

    source: str
    edges: Vector
    shares: Vector
    below: float
    bulk: pd.DataFrame
    bulk_edge: float | None
    beyond: int | None
    tail_from: float | None
    tail: str


def density(spectrum: LayerSpectrum, source: str) -> Density | None:
    """Return the density of σ² (with the Marchenko-Pastur law) or of λ; None for a matrix of zeros."""
    energies = energies_of(spectrum, source)
    mean = float(energies.mean()) if energies.size else 0.0
    if not mean > 0:
        return None
    scaled = energies / mean
    drawn = scaled[scaled > _FLOOR]
    edges, shares = _histogram(drawn, scaled.size)
    fit = spectrum.feature_tail if source == "features" else spectrum.weight_tail
    aspect = spectrum.shape.max_rank / max(spectrum.shape.d_out, spectrum.shape.d_in)
    random = source == "weights"
    return Density(
        source,
        edges,
        shares,
        below=1 - drawn.size / scaled.size,
        bulk=_bulk(aspect) if random else pd.DataFrame(columns=["x", "share_per_decade"]),
        bulk_edge=bulk_edges(aspect)[1] if random else None,
        beyond=outliers(energies, spectrum.shape.d_out, spectrum.shape.d_in) if random else None,
        tail_from=fit.minimum / mean if fit is not None else None,
        tail=tail_words(spectrum, source),
    )


def _histogram(values: Vector, total: int) -> tuple[Vector, Vector]:
    """Return log-spaced edges and the share of ``total`` values per decade in each bin."""
    low, high = float(np.log10(values.min())), float(np.log10(values.max()))
    bins = max(1, round(min((high - low) * _BINS_PER_DECADE, 2 * values.size**0.5)))
    edges = np.linspace(low - 1e-9, high + 1e-9, bins + 1)
    counts, _ = np.histogram(np.log10(values), edges)
    return 10.0**edges, counts / total / np.diff(edges)


def _bulk(aspect: float) -> pd.DataFrame:
    """Return ρ(x) x ln 10, the Marchenko-Pastur law per decade, log-spaced within its edges."""
    low, high = bulk_edges(aspect)
    x = np.geomspace(max(low, 1e-3), high, _BULK_POINTS)
    return pd.DataFrame({"x": x, "share_per_decade": bulk_density(x, aspect) * x * np.log(10)})


def density_table(result: Density) -> pd.DataFrame:
    """Return a row for each bin: from, to (in units of the mean eigenvalue), share of eigenvalues per decade."""
    return pd.DataFrame({"from": result.edges[:-1], "to": result.edges[1:], "share_per_decade": result.shares})
