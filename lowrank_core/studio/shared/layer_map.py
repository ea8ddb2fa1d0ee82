"""Data of a layer x module map: one value per compressible matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from lowrank_core.parameters import MatrixShape

__all__ = ["LayerMap", "layer_map"]


@dataclass(frozen=True)
class LayerMap:
    """Values over depth and module type.

    Attributes:
        measure: what is shown, with its unit, for the colour bar.
        frame: columns module, kind, depth, value (NaN where there is none), label (the value in words).
        percent: whether values are fractions in [0, 1], to be shown as percent.
        low, high: ends of the colour scale.
        log: whether colours follow the logarithm; then a value that is not positive has no colour.
    """

    measure: str
    frame: pd.DataFrame
    percent: bool = False
    low: float = 0.0
    high: float = 1.0
    log: bool = False

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
