"""Exact integer counts of parameters, bytes and FLOPs; nothing here knows torch.

Notation (y = W x + b, W of shape d_out x d_in; M = Σ d_out over the members of a stack, n = d_in)::

    dense        M·n                                                  (+ biases)
    factored     r·(M + n)                                            (+ biases)
    pivoted      r·(M + n - r), and r row indices                     (+ biases)
    per head     groups·r·(n - r) + heads·r·d_out, and groups·r indices (+ biases)
    widths       r·(Σ n + d_out): r channels of an MLP's first layers, and the columns of the last that read them (+ biases)
    pairs        (heads + groups)·r·size·n, and 2·groups·r indices: r pairs of dimensions of each query and key head (+ biases)
    break-even   the largest r at which a form still costs less than the dense matrices

``compression ratio`` always means the fraction of parameters *removed*, in [0, 1). Index tables count as parameters.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from lowrank_core.errors import BudgetError, ConfigError, RankError
from lowrank_core.files.grids import Grid

__all__ = [
    "FLOPS_MEANING",
    "INDEX_BYTES",
    "PAIRS",
    "STORAGES",
    "HeadUnit",
    "MatrixShape",
    "PairUnit",
    "Unit",
    "WidthUnit",
    "allocated_parameters",
    "budget_for_ratio",
    "budget_of",
    "compression_ratio",
    "dense_parameters",
    "module_type",
]

FLOPS_MEANING = "The compressible linears and the output head, a multiply-add as two. Embeddings, norms and attention scores are left out."
"""Definition of a model's FLOPs per token."""

FLOAT_SLACK = 1e-6
"""Parameters; absorbs the rounding of ``(1 - ratio) * count``, so that a ratio like 0.3 costs no whole rank."""

INDEX_BYTES = 4
"""An index is stored as a 32-bit integer, whatever the dtype of the weights."""

Ranks = Mapping[str, int | None]

STORAGES: Mapping[str, Callable[[int, int, int], tuple[int, int]]] = MappingProxyType(
    {
        "factored": lambda rank, rows, columns: (rank * (rows + columns), 0),
        "pivoted": lambda rank, rows, columns: (rank * (rows + columns - rank), rank),
    }
)
"""Name -> (rank, M, n) -> (weights, indices) that are stored, biases left out."""

PAIRS: Mapping[str, int] = MappingProxyType({"halves": 2, "neighbours": 2, "none": 1})
"""Dimensions that a rotary embedding turns together -> their number."""


@dataclass(frozen=True, order=True)
class MatrixShape:
    """A compressible linear map.

    Attributes:
        name: dotted path of the module in the model.
        kind: type of the module, shared by depth (``q_proj``).
        depth: index of its block, from 0.
        d_out: output width (rows of W).
        d_in: input width (columns of W).
        bias: whether the dense module has one.
        input_group: the layer that stands for all those that read the same input; empty where only this one does.
        expert: number of the expert that it belongs to; None outside a mixture.
        active: share of the tokens that reach it; 1 outside a mixture, k/E for each of E experts of which k are chosen.
        role: ``v`` for a value projection that a pass showed to be one; empty otherwise, and where no pass was made.
    """

    name: str
    kind: str
    depth: int
    d_out: int
    d_in: int
    bias: bool = False
    input_group: str = ""
    expert: int | None = None
    active: float = 1.0
    role: str = field(default="", compare=False)

    @property
    def dense_parameters(self) -> int:
        return self.d_out * self.d_in + self.d_out * self.bias

    @property
    def mixture(self) -> str:
        """Path that the same layers of all experts of one mixture share, such as ``model.layers.0.mlp.experts.up``; empty outside one."""
        if self.expert is None:
            return ""
        path, _, layer = self.name.rpartition(".")
        return f"{path.rpartition('.')[0]}.{layer}"

    @property
    def flops_per_token(self) -> float:
        """Multiply-adds counted as two operations, for the share of the tokens that reach it."""
        return 2 * self.d_out * self.d_in * self.active

    @property
    def max_rank(self) -> int:
        return min(self.d_out, self.d_in)

    @property
    def break_even_rank(self) -> int:
        """The largest rank at which two plain factors cost less than the matrix; 0 if there is none."""
        return Unit((self,)).break_even_rank


def module_type(path: str, paths: Sequence[str]) -> str:
    """Return the shortest dotted ending of ``path`` that no other of the ``paths`` in its block has: ``q_proj``, ``attn.c_proj``."""
    parts = path.split(".")
    for length in range(1, len(parts) + 1):
        ending = ".".join(parts[-length:])
        if sum(other == ending or other.endswith("." + ending) for other in paths) == 1:
            return ending
    return path


