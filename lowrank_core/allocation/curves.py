"""The error curves that allocators trade, as a small file of a run: for pages that predict what an allocation costs. Torch-free.

Notation::

    e_u(r)   error of unit u at rank r, in the metric of the run's basis; dense leaves none
    b_u      break-even rank of unit u: no allocation has a larger one
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lowrank_core.errors import RunError
from lowrank_core.files.archives import DAMAGE, read_archive, write_archive
from lowrank_core.parameters import Unit

__all__ = ["CURVES_FILE", "ESTIMATES", "CurveRecord", "load_curves", "save_curves"]

CURVES_FILE = "curves.npz"

ESTIMATES = ("kl", "error_weights", "own")
"""Meanings of an error: K-FAC's estimate of the KL divergence; weighted by a measured ΔKL/Δe; in a unit per matrix."""


@dataclass(frozen=True)
class CurveRecord:
    """Errors of every unit of a run.

    Attributes:
        basis: name of the basis in whose metric errors are.
        estimate: one of ``ESTIMATES``; with the first two, errors are in nats per token and may be added up.
        curves: unit -> errors e_0 … e_(b+1) (as far as there are ranks), exact: allocators choose by them as the worker would.
        influence: of each block, by depth; empty where it was not measured.
    """

    basis: str
    estimate: str
    curves: Mapping[str, npt.NDArray[np.float64]]
    influence: tuple[float, ...] = ()

    @property
    def predicts(self) -> bool:
        """Whether the sum of errors estimates the KL divergence to the dense model."""
        return self.estimate != "own"

    def error(self, unit: str, rank: int | None) -> float | None:
        """Return e_u(rank), 0 where it stays dense; None where it is not known."""
        if rank is None:
            return 0.0
        curve = self.curves.get(unit)
        return None if curve is None or rank >= len(curve) else float(curve[rank])

    def energy(self, unit: str, rank: int | None) -> float | None:
        """Return the fraction 1 - e_u(rank)/e_u(0) of the energy that is kept, in [0, 1]; None where it is not known."""
        left, curve = self.error(unit, rank), self.curves.get(unit)
        if left is None or curve is None:
            return None
        return 1.0 if not curve[0] > 0 else float(min(1.0, max(0.0, 1 - left / curve[0])))


def save_curves(path: str | os.PathLike[str], record: CurveRecord, units: Sequence[Unit]) -> None:
    """Write the curves of ``units`` as one compressed numpy archive, cut behind the break-even rank.

    Raises:
        OSError: the disk is full or read-only.
    """
    kept = {unit.name: record.curves[unit.name][: unit.break_even_rank + 2] for unit in units if unit.name in record.curves}
    about = {"basis": record.basis, "estimate": record.estimate, "units": list(kept), "lengths": [len(curve) for curve in kept.values()]}
    errors = np.concatenate([*kept.values(), np.zeros(0)]).astype(np.float64)
    influence = np.array(record.influence, dtype=np.float64)
    write_archive(Path(path), {"about": np.array(json.dumps(about)), "errors": errors, "influence": influence})


def load_curves(path: str | os.PathLike[str]) -> CurveRecord | None:
    """Read what ``save_curves`` wrote, nothing unpickled; None where the run has no such file.

    Raises:
        RunError: the file is damaged.
    """
    try:
        archive = read_archive(path)
        about, errors, influence = json.loads(str(archive["about"])), archive["errors"], archive["influence"]
        return _record(about, errors.astype(np.float64), influence.astype(np.float64))
    except FileNotFoundError:
        return None
    except DAMAGE as error:
        raise RunError(f"{path} can't be read: {error}. Delete the file and start the run's worker: it writes the file again.") from error


def _record(about: Mapping[str, object], errors: npt.NDArray[np.float64], influence: npt.NDArray[np.float64]) -> CurveRecord:
    units, lengths, estimate = about["units"], about["lengths"], about["estimate"]
    if not isinstance(units, list) or not isinstance(lengths, list) or estimate not in ESTIMATES:
        raise ValueError("it holds no error curves")
    if sum(lengths) != len(errors) or not np.isfinite(errors).all():
        raise ValueError("its curves are not complete")
    parts = np.split(errors, np.cumsum(lengths)[:-1]) if lengths else []
    return CurveRecord(str(about["basis"]), str(estimate), dict(zip(units, parts, strict=True)), tuple(influence.tolist()))
