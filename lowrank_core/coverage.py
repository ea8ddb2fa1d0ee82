"""Compressible parameters of a model, and reasons for the others: a table that sums to all parameters. Torch-free.

Every parameter is of one kind. A loaded model is classified by its modules and by a pass through it (``models.walk``), a checkpoint on
disk by the names and shapes in its headers (``studio.overview.checkpoint``); what only names and shapes can tell is decided here, for both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

__all__ = [
    "COMPRESSIBLE",
    "KINDS",
    "MIN_OUTPUTS",
    "Coverage",
    "CoverageRow",
    "Kind",
    "coverage_lines",
    "has_experts",
    "kind_by_name",
    "shown",
]

MIN_OUTPUTS = 16
"""A map with fewer outputs (a one-row gate, a router over few experts) is left alone: its two factors save nothing that counts."""

_MIN_SHARE = 0.5
"""Of the parameters outside the embeddings: below it, a ratio of the linears says little of the model, and that is a warning."""


@dataclass(frozen=True)
class Kind:
    """Kind of a parameter.

    Attributes:
        label: plural, as in "routers 0.1 %".
        why: in words, why it is left alone; empty where it is not.
    """

    label: str
    why: str = ""


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "linear": Kind("compressible linears"),
        "lowrank": Kind("low-rank layers", "low-rank already"),
        "expert": Kind("compressible linears of experts"),
        "experts": Kind("other experts", "their class can't be taken apart into linear layers"),
        "router": Kind("routers", "a router chooses the experts"),
        "narrow": Kind("narrow maps", f"fewer than {MIN_OUTPUTS} outputs: two factors save nothing that counts"),
        "convolution": Kind("convolutions", "no linear map of one token"),
        "recurrence": Kind("recurrences", "the state of a recurrence, no linear map"),
        "shared": Kind("shared layers", "one matrix that several layers of the model share"),
        "unreached": Kind(
            "not reached", "no layer call of a pass over random tokens reads it, or none with a gradient, so it can't be calibrated"
        ),
        "special": Kind("special linears", "its class computes something else than a linear layer does"),
        "embedding": Kind("embeddings", "a table, no linear map"),
        "tied": Kind("tied embeddings", "embedding and head are one matrix"),
        "head": Kind("the head", "outside the blocks"),
        "vector": Kind("norms, biases and other vectors", "no matrix"),
        "outside": Kind("outside the blocks", "only the decoder's blocks are compressed"),
        "other": Kind("other weights", "not the matrix of a linear layer"),
        "unrecorded": Kind("the rest", "this record is of an earlier version, which did not say what it is made of"),
    }
)
"""Name -> kind, in the order of the table."""

COMPRESSIBLE = ("linear", "expert", "lowrank")
"""Kinds counted by a compression ratio: compressible linears, those of experts among them, and low-rank ones."""

_TABLES = ("embedding", "tied", "head")
_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
_ROUTER = re.compile(r"(^|\.)(router|gate)(\.|$)")
_CONVOLUTION = re.compile(r"(^|[._])conv\w*(\.weight|\.bias|_weight|_bias)$")
_RECURRENCE = re.compile(r"(^|\.)(A_log|A|D|dt_bias|time_\w+|recurrent_\w+|input_gate_\w+)$")


@dataclass(frozen=True)
class CoverageRow:
    """A kind of parameters: how many, and their share of the model in [0, 1]."""

    kind: str
    label: str
    parameters: int
    share: float
    why: str


@dataclass(frozen=True)
class Coverage:
    """Parameters of a model by kind.

    Attributes:
        parameters: kind -> how many; they add up to all parameters of the model.
    """

    parameters: Mapping[str, int]

    @classmethod
    def of(cls, counted: Iterable[tuple[str, int]]) -> Coverage:
        """Return the table of (kind, parameters) pairs, in the order of ``KINDS``."""
        sums: dict[str, int] = {}
        for kind, parameters in counted:
            sums[kind] = sums.get(kind, 0) + parameters
        order = [*KINDS, *(kind for kind in sums if kind not in KINDS)]
        return cls({kind: sums[kind] for kind in order if sums.get(kind)})

    @classmethod
    def unrecorded(cls, compressible: int, total: int) -> Coverage:
        """Return what an older record tells: how much is compressible, and no more."""
        return cls.of([("linear", compressible), ("unrecorded", total - compressible)])

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    @property
    def compressible(self) -> int:
        """Parameters counted by a compression ratio."""
        return sum(self.parameters.get(kind, 0) for kind in COMPRESSIBLE)

    @property
    def share(self) -> float:
        """Compressible parameters, as a fraction of the model."""
        return self.compressible / self.total if self.total else 0.0

    @property
    def inner_share(self) -> float:
        """Compressible parameters, as a fraction of those outside embeddings and head."""
        inner = self.total - sum(self.parameters.get(kind, 0) for kind in _TABLES)
        return self.compressible / inner if inner else 0.0

    @property
    def rows(self) -> tuple[CoverageRow, ...]:
        """Return a row for each kind that the model has."""
        total = max(1, self.total)
        kinds = {kind: KINDS.get(kind, Kind(kind)) for kind in self.parameters}
        return tuple(
            CoverageRow(kind, kinds[kind].label, parameters, parameters / total, kinds[kind].why)
            for kind, parameters in self.parameters.items()
        )

    def of_model(self, compression_ratio: float) -> float:
        """Return the fraction of the whole model that goes with a fraction of the compressible linears."""
        return compression_ratio * self.share

    def statement(self) -> str:
        """Return how much can be compressed, and what can't, the largest part first."""
        left = sorted((row for row in self.rows if row.kind not in COMPRESSIBLE), key=lambda row: -row.parameters)
        rest = ", ".join(f"{row.label} {shown(row.share)}" for row in left)
        return f"{shown(self.share)} of the model's parameters can be compressed; not compressible: {rest or 'none'}"

    def ratio_words(self, compression_ratio: float) -> str:
        """Return what a ratio means: ``30.0 % of the compressible linears = 1.0 % of the model``."""
        return f"{shown(compression_ratio)} of the compressible linears = {shown(self.of_model(compression_ratio))} of the model"

    def warning(self, compression_ratio: float | None = None) -> str | None:
        """Return a warning where most of what is not an embedding can't be compressed, else None."""
        left = [row for row in self.rows if row.kind not in (*COMPRESSIBLE, *_TABLES)]
        if self.inner_share >= _MIN_SHARE or not left:
            return None
        maximum = max(left, key=lambda row: row.parameters)
        why = f" ({maximum.why})" if maximum.why else ""
        meaning = "" if compression_ratio is None else f" {self.ratio_words(compression_ratio)}."
        return (
            f"only {shown(self.inner_share)} of the parameters outside the embeddings can be compressed; "
            f"the largest part that can't: {maximum.label}, {shown(maximum.share)} of the model{why}.{meaning}"
        )

    @classmethod
    def from_mapping(cls, rows: Iterable[Mapping[str, object]]) -> Coverage:
        """Return the table that ``to_mapping`` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        return cls.of((str(row["kind"]), int(str(row["parameters"]))) for row in rows)

    def to_mapping(self) -> list[dict[str, object]]:
        """Return the table ready for JSON."""
        return [{"kind": r.kind, "label": r.label, "parameters": r.parameters, "share": r.share, "why": r.why} for r in self.rows]


def coverage_lines(coverage: Coverage) -> list[str]:
    """Return the table for a terminal, and what it says in a sentence."""
    lines = [f"{'what the model is made of':42} {'parameters':>14} {'share':>8}  why it is left alone"]
    lines += [f"{row.label:42} {row.parameters:>14,} {shown(row.share):>8}  {row.why}".rstrip() for row in coverage.rows]
    return [*lines, f"{coverage.statement()}."]


def shown(fraction: float) -> str:
    """Return a fraction in percent: one decimal, or two digits below 0.1 %."""
    percent = 100 * fraction
    return f"{percent:.1f} %" if percent >= 0.1 or not percent else f"{percent:.2g} %"


def has_experts(paths: Iterable[str]) -> bool:
    """Whether a block whose parameters have these paths chooses between experts."""
    return any(_EXPERTS.search(path) for path in paths)


def kind_by_name(path: str, shape: Sequence[int], *, experts: bool) -> str:
    """Return the kind of a parameter of a block, by its path within the block and its shape (d_out, d_in, …).

    ``linear`` for what looks like the matrix of a linear layer, ``expert`` for one of an expert or of all experts of a mixture: what a
    pass reaches, and which module owns it, are not asked here.

    Args:
        experts: whether the block has experts, so that ``gate`` is a router and no gate of another kind.
    """
    module, _, leaf = path.rpartition(".")
    if _RECURRENCE.search(path):
        return "recurrence"
    if _CONVOLUTION.search(path) and len(shape) != 2:
        return "convolution"
    router = _ROUTER.search(module)
    if router and router[2] == "router":
        return "router"
    if _EXPERTS.search(path) and math.prod(shape) > max(shape, default=1):
        return "expert"
    if router and experts:
        return "router"
    return _by_shape(module, leaf, shape)


def _by_shape(module: str, leaf: str, shape: Sequence[int]) -> str:
    matrix = len(shape) == 2 and leaf == "weight"
    if math.prod(shape) == max(shape, default=1):  # one axis alone is longer than 1
        return "narrow" if matrix and shape[0] == 1 else "vector"
    if len(shape) == 3 and leaf == "weight":
        return "expert"
    if not matrix or "embed" in module.rpartition(".")[2]:
        return "other"
    return "narrow" if shape[0] < MIN_OUTPUTS else "linear"