@dataclass(frozen=True)
class Unit:
    """Matrices that share one rank, and what each rank costs: a single matrix, or a stack that shares its input directions.

    Attributes:
        members: the matrices, with one input width.
        storage: name in ``STORAGES``.
        adds_bias: whether a compressed member has a bias even where the dense one has none (a centred basis; it is counted).
    """

    members: tuple[MatrixShape, ...]
    storage: str = "factored"
    adds_bias: bool = False
    words: ClassVar[str] = "as one stack"
    joint: ClassVar[bool] = False
    """Whether members compute through each other, so that their error is of what they compute together, and of no matrix."""

    @property
    def name(self) -> str:
        """Names of the members, joined by ``+``."""
        return "+".join(member.name for member in self.members)

    @property
    def kind(self) -> str:
        return "+".join(dict.fromkeys(member.kind for member in self.members))

    @property
    def depth(self) -> int:
        return self.members[0].depth

    @property
    def d_out(self) -> int:
        """Rows of all members, M."""
        return sum(member.d_out for member in self.members)

    @property
    def d_in(self) -> int:
        return self.members[0].d_in

    @cached_property
    def dense_parameters(self) -> int:
        return sum(member.dense_parameters for member in self.members)

    @property
    def max_rank(self) -> int:
        return min(self.d_out, self.d_in)

    @property
    def bias_parameters(self) -> int:
        """Parameters of the compressed form that do not depend on the rank."""
        return sum(member.d_out for member in self.members if member.bias or self.adds_bias)

    def stored(self, rank: int) -> tuple[int, int]:
        """Return how many weights and how many indices are stored at ``rank``, biases left out."""
        return STORAGES[self.storage](rank, self.d_out, self.d_in)

    @cached_property
    def break_even_rank(self) -> int:
        """The largest rank that costs less than the dense members; 0 if none does."""
        return bisect.bisect_left(range(1, self.max_rank + 1), self.dense_parameters, key=self._price)

    def _price(self, rank: int) -> int:
        return sum(self.stored(rank)) + self.bias_parameters

    def parameters(self, rank: int | None) -> int:
        """Return what is stored at ``rank``: weights, biases and indices; None stands for the dense matrices.

        Raises:
            RankError: rank outside [1, max_rank].
        """
        if rank is None:
            return self.dense_parameters
        if not 1 <= rank <= self.max_rank:
            raise RankError(f"{self.name}: rank must be in [1, {self.max_rank}], got {rank}. Lower it, or leave the layer dense (null).")
        return self._price(rank)

    @property
    def size_words(self) -> str:
        """Size that its ranks are a part of, in words."""
        return f"{self.d_out} × {self.d_in}"

    def rank_of(self, member: MatrixShape, rank: int) -> int:
        """Return the rank of a member's weight at ``rank``."""
        return min(rank, member.max_rank)

    @cached_property
    def prices(self) -> npt.NDArray[np.int64]:
        """Stored parameters at each rank from 1 to break-even (break_even_rank,)."""
        result: object = self._price(np.arange(1, self.break_even_rank + 1))  # type: ignore[arg-type]  # prices are polynomials
        return np.asarray(result, dtype=np.int64)

    def rank_for_parameters(self, parameters: float) -> int | None:
        """Return the largest rank that costs at most ``parameters``, at least 1; None where dense fits, too."""
        if parameters >= self.dense_parameters or self.break_even_rank == 0:
            return None
        affordable = bisect.bisect_right(range(1, self.break_even_rank + 1), parameters + FLOAT_SLACK, key=self._price)
        return max(1, affordable)

    def plain_parameters(self, rank: int) -> int:
        """Return what two linear layers for each member hold: nothing is shared, and no row left out."""
        return sum(rank * (member.d_out + member.d_in) for member in self.members) + self.bias_parameters

    def matrices(self, rank: int | None) -> tuple[tuple[int, int], ...]:
        """Return (rows, columns) of the matrices that are stored at ``rank``: the members where they stay dense, else the factors."""
        if rank is None:
            return tuple((member.d_out, member.d_in) for member in self.members)
        rows = self.d_out - rank if self.storage == "pivoted" else self.d_out  # r pivot rows are not stored again
        return (rank, self.d_in), (rows, rank)

    def bytes(self, rank: int | None, itemsize: int, grid: Grid | None = None) -> int:
        """Return bytes at ``rank``, given those of one float, with matrices in floats or on a grid."""
        indices = 0 if rank is None else self.stored(rank)[1]
        floats = self.parameters(rank) - indices
        size = indices * INDEX_BYTES
        if grid is not None:
            floats -= sum(rows * columns for rows, columns in self.matrices(rank))
            size += sum(grid.bytes(rows, columns, itemsize) for rows, columns in self.matrices(rank))
        return size + floats * itemsize

    def scales(self, rank: int | None, grid: Grid) -> int:
        """Return how many scales the matrices at ``rank`` have on a grid."""
        return sum(rows * grid.scales(columns) for rows, columns in self.matrices(rank))

    def flops_per_token(self, rank: int | None) -> int:
        """Return multiply-adds counted as two operations, biases left out; a stack's shared factor is applied once for each input.

        Those of an expert count for the share of the tokens that reach it.
        """
        if rank is None:
            return round(sum(member.flops_per_token for member in self.members))
        return round(2 * (self.stored(rank)[0] + self._applied_again(rank)) * self.members[0].active)

    def _applied_again(self, rank: int) -> int:
        inputs = {member.input_group for member in self.members}
        return (len(inputs) - 1) * rank * self.d_in


