"""How much energy a rank keeps: features against weights, and pooled against sample covariance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lowrank_core.accounting import MatrixShape, Unit
from lowrank_core.spectra import LayerSpectrum, retained_energy
from lowrank_core.views.formatting import percent
from lowrank_core.views.spectrum import log_ranks

__all__ = ["EnergyAtRank", "EnergyCurves", "PoolingCurves", "energy_at_rank", "energy_curves", "pooling_curves"]

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class EnergyCurves:
    """Retained energy, in [0, 1], at ``ranks``; ``left`` is 1 - retained, from the tail itself: no cancellation."""

    shape: MatrixShape
    ranks: npt.NDArray[np.int64]
    features: Vector
    weights: Vector
    features_left: Vector
    weights_left: Vector


def _left(energies: Vector) -> Vector:
    """Return Σ_{i>r} e_i / Σ e_i at r = 1, 2, …, summed from the small end."""
    total = float(energies.sum())
    if not total > 0:
        return np.zeros_like(energies)
    tail = np.cumsum(energies[::-1])[::-1]
    return np.append(tail[1:], 0.0) / total


def energy_curves(spectrum: LayerSpectrum) -> EnergyCurves:
    """Return cumulative energies of features and weights of a module."""
    ranks = log_ranks(spectrum.shape.max_rank)
    features, weights = np.maximum(spectrum.feature_eigenvalues, 0.0), spectrum.weight_energy
    return EnergyCurves(
        spectrum.shape,
        ranks,
        retained_energy(features)[ranks - 1],
        retained_energy(weights)[ranks - 1],
        _left(features)[ranks - 1],
        _left(weights)[ranks - 1],
    )


@dataclass(frozen=True)
class EnergyAtRank:
    """What is kept at one rank; ``parameters_kept`` counts two plain factors against W and may exceed 1."""

    rank: int
    share_of_full_rank: float
    features_kept: float
    weights_kept: float
    features_left: float
    weights_left: float
    parameters_kept: float
    above_break_even: bool

    def sentence(self) -> str:
        """Return the same in words."""
        cost = percent(self.parameters_kept, 0)
        price = f"two factors cost {cost} of the dense parameters" + (
            ": more than they save, so the matrix stays dense" if self.above_break_even else ""
        )
        kept = f"features keep {percent(self.features_kept)} of their energy, weights {percent(self.weights_kept)}"
        return f"At rank {self.rank} ({percent(self.share_of_full_rank, 0)} of full rank) {kept}; {price}."


def energy_at_rank(spectrum: LayerSpectrum, rank: int) -> EnergyAtRank:
    """Return the energies at ``rank``, in [1, full rank]."""
    shape = spectrum.shape
    features, weights = np.maximum(spectrum.feature_eigenvalues, 0.0), spectrum.weight_energy
    return EnergyAtRank(
        rank=rank,
        share_of_full_rank=rank / shape.max_rank,
        features_kept=float(retained_energy(features)[rank - 1]),
        weights_kept=float(retained_energy(weights)[rank - 1]),
        features_left=float(_left(features)[rank - 1]),
        weights_left=float(_left(weights)[rank - 1]),
        parameters_kept=Unit((shape,)).parameters(rank) / shape.dense_parameters,
        above_break_even=rank > shape.break_even_rank,
    )


@dataclass(frozen=True)
class PoolingCurves:
    """√ eigenvalues of the features' covariance, pooled and sample, both over the first of the sample's."""

    ranks: npt.NDArray[np.int64]
    pooled: Vector
    sample: Vector


def pooling_curves(spectrum: LayerSpectrum) -> PoolingCurves:
    """Return both spectra on the sample's scale, so that a loss of total energy by pooling shows."""
    ranks = log_ranks(spectrum.shape.max_rank)
    first = float(np.sqrt(max(spectrum.feature_eigenvalues_sample[0], 0.0))) if spectrum.feature_eigenvalues_sample.size else 0.0

    def scaled(eigenvalues: Vector) -> Vector:
        roots = np.sqrt(np.maximum(eigenvalues, 0.0))[ranks - 1]
        return np.where(roots > 0, roots / first, np.nan) if first > 0 else np.full(ranks.size, np.nan)

    return PoolingCurves(ranks, scaled(spectrum.feature_eigenvalues), scaled(spectrum.feature_eigenvalues_sample))
