"""Data of a layer x module map: one value per compressible matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import pandas as pd

from lowrank_core.parameters import MatrixShape
from lowrank_core.studio.shared.formatting import number, percent

__all__ = ["LayerMap", "layer_map"]


@dataclass(frozen=True)
class LayerMap:
    """Values over depth and module type.

    Attributes:
        measure: what is shown, with its unit, for the colour bar.
        frame: columns module, kind, depth, value (NaN where there is none), label (the value in words); a row for each matrix.
        percent: whether values are fractions in [0, 1], to be shown as percent.
        low, high: ends of the colour scale.
        log: whether colours follow the logarithm; then a value that is not positive has no colour.
        of_experts: what stands in the one cell of a mixture's experts, their mean or their min.
    """

    measure: str
    frame: pd.DataFrame
    percent: bool = False
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    of_experts: Literal["mean", "min"] = "mean"

    @property
    def title(self) -> str:
        """``measure``, and what the experts of a mixture are shown by."""
        return f"{self.measure} ({self.of_experts} of experts)" if len(self.cells) < len(self.frame) else self.measure

    @cached_property
    def cells(self) -> pd.DataFrame:
        """``frame`` with one row for each type in a block: ``of_experts`` of a mixture, which stands for the first of them."""
        alike = self.frame.groupby(["kind", "depth"], sort=False)
        if len(alike) == len(self.frame):
            return self.frame
        cells = alike.agg(module=("module", "first"), value=("value", self.of_experts), label=("label", "first")).reset_index()
        spread = [self._spread(group["value"]) if len(group) > 1 else "" for _, group in alike]
        return cells.assign(label=[words or label for words, label in zip(spread, cells["label"], strict=True)])

    def _spread(self, values: pd.Series[float]) -> str:
        known = values.dropna()
        if known.empty:
            return f"{len(values)} experts: not defined"
        words = percent if self.percent else number
        return f"{len(values)} experts: {words(known.min())} to {words(known.max())}, mean {words(known.mean())}"

    @property
    def kinds(self) -> list[str]:
        """Module types in the order of the model."""
        return list(dict.fromkeys(self.frame["kind"]))

    @property
    def depths(self) -> list[int]:
        return sorted({int(depth) for depth in self.frame["depth"]})


def layer_map(
    shapes: Sequence[MatrixShape],
    values: Sequence[float],
    labels: Sequence[str],
    measure: str,
    *,
    percent: bool = False,
    full_scale: bool = False,
    log: bool = False,
) -> LayerMap:
    """Return a map of ``values``, one for each of ``shapes``; the scale begins at 0 and ends at the largest, at 1 where ``full_scale``.

    A ``log`` scale begins at the smallest positive value.
    """
    frame = pd.DataFrame(
        {
            "module": [shape.name for shape in shapes],
            "kind": [shape.kind for shape in shapes],
            "depth": [shape.depth for shape in shapes],
            "value": list(values),
            "label": list(labels),
        }
    )
    largest = max((value for value in values if math.isfinite(value)), default=1.0)
    if log:
        minimum = min((value for value in values if math.isfinite(value) and value > 0), default=largest)
        return LayerMap(measure, frame, percent, minimum, largest, log=True)
    return LayerMap(measure, frame, percent, 0.0, 1.0 if full_scale else largest or 1.0)
