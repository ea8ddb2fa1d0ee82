"""Measured sensitivities as tables, and their rank correlation with estimates."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lowrank_core.metrics import metric_named
from lowrank_core.parameters import MatrixShape
from lowrank_core.runs import Run
from lowrank_core.sensitivity.config import MODULE, TYPE
from lowrank_core.sensitivity.records import SensitivityRecord, SensitivitySetting, read_records
from lowrank_core.spectra.spectrum import LayerSpectrum
from lowrank_core.studio.shared.formatting import DASH, count, number, percent
from lowrank_core.studio.shared.layer_map import LayerMap, layer_map
from lowrank_core.types import Vector

__all__ = [
    "ESTIMATES",
    "FEW_CELLS",
    "FLOOR",
    "Estimate",
    "at_ratio",
    "cell_table",
    "correlations",
    "coverage",
    "fullest",
    "depth_curves",
    "measured_costs",
    "measured_ratios",
    "module_curve",
    "protocol_words",
    "rho_words",
    "sensitivity_map",
    "setting_label",
    "spearman",
    "type_curves",
]

FLOOR = 1e-9
"""Nats per token; a smaller or negative divergence is rounding, and has no place on a log scale."""
FEW_CELLS = 10
"""Below so many modules a rank correlation says little."""


@dataclass(frozen=True)
class Estimate:
    """A proxy of a module's loss at a rank, computed without evaluating the model.

    Attributes:
        label: short; meaning: what it is.
        predicts: whether it is an estimate of the divergence itself, in nats.
    """

    name: str
    label: str
    meaning: str
    predicts: bool = False

    @property
    def axis(self) -> str:
        return f"{self.label}: predicted KL, nats per token" if self.predicts else f"{self.label}: {_AXES[self.name]}"


_SHARE = "share of energy removed"
_AXES = {"features_pooled": _SHARE, "features_sample": _SHARE, "weights": _SHARE, "features_absolute": "energy removed"}

ESTIMATES: Mapping[str, Estimate] = {
    estimate.name: estimate
    for estimate in (
        Estimate("features_pooled", "Features, pooled", "removed share of the eigenvalues of the pooled feature covariance"),
        Estimate("features_sample", "Features, sample", "removed share of the eigenvalues of the plain sample covariance"),
        Estimate("weights", "Weights", "removed share of the squared singular values of the weight"),
        Estimate("features_absolute", "Features, absolute", "sum of the removed eigenvalues of the pooled feature covariance"),
        Estimate("predicted", "Two-sided (K-FAC)", "K-FAC's second-order estimate of the KL divergence", predicts=True),
    )
}


def setting_label(setting: SensitivitySetting) -> str:
    return f"{metric_named(setting.basis).label}, {setting.storage} prices, {setting.windows} windows"


def protocol_words(setting: SensitivitySetting) -> str:
    """Return the protocol of measured cells, in one line."""
    top = f" over the {setting.top_k} likeliest tokens and the rest" if setting.top_k else ""
    return (
        f"KL divergence to the dense model{top}, nats per token, on {setting.protocol}; {setting.dtype}. Factors: "
        f"{metric_named(setting.basis).label}, each matrix by itself; kept parameters are counted as {setting.storage} storage."
    )


def cell_table(record: SensitivityRecord, matrices: Sequence[MatrixShape], spectra: Sequence[LayerSpectrum] | None = None) -> pd.DataFrame:
    """Return a row for each measured cell, in the order of measuring; with ``spectra`` each module's estimates at its rank.

    Columns: scope, name, kind, depth (NaN for a type), kept (asked for), kept_share, rank, matrices, kl (NaN where the model diverged),
    kl_stderr, seconds, error, ``shown`` (kl where a log scale has a place for it, else NaN), and the names in ``ESTIMATES``.
    """
    shapes = {shape.name: shape for shape in matrices}
    known = {spectrum.shape.name: spectrum for spectrum in spectra or ()}
    rows = []
    for cell in record.cells:
        shape = shapes.get(cell.name) if cell.scope == MODULE else None
        kl = np.nan if cell.kl is None else cell.kl
        rows.append(
            {
                "scope": cell.scope,
                "name": cell.name,
                "kind": shape.kind if shape else cell.name,
                "depth": float(shape.depth) if shape else np.nan,
                "kept": cell.kept,
                "kept_share": cell.kept_share,
                "rank": cell.rank,
                "matrices": cell.matrices,
                "kl": kl,
                "kl_stderr": np.nan if cell.kl_stderr is None else cell.kl_stderr,
                "shown": kl if kl > FLOOR else np.nan,
                **_energies(known.get(cell.name), cell.rank),
                "predicted": np.nan if cell.predicted is None else cell.predicted,
                "windows": record.setting.windows,
                "tokens": record.setting.tokens,
                "seconds": cell.seconds,
                "error": cell.error,
            }
        )
    return pd.DataFrame(rows, columns=list(rows[0]) if rows else list(_COLUMNS))


_COLUMNS = (
    *("scope", "name", "kind", "depth", "kept", "kept_share", "rank", "matrices", "kl", "kl_stderr", "shown"),
    *ESTIMATES,
    *("windows", "tokens", "seconds", "error"),
)


def _energies(spectrum: LayerSpectrum | None, rank: int) -> dict[str, float]:
    if spectrum is None:
        return dict.fromkeys(("features_pooled", "features_sample", "weights", "features_absolute"), np.nan)
    pooled = np.maximum(spectrum.feature_eigenvalues, 0.0)
    return {
        "features_pooled": _removed(pooled, rank),
        "features_sample": _removed(np.maximum(spectrum.feature_eigenvalues_sample, 0.0), rank),
        "weights": _removed(spectrum.weight_energy, rank),
        "features_absolute": float(pooled[rank:].sum()),
    }


def _removed(energies: Vector, rank: int) -> float:
    total = float(energies.sum())
    return float(energies[rank:].sum()) / total if total > 0 else 0.0


def measured_ratios(cells: pd.DataFrame, scope: str = MODULE) -> list[float]:
    """Return the kept ratios at which something of ``scope`` was measured, ascending."""
    return sorted({float(kept) for kept in cells.loc[cells["scope"] == scope, "kept"]})


def at_ratio(cells: pd.DataFrame, kept: float) -> pd.DataFrame:
    """Return the modules' cells at one of the ``measured_ratios``."""
    return cells[(cells["scope"] == MODULE) & np.isclose(cells["kept"].astype(float), kept)]


