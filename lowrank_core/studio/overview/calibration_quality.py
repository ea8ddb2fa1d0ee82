"""Calibration quality from calibration.json: tokens per dimension, condition, effect of pooling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import pandas as pd

from lowrank_core.config import TOKENS_PER_DIMENSION
from lowrank_core.config.mapping import build
from lowrank_core.parameters import MatrixShape
from lowrank_core.runs import Run
from lowrank_core.spectra.spectrum import LayerSpectrum, condition_number
from lowrank_core.studio.shared.formatting import DASH, count, duration, kind_label, number
from lowrank_core.studio.shared.layer_map import LayerMap, layer_map
from lowrank_core.studio.shared.table import Column, Metrics, Table, frame_of
from lowrank_core.types import Vector

__all__ = [
    "CalibrationFacts",
    "InputFacts",
    "QUALITIES",
    "Quality",
    "calibration_facts",
    "group_table",
    "input_table",
    "inputs_spec",
    "quality_map",
    "quality_metrics",
    "quality_table",
    "quality_warnings",
]


@dataclass(frozen=True)
class InputFacts:
    """Statistics of one distinct input, shared by ``layers``.

    Attributes:
        condition: of the pooled covariance; None where it is singular up to rounding.
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

    @property
    def readers(self) -> str:
        """Number of modules that read it, in words."""
        return "1 module" if len(self.layers) == 1 else f"{len(self.layers)} modules"


@dataclass(frozen=True)
class CalibrationFacts:
    """Summary of a calibration; ``cached``: statistics of an earlier run were reused."""

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
    def min_tokens_per_dimension(self) -> float | None:
        return min((entry.tokens_per_dimension for entry in self.inputs), default=None)

    @property
    def worst_condition(self) -> float | None:
        """The largest finite one."""
        return max((entry.condition for entry in self.inputs if entry.condition is not None), default=None)

    @property
    def condition_words(self) -> str:
        """The worst condition: infinite where an input's covariance is singular, with how many are."""
        singular = sum(entry.condition is None for entry in self.inputs)
        return f"∞ ({singular} of {len(self.inputs)} singular)" if singular else number(self.worst_condition, 2)

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
    inputs = tuple(_without_rounding(build(InputFacts, entry, "calibration.json")) for entry in body.get("inputs", []))
    return build(CalibrationFacts, body, "calibration.json", inputs=inputs)


def _without_rounding(entry: InputFacts) -> InputFacts:
    """Return the same without a condition that is rounding of a singular covariance: earlier versions recorded it as a number."""
    return entry if entry.condition is None else replace(entry, condition=condition_number(entry.condition, 1.0, entry.width))


def quality_table(facts: CalibrationFacts) -> pd.DataFrame:
    """Return a row for each distinct input."""
    return frame_of(
        facts.inputs,
        input="input_group",
        width="width",
        modules=lambda entry: len(entry.layers),
        tokens_per_dimension="tokens_per_dimension",
        condition="condition",
        pooled_to_sample="pooled_to_sample",
    )


_COLUMNS = (
    Column.text("input", "Input", width="medium"),
    Column.text("kind", "Read by"),
    Column.whole("depth", "Block"),
    Column.whole("width", "Width"),
    Column.whole("modules", "Modules that read it"),
    Column.number("tokens_per_dimension", "Tokens per dimension", 1),
    Column("thin", "Too few", "flag", f"Fewer than {TOKENS_PER_DIMENSION} tokens per dimension."),
    Column("condition", "Condition", "scientific", digits=3),
    Column("damped_condition", "After damping", "scientific", digits=3),
    Column.number("pooled_to_sample", "Pooled to sample distance", 4, "Relative Frobenius distance of the two covariances.", 3),
)


def inputs_spec(frame: pd.DataFrame) -> Table:
    """Return ``quality_table`` or ``input_table`` as it is shown."""
    return Table(frame, _COLUMNS, "Statistics of each distinct input", "calibration-inputs")


def quality_warnings(facts: CalibrationFacts) -> list[str]:
    """Return warnings on the quality of the statistics."""
    if facts.warnings:
        return list(facts.warnings)
    thin = [entry for entry in facts.inputs if entry.tokens_per_dimension < TOKENS_PER_DIMENSION]
    if not thin:
        return []
    minimum = min(thin, key=lambda entry: entry.tokens_per_dimension)
    return [
        f"{len(thin)} of {len(facts.inputs)} inputs saw fewer than {TOKENS_PER_DIMENSION} tokens per dimension "
        f"(minimum: {number(minimum.tokens_per_dimension)} at {minimum.input_group}, {minimum.width} wide). "
        "Small eigenvalues are noisy there; use more calibration windows."
    ]


