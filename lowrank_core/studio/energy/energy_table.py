"""Retained energy by rank, of features and weights, and of pooled and sample covariance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lowrank_core.parameters import Unit
from lowrank_core.spectra.spectrum import LayerSpectrum, retained_energy
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studio.shared.formatting import number, percent
from lowrank_core.studio.shared.table import frame_of
from lowrank_core.studio.shared.trial_names import kind_of, trial_label
from lowrank_core.studio.spectra.spectrum_table import log_ranks
from lowrank_core.types import Vector

__all__ = ["EnergyAtRank", "MeasuredLoss", "energy_at_rank", "energy_band", "energy_curves", "measured_loss", "pooling_curves"]

_BAND_POINTS = 100
_ALIKE = 0.01
"""Kept fractions this close are one and the same: whole ranks don't meet a ratio exactly."""


def _left(energies: Vector) -> Vector:
    """Return Σ_{i>r} e_i / Σ e_i at r = 1, 2, …, summed from the small end."""
    total = float(energies.sum())
    if not total > 0:
        return np.zeros_like(energies)
    tail = np.cumsum(energies[::-1])[::-1]
    return np.append(tail[1:], 0.0) / total


def energy_curves(spectrum: LayerSpectrum) -> pd.DataFrame:
    """Return a row for each drawn rank: energy in [0, 1] of features and of weights that is kept, and removed.

    Columns rank, features_kept, weights_kept, features_removed, weights_removed; the last two from the tail itself: no cancellation.
    """
    ranks = log_ranks(spectrum.shape.max_rank)
    energies = {"features": np.maximum(spectrum.feature_eigenvalues, 0.0), "weights": spectrum.weight_energy}
    kept = {f"{source}_kept": retained_energy(values)[ranks - 1] for source, values in energies.items()}
    removed = {f"{source}_removed": _left(values)[ranks - 1] for source, values in energies.items()}
    return pd.DataFrame({"rank": ranks, **kept, **removed})


def energy_band(spectra: Sequence[LayerSpectrum], kind: str) -> pd.DataFrame:
    """Return the quartiles of the energy over all modules of type ``kind``, at hundredths of their full rank.

    Columns rank_share (in (0, 1]), source (``features`` or ``weights``), then low, median and high (quartiles) of ``kept`` and of
    ``removed``: kept_low, kept_median, …
    """
    alike = [spectrum for spectrum in spectra if spectrum.shape.kind == kind]
    shares = np.arange(1, _BAND_POINTS + 1) / _BAND_POINTS
    frames = []
    for source in ("features", "weights"):
        kept, left = zip(*(_at_shares(spectrum, source, shares) for spectrum in alike), strict=True)
        columns: dict[str, object] = {"rank_share": shares, "source": source}
        for name, rows in (("kept", kept), ("removed", left)):
            low, median, high = np.quantile(np.stack(rows), (0.25, 0.5, 0.75), axis=0)
            columns |= {f"{name}_low": low, f"{name}_median": median, f"{name}_high": high}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def _at_shares(spectrum: LayerSpectrum, source: str, shares: Vector) -> tuple[Vector, Vector]:
    """Return energy kept and left at shares of full rank, the rank rounded up."""
    energies = np.maximum(spectrum.feature_eigenvalues, 0.0) if source == "features" else spectrum.weight_energy
    ranks = np.ceil(shares * spectrum.shape.max_rank - 1e-9).astype(np.int64)
    return retained_energy(energies)[ranks - 1], _left(energies)[ranks - 1]


@dataclass(frozen=True)
class EnergyAtRank:
    """Energy retained at one rank; ``parameters_kept`` counts two plain factors against W and may exceed 1."""

    rank: int
    share_of_full_rank: float
    features_kept: float
    weights_kept: float
    features_left: float
    weights_left: float
    parameters_kept: float
    above_break_even: bool

    def sentence(self) -> str:
        """The energies in a sentence."""
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


def pooling_curves(spectrum: LayerSpectrum) -> pd.DataFrame:
    """Return √ eigenvalues of the features' covariance, pooled and sample, over the sample's first: columns rank, pooled, sample."""
    ranks = log_ranks(spectrum.shape.max_rank)
    first = float(np.sqrt(max(spectrum.feature_eigenvalues_sample[0], 0.0))) if spectrum.feature_eigenvalues_sample.size else 0.0

    def scaled(eigenvalues: Vector) -> Vector:
        roots = np.sqrt(np.maximum(eigenvalues, 0.0))[ranks - 1]
        return np.where(roots > 0, roots / first, np.nan) if first > 0 else np.full(ranks.size, np.nan)

    pooled, sample = scaled(spectrum.feature_eigenvalues), scaled(spectrum.feature_eigenvalues_sample)
    return pd.DataFrame({"rank": ranks, "pooled": pooled, "sample": sample})


@dataclass(frozen=True)
class MeasuredLoss:
    """Trials whose kept fraction is nearest to a requested one.

    Attributes:
        kept: fraction of the compressible linears' parameters that they keep.
        asked: the fraction that was asked for.
        frame: columns name, kept, kl (nats per token), perplexity: baselines and manual allocations, and the best of the sampled
            ones; the lowest loss first.
    """

    kept: float
    asked: float
    frame: pd.DataFrame

    def sentence(self) -> str:
        """Return what the numbers are of."""
        return (
            f"Energy is not a loss. The factors at this rank keep {percent(self.asked)} of the module's parameters; the nearest that was "
            f"measured are whole models that keep {percent(self.kept)} of all compressible linears', "
            f"{number(100 * abs(self.kept - self.asked))} points away."
        )


def measured_loss(trials: Sequence[TrialRecord], kept: float) -> MeasuredLoss | None:
    """Return the trials nearest to keeping ``kept`` of the parameters (above 1 counts as 1); None without measurements."""
    kept = min(1.0, kept)
    done = [(1 - trial.compression_ratio, trial) for trial in trials if trial.finished and trial.compression_ratio is not None]
    if not done:
        return None
    nearest = min((share for share, _ in done), key=lambda share: (abs(share - kept), share))
    near = sorted((trial for share, trial in done if abs(share - nearest) <= _ALIKE), key=_loss)
    sampled = [trial for trial in near if kind_of(trial) not in ("baseline", "manual")]
    shown = [trial for trial in near if trial not in sampled[1:]]
    frame = frame_of(
        shown, name=trial_label, kept=lambda trial: 1 - (trial.compression_ratio or 0.0), kl="kl", perplexity="perplexity"
    ).astype({"kl": float, "perplexity": float})
    return MeasuredLoss(nearest, kept, frame)


def _loss(trial: TrialRecord) -> tuple[float, int]:
    return trial.value if trial.value is not None else float("inf"), trial.number
