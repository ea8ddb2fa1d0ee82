"""Spectra of a layer's weight and features, and metrics of them. Numpy only.

Notation::

    σ_i   singular values of W, descending
    λ_i   eigenvalues of the output features' covariance W C Wᵀ, descending (C pooled: λ, C sample: λ')
    p_i   e_i / Σ e, with energies e_i = σ_i² or λ_i

    effective rank       exp(-Σ p_i log p_i)                 Roy & Vetterli 2007
    stable rank          Σ e_i / e_1                         Rudelson & Vershynin 2007
    participation ratio  (Σ e_i)² / Σ e_i²
    retained energy      Σ_{i<=r} e_i / Σ e_i
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lowrank_core.errors import RunError
from lowrank_core.files.archives import DAMAGE, read_archive, write_archive
from lowrank_core.parameters import MatrixShape
from lowrank_core.spectra.heavy_tails import TailFit, fit_tail
from lowrank_core.types import Vector

__all__ = [
    "SPECTRA_FILE",
    "WEIGHTS_FILE",
    "LayerSpectrum",
    "condition_number",
    "effective_rank",
    "load_spectra",
    "participation_ratio",
    "rank_for_energy",
    "retained_energy",
    "save_spectra",
    "stable_rank",
]

SPECTRA_FILE, WEIGHTS_FILE = "spectra.npz", "weight_spectra.npz"
"""Of a run: the spectra of a calibration, and those of weights alone, which are there until then."""

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class LayerSpectrum:
    """Spectra of one matrix; each a descending vector of min(d_out, d_in) or d_in values; those of features empty before a calibration.

    Attributes:
        shape: the matrix.
        weight_singular_values: σ of W, min(d_out, d_in) values.
        feature_eigenvalues: λ of W C Wᵀ with the pooled covariance of the input, min(d_out, d_in) values.
        feature_eigenvalues_sample: the same with the plain sample covariance.
        input_eigenvalues: eigenvalues of the pooled covariance of the input itself, d_in values.
        shuffled_singular_values: σ of a matrix with the entries of W in random places; None where it was not measured.
    """

    shape: MatrixShape
    weight_singular_values: Vector
    feature_eigenvalues: Vector
    feature_eigenvalues_sample: Vector
    input_eigenvalues: Vector
    shuffled_singular_values: Vector | None = None

    @property
    def calibrated(self) -> bool:
        """Whether there are spectra of features, too."""
        return self.feature_eigenvalues.size > 0

    @property
    def weight_energy(self) -> Vector:
        """σ², the energies of W."""
        return self.weight_singular_values**2

    @cached_property
    def weight_tail(self) -> TailFit | None:
        """The power law of the largest σ²; None where there is none to fit."""
        return fit_tail(self.weight_energy)

    @cached_property
    def feature_tail(self) -> TailFit | None:
        """The power law of the largest λ; None where there is none to fit."""
        return fit_tail(self.feature_eigenvalues)


def _proportions(energies: Vector) -> Vector:
    total = energies.sum()
    if not total > 0:
        return np.zeros_like(energies)
    return np.asarray(energies / total)


def condition_number(largest: float, smallest: float, width: int) -> float | None:
    """Return largest / smallest eigenvalue of a positive semi-definite (n, n) matrix, n = ``width``; None where it is singular.

    An eigenvalue of zero comes out as up to n·eps of the largest: their ratio would be rounding, some 1e17.
    """
    return largest / smallest if smallest > width * np.finfo(np.float64).eps * largest else None


def effective_rank(energies: Vector) -> float:
    """Return exp of the entropy of the normalised energies; 0 for a zero matrix."""
    p = _proportions(energies)
    positive = p[p > 0]
    return float(np.exp(-(positive * np.log(positive)).sum())) if positive.size else 0.0


def stable_rank(energies: Vector) -> float:
    """Return Σ e / e_1; 0 for a zero matrix."""
    return float(energies.sum() / energies[0]) if energies.size and energies[0] > 0 else 0.0


def participation_ratio(energies: Vector) -> float:
    """Return (Σ e)² / Σ e²; 0 for a zero matrix."""
    squares = float((energies**2).sum())
    return float(energies.sum() ** 2 / squares) if squares > 0 else 0.0


def retained_energy(energies: Vector) -> Vector:
    """Return the cumulative share at rank 1, 2, …; zeros for a zero matrix."""
    return np.minimum(1.0, np.cumsum(_proportions(energies)))


def rank_for_energy(energies: Vector, share: float) -> int:
    """Return the smallest rank that retains ``share`` of the energy; 0 for a zero matrix."""
    if not energies.size or not energies.sum() > 0:
        return 0
    kept = retained_energy(energies)
    return min(int(np.searchsorted(kept, share - 1e-12)) + 1, int(energies.size))


_OPTIONAL = ("shuffled_singular_values",)
_ARRAYS = tuple(f.name for f in fields(LayerSpectrum) if f.name not in ("shape", *_OPTIONAL))
_FORMAT = 2
"""1 (files that don't say) had no shuffled matrices. Raise it when an older reader would misread a file."""


def save_spectra(path: str | os.PathLike[str], spectra: Sequence[LayerSpectrum]) -> None:
    """Write spectra as one compressed numpy archive (float32: these are for drawing)."""
    arrays: dict[str, Array] = {
        "format": np.array(_FORMAT),
        "names": np.array([s.shape.name for s in spectra]),
        "kinds": np.array([s.shape.kind for s in spectra]),
        "shapes": np.array([[s.shape.depth, s.shape.d_out, s.shape.d_in, s.shape.bias] for s in spectra], dtype=np.int64),
        "experts": np.array([-1 if s.shape.expert is None else s.shape.expert for s in spectra], dtype=np.int64),
    }
    for index, spectrum in enumerate(spectra):
        for name in (*_ARRAYS, *_OPTIONAL):
            values = getattr(spectrum, name)
            if values is not None:
                arrays[f"{index}.{name}"] = values.astype(np.float32)
    write_archive(Path(path), arrays)


def load_spectra(path: str | os.PathLike[str]) -> tuple[LayerSpectrum, ...]:
    """Read what ``save_spectra`` wrote, now or in an earlier version; nothing is unpickled.

    Raises:
        RunError: the file is damaged, or of a later version.
    """
    try:
        archive = read_archive(path)
        later = "format" in archive and int(archive["format"].item()) > _FORMAT
        layers = () if later else tuple(_layers(archive))
    except DAMAGE as error:
        raise RunError(f"{path} can't be read: {error}. Delete the file and resume the run: it is computed again.") from error
    if later:
        raise RunError(f"{path} was written by a later version of the studio. Update the studio, or start the calibration again.")
    return layers


def _layers(archive: Mapping[str, Array]) -> Iterable[LayerSpectrum]:
    experts = archive["experts"] if "experts" in archive else [-1] * len(archive["names"])  # earlier versions knew none
    labels = zip(archive["names"], archive["kinds"], archive["shapes"], experts, strict=True)
    for index, (name, kind, (depth, d_out, d_in, bias), expert) in enumerate(labels):
        number = None if expert < 0 else int(expert)
        shape = MatrixShape(str(name), str(kind), int(depth), int(d_out), int(d_in), bool(bias), expert=number)
        parts = {part: archive[f"{index}.{part}"].astype(np.float64) for part in _ARRAYS}
        parts |= {part: archive[f"{index}.{part}"].astype(np.float64) for part in _OPTIONAL if f"{index}.{part}" in archive}
        bad = next((part for part, values in parts.items() if not np.isfinite(values).all()), None)
        if bad is not None:
            raise ValueError(f"it is damaged: {bad.replace('_', ' ')} of {name} hold NaN or Inf")
        yield LayerSpectrum(shape, **parts)