@dataclass(frozen=True)
class HeadUnit(Unit):
    """A value and an output projection, each head's value reduced to ``rank`` dimensions; ``members`` is (value, output).

    Attributes:
        heads: query heads; groups: key/value heads; head_dim: dimensions of each.
    """

    storage: str = "per_head"
    heads: int = 1
    groups: int = 1
    head_dim: int = 1
    words: ClassVar[str] = "by heads"
    joint: ClassVar[bool] = True

    def describe(self) -> dict[str, object]:
        """Return what tells this unit from others, ready for JSON."""
        value, output = self.members
        return {"value": value.name, "output": output.name, "heads": self.heads, "groups": self.groups, "head_dim": self.head_dim}

    @property
    def max_rank(self) -> int:
        return self.head_dim

    @property
    def size_words(self) -> str:
        return f"{self.head_dim} per head"

    def rank_of(self, member: MatrixShape, rank: int) -> int:
        return super().rank_of(member, rank * (self.groups if member == self.members[0] else self.heads))

    def stored(self, rank: int) -> tuple[int, int]:
        value, output = self.members
        return self.groups * rank * (value.d_in - rank) + self.heads * rank * output.d_out, self.groups * rank

    @property
    def bias_parameters(self) -> int:
        output = self.members[1]
        return output.d_out * (output.bias or self.adds_bias)

    def plain_parameters(self, rank: int) -> int:
        """Return what the dense layers hold, which have zeros in place of the dimensions that no head carries."""
        return self.dense_parameters + self.members[1].d_out * (self.adds_bias and not self.members[1].bias)

    def matrices(self, rank: int | None) -> tuple[tuple[int, int], ...]:
        if rank is None:
            return super().matrices(None)
        value, output = self.members
        return (self.groups * rank, value.d_in - rank), (output.d_out, self.heads * rank)

    def _price(self, rank: int) -> int:
        return super()._price(rank) + self.groups * rank * self.members[0].bias

    def _applied_again(self, rank: int) -> int:
        return self.groups * rank * rank  # the identity of the gauge is not stored, but multiplied


@dataclass(frozen=True)
class WidthUnit(Unit):
    """Layers of an MLP of which ``rank`` channels stay: rows of all but the last of ``members``, columns of the last."""

    storage: str = "width"
    words: ClassVar[str] = "by channels"
    joint: ClassVar[bool] = True

    def describe(self) -> dict[str, object]:
        """Return what tells this unit from others, ready for JSON."""
        return {"layers": [member.name for member in self.members]}

    @property
    def max_rank(self) -> int:
        return self.members[-1].d_in

    @property
    def size_words(self) -> str:
        return f"{self.max_rank} channels"

    def stored(self, rank: int) -> tuple[int, int]:
        *first, last = self.members
        return rank * (sum(member.d_in for member in first) + last.d_out), 0

    @property
    def bias_parameters(self) -> int:
        last = self.members[-1]
        return last.d_out * last.bias

    def plain_parameters(self, rank: int) -> int:
        """Return what the dense layers hold, which have zeros in place of the channels that are gone."""
        return self.dense_parameters

    def matrices(self, rank: int | None) -> tuple[tuple[int, int], ...]:
        if rank is None:
            return super().matrices(None)
        *first, last = self.members
        return (*((rank, member.d_in) for member in first), (last.d_out, rank))

    def _price(self, rank: int) -> int:
        return super()._price(rank) + rank * sum(member.bias for member in self.members[:-1])

    def _applied_again(self, rank: int) -> int:
        return 0


