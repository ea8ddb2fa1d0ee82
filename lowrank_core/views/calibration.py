"""How good a calibration is: tokens per dimension, condition, and what pooling changed; from calibration.json."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from lowrank_core.config import TOKENS_PER_DIMENSION
from lowrank_core.runs import Run
from lowrank_core.views.formatting import number
from lowrank_core.views.records import build

__all__ = [
    "CalibrationFacts",
    "InputFacts",
    "calibration_facts",
    "group_table",
    "quality_table",
    "quality_warnings",
]


@dataclass(frozen=True)
class InputFacts:
    """Statistics of one distinct input, shared by ``layers``.

    Attributes:
        condition: of the pooled covariance; None where its least eigenvalue is zero.
        group_traces: trace of each group's covariance, in the order of the windows.
        pooled_to_sample: relative Frobenius distance between pooled and sample covariance; 0 with a single group.
    """

    input_group: str
    width: int
    layers: tuple[str, ...]
    tokens_per_dimension: float
    condition: float | None = None
    group_tokens: tuple[int, ...] = ()
    group_traces: tuple[float, ...] = ()
    pooled_to_sample: float | None = None


@dataclass(frozen=True)
class CalibrationFacts:
    """Figures of a calibration; ``cached`` says that statistics of an earlier run were taken."""

    tokens: int
    windows: int
    seconds: float
    cached: bool
    group_size: int
    group_weights: str
    inputs: tuple[InputFacts, ...]
    warnings: tuple[str, ...] = ()

    @property
    def groups(self) -> int:
        """Number of groups of the pooled covariance."""
        return max((len(entry.group_traces) for entry in self.inputs), default=0)

    @property
    def least_tokens_per_dimension(self) -> float | None:
        return min((entry.tokens_per_dimension for entry in self.inputs), default=None)

    @property
    def worst_condition(self) -> float | None:
        return max((entry.condition for entry in self.inputs if entry.condition is not None), default=None)

    def input_of(self, module: str) -> InputFacts | None:
        """Return the input that ``module`` reads."""
        return next((entry for entry in self.inputs if module in entry.layers), None)


def calibration_facts(run: Run) -> CalibrationFacts | None:
    """Return the facts in calibration.json, or None before the calibration is done.

    Raises:
        RunError: the file is damaged.
    """
    body = run.part("calibration")
    if body is None:
        return None
    inputs = tuple(build(InputFacts, entry, "calibration.json") for entry in body.get("inputs", []))
    return build(CalibrationFacts, body, "calibration.json", inputs=inputs)


def quality_table(facts: CalibrationFacts) -> pd.DataFrame:
    """Return a row for each distinct input."""
    rows = [
        {
            "input": entry.input_group,
            "width": entry.width,
            "modules": len(entry.layers),
            "tokens_per_dimension": entry.tokens_per_dimension,
            "condition": entry.condition,
            "pooled_to_sample": entry.pooled_to_sample,
        }
        for entry in facts.inputs
    ]
    return pd.DataFrame(rows, columns=["input", "width", "modules", "tokens_per_dimension", "condition", "pooled_to_sample"])


def quality_warnings(facts: CalibrationFacts) -> list[str]:
    """Return what a reader of the spectra should know first."""
    if facts.warnings:
        return list(facts.warnings)
    thin = [entry for entry in facts.inputs if entry.tokens_per_dimension < TOKENS_PER_DIMENSION]
    if not thin:
        return []
    least = min(thin, key=lambda entry: entry.tokens_per_dimension)
    return [
        f"{len(thin)} of {len(facts.inputs)} inputs saw fewer than {TOKENS_PER_DIMENSION} tokens per dimension "
        f"(the least: {number(least.tokens_per_dimension)} at {least.input_group}, {least.width} wide). "
        "Small eigenvalues are noisy there; use more calibration windows."
    ]


def group_table(entry: InputFacts) -> pd.DataFrame:
    """Return a row for each group of windows: its number from 1, tokens, and its trace relative to the groups' mean."""
    frame = pd.DataFrame({"group": range(1, len(entry.group_traces) + 1), "trace": entry.group_traces}, columns=["group", "trace"])
    frame["tokens"] = list(entry.group_tokens) if len(entry.group_tokens) == len(frame) else None
    mean = float(frame["trace"].mean()) if len(frame) else 0.0
    frame["relative"] = frame["trace"] / mean if mean > 0 else 0.0
    return frame