def quality_metrics(facts: CalibrationFacts) -> Metrics:
    """Return how well the statistics are known."""
    took = "from the cache" if facts.cached else f"in {duration(facts.seconds)}"
    return {
        "Calibration tokens": (count(facts.tokens), f"{facts.tokens:,} in {facts.windows} windows, measured {took}."),
        "Tokens per dimension": (
            number(facts.min_tokens_per_dimension),
            f"Minimum over all inputs; below {TOKENS_PER_DIMENSION}, small eigenvalues are noisy.",
        ),
        "Worst condition": (
            facts.condition_words,
            "Largest over smallest eigenvalue of a covariance, the largest over all inputs.",
        ),
        "Groups × windows": (
            f"{facts.groups} × {min(facts.group_size, facts.windows)}",
            f"Weights: {facts.group_weights}. Pooled within groups.",
        ),
    }


def group_table(entry: InputFacts) -> pd.DataFrame:
    """Return a row for each group of windows: its number from 1, tokens, and its trace relative to the groups' mean."""
    frame = pd.DataFrame({"group": range(1, len(entry.group_traces) + 1), "trace": entry.group_traces}, columns=["group", "trace"])
    frame["tokens"] = list(entry.group_tokens) if len(entry.group_tokens) == len(frame) else None
    mean = float(frame["trace"].mean()) if len(frame) else 0.0
    frame["relative"] = frame["trace"] / mean if mean > 0 else 0.0
    return frame


@dataclass(frozen=True)
class Quality:
    """A metric of an input, in a column of ``input_table``; ``logarithm`` shows its decimal logarithm."""

    label: str
    measure: str
    meaning: str
    logarithm: bool = False


QUALITIES: Mapping[str, Quality] = MappingProxyType(
    {
        "tokens_per_dimension": Quality(
            "Tokens per dimension", "Tokens per dimension", f"below {TOKENS_PER_DIMENSION}, small eigenvalues are noise"
        ),
        "condition": Quality(
            "Condition number",
            "log₁₀ of the condition number",
            "largest over smallest eigenvalue of the pooled covariance; its inverse is unreliable where this is large",
            logarithm=True,
        ),
        "damped_condition": Quality(
            "Condition number after damping",
            "log₁₀ of the condition number",
            "the same after adding the damping in use to every eigenvalue, as methods that invert the covariance do",
            logarithm=True,
        ),
        "pooled_to_sample": Quality(
            "Pooled to sample distance", "Relative Frobenius distance", "how much pooling within groups changed the covariance"
        ),
    }
)


def input_table(facts: CalibrationFacts, spectra: Sequence[LayerSpectrum], damping: float | None = None) -> pd.DataFrame:
    """Return a row for each distinct input that ``spectra`` know, with its place in the model.

    Columns input, kind (module types that read it), depth, width, modules, tokens_per_dimension, condition, damped_condition (NaN
    without ``damping``, which is relative to the mean eigenvalue), pooled_to_sample, thin (whether too few tokens were seen).
    """
    known = {spectrum.shape.name: spectrum for spectrum in spectra}
    inputs = [entry for entry in facts.inputs if any(layer in known for layer in entry.layers)]
    readers = [[known[layer] for layer in entry.layers if layer in known] for entry in inputs]
    frame = quality_table(replace(facts, inputs=tuple(inputs)))
    frame.insert(1, "kind", [", ".join(dict.fromkeys(kind_label(each.shape.kind) for each in alike)) for alike in readers])
    frame.insert(2, "depth", [first.shape.depth for first, *_ in readers])
    frame["damped_condition"] = [_damped(first.input_eigenvalues, damping) for first, *_ in readers]
    frame["thin"] = frame["tokens_per_dimension"] < TOKENS_PER_DIMENSION
    return frame.astype(dict.fromkeys(QUALITIES, float))


def _damped(values: Vector, damping: float | None) -> float | None:
    """Return (λ_1 + δ) / (λ_n + δ), δ = damping times the mean eigenvalue; None where that is not finite."""
    if damping is None or not values.size:
        return None
    added = damping * float(values.mean())
    minimum = float(values[-1]) + added
    return (float(values[0]) + added) / minimum if minimum > 0 else None


def quality_map(facts: CalibrationFacts, table: pd.DataFrame, name: str, chosen: str) -> LayerMap:
    """Return one of QUALITIES over depth and inputs (``input_table``); an input stands for ``chosen`` where that reads it."""
    quality = QUALITIES[name]
    readers = {entry.input_group: entry.layers for entry in facts.inputs}
    values = [_shown(value, logarithm=quality.logarithm) for value in table[name]]
    labels = [
        f"{number(value)}, {width} wide, read by {kind}" if math.isfinite(value) else f"{DASH} not finite"
        for value, width, kind in zip(table[name], table["width"], table["kind"], strict=True)
    ]
    shapes = [
        MatrixShape(chosen if chosen in readers[group] else readers[group][0], str(kind), int(depth), int(width), int(width))
        for group, kind, depth, width in zip(table["input"], table["kind"], table["depth"], table["width"], strict=True)
    ]
    view = layer_map(shapes, values, labels, quality.measure)
    low = min([0.0, *(value for value in values if math.isfinite(value))])
    return replace(view, low=low, of_experts="min" if name == "tokens_per_dimension" else "mean")


def _shown(value: float, *, logarithm: bool) -> float:
    if not math.isfinite(value) or (logarithm and value <= 0):
        return math.nan
    return math.log10(value) if logarithm else value