def sensitivity_map(cells: pd.DataFrame, matrices: Sequence[MatrixShape], kept: float) -> LayerMap:
    """Return measured KL at a kept ratio over depth and module type, on a log scale; NaN where it is not measured, or below ``FLOOR``."""
    rows = {str(row["name"]): row for row in at_ratio(cells, kept).to_dict("records")}
    values = [float(rows[shape.name]["shown"]) if shape.name in rows else np.nan for shape in matrices]
    labels = [_map_label(rows.get(shape.name)) for shape in matrices]
    return layer_map(matrices, values, labels, "KL, nats per token", log=True)


def _map_label(row: Mapping[Hashable, Any] | None) -> str:
    if row is None:
        return "not measured"
    if np.isnan(row["kl"]):
        return f"rank {row['rank']}: diverged"
    spread = "" if np.isnan(row["kl_stderr"]) else f" ± {number(row['kl_stderr'], 2)}"
    return f"rank {row['rank']}, {percent(row['kept_share'])} kept: {number(row['kl'])}{spread} nats"


def type_curves(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the cells of types, by type and kept share."""
    return cells[cells["scope"] == TYPE].sort_values(["kind", "kept_share"])


def module_curve(cells: pd.DataFrame, module: str) -> pd.DataFrame:
    """Return the cells of one module by kept share."""
    return cells[(cells["scope"] == MODULE) & (cells["name"] == module)].sort_values("kept_share")


def depth_curves(cells: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Return the modules' cells of one type by kept ratio and depth."""
    return cells[(cells["scope"] == MODULE) & (cells["kind"] == kind)].sort_values(["kept", "depth"])


def _ranks(values: Vector) -> Vector:
    """Return ranks from 1, equal values sharing their mean."""
    order = np.argsort(values, kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = np.arange(1, len(values) + 1)
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.bincount(group, ranks) / sizes)[group])


