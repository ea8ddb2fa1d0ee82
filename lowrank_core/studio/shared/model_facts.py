"""Facts of a model from model.json, and a table by module type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace

import pandas as pd

from lowrank_core.allocation.units import plan_units
from lowrank_core.config import CompressionConfig
from lowrank_core.config.mapping import build
from lowrank_core.coverage import Coverage
from lowrank_core.errors import RunError
from lowrank_core.parameters import HeadUnit, MatrixShape, PairUnit, Unit, WidthUnit
from lowrank_core.runs import JsonMapping, Run
from lowrank_core.studio.shared.formatting import DASH, count, kind_label, percent, size
from lowrank_core.studio.shared.table import Column, Metrics, Table

__all__ = ["ModelFacts", "model_facts", "model_metrics", "model_words", "module_table", "modules_spec", "units_of"]


@dataclass(frozen=True)
class ModelFacts:
    """A model, without its weights.

    Attributes:
        bytes: of a plain checkpoint in ``stored_dtype``; a quantised file that it was read from may be smaller.
        matrices: the compressible linears in the order of the model.
        input_widths: width of each distinct input (q, k and v share theirs).
        joint_units: value and output projections that can be compressed by heads, then MLPs and queries and keys that can be reduced.
        heads_dropped: sentences on those that can't, though they look like it.
        left_fused: sentences on layers that look like several projections in one matrix, and are compressed as one.
        coverage: what every parameter is: compressible, or left alone and why; of an older record only how much is compressible.
        head_flops: of the output head for one token; None in an older record.
        auto_class: of transformers, which loads it.
        biases_without_place: layers to which the metric of the search may give a bias that the architecture has no place for, so that a
            dense merge has to leave it out; 0 in an older record.
        dtype: in which it is held; stored_dtype: in which it is written. Empty in an older record.
    """

    reference: str
    architecture: str
    dtype: str
    parameters: int
    compressible_parameters: int
    bytes: int
    vocabulary: int
    max_context: int | None
    blocks: int
    hidden: int
    tied_embeddings: bool
    matrices: tuple[MatrixShape, ...]
    input_widths: Mapping[str, int]
    joint_units: tuple[Unit, ...] = ()
    device: str = ""
    fingerprint: str = ""
    stored_dtype: str = ""
    heads_dropped: tuple[str, ...] = ()
    left_fused: tuple[str, ...] = ()
    coverage: Coverage = field(default_factory=lambda: Coverage({}))
    head_flops: int | None = None
    auto_class: str = "AutoModelForCausalLM"
    biases_without_place: int = 0

    def __post_init__(self) -> None:
        if not self.coverage.parameters:
            object.__setattr__(self, "coverage", Coverage.unrecorded(self.compressible_parameters, self.parameters))

    @property
    def flops_of_head(self) -> int:
        """FLOPs of the head per token; an older record counts vocabulary x hidden."""
        return 2 * self.vocabulary * self.hidden if self.head_flops is None else self.head_flops

    @property
    def compressible_share(self) -> float:
        """Fraction of all parameters that lies in compressible linears."""
        return self.compressible_parameters / self.parameters if self.parameters else 0.0

    @property
    def dense_merge_note(self) -> str:
        """Reason for refusing a dense merge unless biases are dropped; empty where there is none."""
        if not self.biases_without_place:
            return ""
        return (
            f"{self.architecture} has no place for the biases that this metric gives up to {self.biases_without_place} layers: a dense "
            "merge has to leave them out (“Drop biases without a place”, --drop-biases), and then measures what that costs."
        )

    def units(self, compression: CompressionConfig) -> tuple[Unit, ...]:
        """Return the units of a search with ``compression``, alternatives included."""
        return plan_units(self.matrices, compression, self.joint_units)

    def matrix(self, name: str) -> MatrixShape:
        return next(matrix for matrix in self.matrices if matrix.name == name)


@dataclass(frozen=True)
class _Layer:
    name: str
    kind: str
    depth: int
    d_out: int
    d_in: int
    bias: bool
    input_group: str
    expert: int | None = None
    active: float = 1.0
    role: str = ""


@dataclass(frozen=True)
class _Heads:
    value: str
    output: str
    heads: int
    groups: int
    head_dim: int


@dataclass(frozen=True)
class _Pairs:
    query: str
    key: str
    heads: int
    groups: int
    head_dim: int
    pair: str


def model_facts(run: Run) -> ModelFacts | None:
    """Return the facts in model.json; None before the model is loaded.

    Raises:
        RunError: the file is damaged.
    """
    body = run.part("model")
    return None if body is None else _facts(body)


def units_of(run: Run) -> tuple[Unit, ...]:
    """Return the units of the search of ``run``; none before the model is loaded, or without a search.

    Raises:
        RunError: model.json is damaged.
    """
    search, facts = run.config.search, model_facts(run)
    return () if search is None or facts is None else facts.units(search.compression)


def _facts(body: JsonMapping) -> ModelFacts:
    layers = [build(_Layer, layer, "model.json") for layer in body.get("layers", [])]
    matrices = {layer.name: MatrixShape(**asdict(layer)) for layer in layers}
    return build(
        ModelFacts,
        body,
        "model.json",
        matrices=tuple(matrices.values()),
        coverage=_coverage(body),
        heads_dropped=tuple(str(reason) for reason in body.get("heads_dropped", [])),
        left_fused=tuple(str(reason) for reason in body.get("left_fused", [])),
        input_widths={layer.input_group: layer.d_in for layer in layers},
        joint_units=tuple(_joint_units(body, matrices)),
    )


def _joint_units(body: JsonMapping, matrices: Mapping[str, MatrixShape]) -> Iterator[Unit]:
    for h in (build(_Heads, entry, "model.json") for entry in body.get("heads", [])):
        yield HeadUnit((matrices[h.value], matrices[h.output]), heads=h.heads, groups=h.groups, head_dim=h.head_dim)
    for p in (build(_Pairs, entry, "model.json") for entry in body.get("pairs", [])):
        yield PairUnit((matrices[p.query], matrices[p.key]), heads=p.heads, groups=p.groups, head_dim=p.head_dim, pair=p.pair)
    for entry in body.get("widths", []):
        yield WidthUnit(tuple(matrices[str(name)] for name in entry["layers"]))


def _coverage(body: JsonMapping) -> Coverage:
    """Return the coverage in model.json; empty in an older record."""
    try:
        return Coverage.from_mapping(body.get("coverage", []))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"model.json holds no valid coverage ({error}). Start the run again.") from error


def module_table(facts: ModelFacts) -> pd.DataFrame:
    """Return a row for each module type: count, shape, break-even rank, parameters and share of the model's parameters.

    Then a row for each kind of parameter that is left alone, with the reason for a shape: the parameters add up to the model's.
    """
    rows = []
    for kind in dict.fromkeys(matrix.kind for matrix in facts.matrices):
        alike = [matrix for matrix in facts.matrices if matrix.kind == kind]
        parameters = sum(matrix.dense_parameters for matrix in alike)
        rows.append(
            {
                "type": kind_label(kind),
                "count": len(alike),
                "shape": " / ".join(dict.fromkeys(f"{m.d_out} × {m.d_in}" for m in alike)),
                "break_even": " / ".join(dict.fromkeys(str(m.break_even_rank) for m in alike)),
                "parameters": parameters,
                "share": parameters / facts.parameters if facts.parameters else 0.0,
            }
        )
    rows += [
        {"type": row.label, "count": None, "shape": row.why, "break_even": "", "parameters": row.parameters, "share": row.share}
        for row in facts.coverage.rows
        if row.kind not in ("linear", "expert")
    ]
    return pd.DataFrame(rows).astype({"count": "Int64"})


def modules_spec(facts: ModelFacts) -> Table:
    """Return ``module_table`` as it is shown."""
    columns = (
        Column.text("type", "Type", "Of modules that can be compressed; then what is left alone.", width=225),
        Column.whole("count", "Count"),
        replace(Column.short("shape", "Shape (out × in), or why it is left alone"), width=260),
        Column.text("break_even", "Break-even rank", "The largest rank whose two factors cost less than the matrix."),
        Column.whole("parameters", "Parameters"),
        Column.share("share", "Share of the model"),
    )
    return Table(module_table(facts), columns, "Modules by type, with parameters (biases counted)", "modules")


def model_metrics(facts: ModelFacts) -> Metrics:
    """Return size and shape of a model."""
    tied = "tied: embedding and head share one matrix" if facts.tied_embeddings else "not tied: embedding and head are separate"
    return {
        "Parameters": (count(facts.parameters), f"{facts.parameters:,}"),
        "Compressible": (count(facts.compressible_parameters), "In linear layers of the blocks, biases counted."),
        "Share compressible": (
            percent(facts.compressible_share),
            "Of all parameters; the table lists the rest, and why it is not compressed.",
        ),
        "Size": (
            size(facts.bytes),
            f"As written in {facts.stored_dtype or facts.dtype}; held as {facts.dtype} on {facts.device or 'cpu'}.",
        ),
        "Blocks × hidden": (f"{facts.blocks} × {facts.hidden:,}", "Number of blocks, and the width of the residual stream."),
        "Vocabulary": (f"{facts.vocabulary:,}", f"Embeddings are {tied}."),
    }


def model_words(facts: ModelFacts) -> str:
    """Return what a model is, in a line."""
    return (
        f"{facts.architecture} · {facts.dtype} · {facts.device or 'cpu'} · context up to {facts.max_context or DASH} · "
        f"embeddings {'tied' if facts.tied_embeddings else 'not tied'} · fingerprint {facts.fingerprint[:12] or DASH}"
    )