@dataclass(frozen=True)
class PairUnit(Unit):
    """A query and a key projection, ``rank`` pairs of dimensions of each head left; ``members`` is (query, key).

    Attributes:
        heads: query heads; groups: key heads; head_dim: dimensions of each.
        pair: what a rotary embedding turns together: ``halves`` (i and i + head_dim/2), ``neighbours`` (2i and 2i + 1), or ``none``
            where there is no such embedding, and single dimensions are kept.
    """

    storage: str = "pairs"
    heads: int = 1
    groups: int = 1
    head_dim: int = 1
    pair: str = "halves"
    words: ClassVar[str] = "by pairs of dimensions"
    joint: ClassVar[bool] = True

    def describe(self) -> dict[str, object]:
        """Return what tells this unit from others, ready for JSON."""
        query, key = self.members
        sizes = {"heads": self.heads, "groups": self.groups, "head_dim": self.head_dim}
        return {"query": query.name, "key": key.name, **sizes, "pair": self.pair}

    @property
    def size(self) -> int:
        """Dimensions of what is kept or dropped together."""
        return PAIRS[self.pair]

    @property
    def max_rank(self) -> int:
        return self.head_dim // self.size

    @property
    def size_words(self) -> str:
        return f"{self.max_rank} {'pairs' if self.size > 1 else 'dimensions'} per head"

    def rank_of(self, member: MatrixShape, rank: int) -> int:
        return super().rank_of(member, rank * self.size * (self.heads if member == self.members[0] else self.groups))

    def stored(self, rank: int) -> tuple[int, int]:
        return (self.heads + self.groups) * rank * self.size * self.d_in, 2 * self.groups * rank

    @property
    def bias_parameters(self) -> int:
        return 0

    def plain_parameters(self, rank: int) -> int:
        """Return what the dense layers hold, which have zeros in place of the dimensions that are gone."""
        return self.dense_parameters

    def matrices(self, rank: int | None) -> tuple[tuple[int, int], ...]:
        if rank is None:
            return super().matrices(None)
        return tuple((count * rank * self.size, self.d_in) for count in (self.heads, self.groups))

    def _price(self, rank: int) -> int:
        query, key = self.members
        return super()._price(rank) + rank * self.size * (self.heads * query.bias + self.groups * key.bias)

    def _applied_again(self, rank: int) -> int:
        return 0


def dense_parameters(units: Iterable[Unit]) -> int:
    """Return the parameters of all matrices in ``units``, each counted once, although units may be alternatives of each other."""
    return sum(member.dense_parameters for member in {member.name: member for unit in units for member in unit.members}.values())


def budget_for_ratio(units: Iterable[Unit], compression_ratio: float) -> int:
    """Return the integer count of parameters allowed to the matrices of ``units`` together.

    Raises:
        BudgetError: the ratio is outside [0, 1).
    """
    return budget_of(dense_parameters(units), compression_ratio)


def budget_of(dense: int, compression_ratio: float) -> int:
    """Return the integer count of parameters allowed to matrices that have ``dense``.

    Raises:
        BudgetError: the ratio is outside [0, 1).
    """
    if not 0 <= compression_ratio < 1:
        raise BudgetError(f"compression ratio must be in [0, 1), got {compression_ratio:g}.")
    return math.floor((1 - compression_ratio) * dense + FLOAT_SLACK)


def allocated_parameters(units: Sequence[Unit], ranks: Ranks) -> int:
    """Return the parameters of the matrices of ``units`` stored at ``ranks``; what no rank covers is dense.

    Raises:
        ConfigError: two units of ``ranks`` hold the same matrix.
        RankError: a rank outside its limits.
    """
    chosen = [unit for unit in units if ranks.get(unit.name) is not None]
    covered = Counter(member.name for unit in chosen for member in unit.members)
    twice = [name for name, count in covered.items() if count > 1]
    if twice:
        raise ConfigError(f"ranks: {twice[0]} is compressed twice, alone and in a stack. Keep one of the two.")
    members = {member.name: member for unit in units for member in unit.members}
    dense = sum(member.dense_parameters for name, member in members.items() if name not in covered)
    return dense + sum(unit.parameters(ranks[unit.name]) for unit in chosen)


def compression_ratio(before: int, after: int) -> float:
    """Return the fraction of parameters removed."""
    return 1 - after / before