def spearman(first: Vector, second: Vector) -> float | None:
    """Return Spearman's ρ: Pearson's correlation of ranks, ties averaged; None for fewer than three pairs, or where one does not vary."""
    if len(first) < 3:
        return None
    x, y = (ranks - ranks.mean() for ranks in (_ranks(np.asarray(first)), _ranks(np.asarray(second))))
    norm = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum() / norm) if norm > 0 else None


def correlations(cells: pd.DataFrame, kept: float) -> pd.DataFrame:
    """Return for each estimate that is there Spearman's ρ with the measured KL over modules: at ``kept``, and over all ratios.

    Columns: estimate, label, meaning, rho, n, rho_all, n_all. Cells at or below ``FLOOR`` count as they are: only their order matters.
    """
    modules = cells[cells["scope"] == MODULE]
    rows = []
    for estimate in ESTIMATES.values():
        here, n = _correlation(at_ratio(cells, kept), estimate.name)
        everywhere, n_all = _correlation(modules, estimate.name)
        if n_all:
            names = {"estimate": estimate.name, "label": estimate.label, "meaning": estimate.meaning}
            rows.append({**names, "rho": here, "n": n, "rho_all": everywhere, "n_all": n_all})
    return pd.DataFrame(rows, columns=["estimate", "label", "meaning", "rho", "n", "rho_all", "n_all"])


def _correlation(cells: pd.DataFrame, estimate: str) -> tuple[float | None, int]:
    pairs = cells[["kl", estimate]].dropna()
    return spearman(pairs["kl"].to_numpy(float), pairs[estimate].to_numpy(float)), len(pairs)


def measured_costs(run: Run) -> dict[float, dict[str, float]]:
    """Return kept ratio -> module -> KL to the dense model (nats per token), from the run's newest measurement.

    Ratios ascend; modules that were not measured, or diverged, are left out; nothing is interpolated.

    Raises:
        RunError: a record is damaged.
    """
    records = read_records(run)
    result: dict[float, dict[str, float]] = {}
    for cell in records[0].cells if records else ():
        if cell.scope == MODULE and cell.kl is not None:
            result.setdefault(cell.kept, {})[cell.name] = cell.kl
    return dict(sorted(result.items()))


def fullest(costs: Mapping[float, Mapping[str, float]]) -> float | None:
    """Return the ratio with the most modules, on ties the one closest to a half; None without any."""
    return min(costs, key=lambda kept: (-len(costs[kept]), abs(kept - 0.5)), default=None)


def coverage(cells: pd.DataFrame, matrices: Sequence[MatrixShape], kept: float) -> str:
    """Return the measured part of the map in words."""
    result = at_ratio(cells, kept)
    diverged, below = int(result["kl"].isna().sum()), int((result["kl"] <= FLOOR).sum())
    words = [f"{count(len(result))} of {count(len(matrices))} modules measured"]
    words += [f"{diverged} diverged"] if diverged else []
    words += [f"{below} below {FLOOR:g} nats, which is rounding, and not coloured"] if below else []
    return ", ".join(words) + "."


def rho_words(rho: float | None, n: int) -> str:
    """Return a correlation with its sample size, and a warning if that is small."""
    few = ": few modules, so ρ is unreliable" if n < FEW_CELLS else ""
    return f"Spearman's ρ = {DASH if rho is None or np.isnan(rho) else format(rho, '.2f')} over {n} modules{few}"
