"""Layers of modules that lost channels: an MLP's layers at a smaller width, and queries and keys with fewer dimensions per head.

============ ===================================================================================
k            channels of an MLP that stay, of the width that the architecture has
p            pairs of dimensions that stay in each query and key head; one dimension each without a rotary embedding
============ ===================================================================================

Nothing that is gone is stored or multiplied. The layers of an MLP hand k numbers to each other; queries and keys have zeros where a
dimension is gone, which add nothing to their products, so that attention code with its fixed head_dim runs unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_core.layers.base import CompressedModule, Entry, PivotIndex, parameter_like
from lowrank_core.layers.pivoting import gather_order
from lowrank_core.layers.quantized import Factor, applied, dense_of
from lowrank_core.parameters import PAIRS

__all__ = ["REDUCED_FORMS", "KeptPairs", "NarrowInput", "NarrowOutput"]


class _Narrow(CompressedModule):
    """A linear layer of which one side has ``rank`` channels instead of those of the architecture: ``matrix`` is smaller for it."""

    factors: ClassVar[tuple[str, ...]] = ("matrix",)
    matrix: Factor
    biases: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        rows, columns = self.narrowed(out_features, in_features, rank)
        self.matrix = nn.Parameter(torch.empty(rows, columns))
        self.register_parameter("biases", nn.Parameter(torch.empty(rows)) if bias else None)

    @staticmethod
    def narrowed(d_out: int, d_in: int, rank: int) -> tuple[int, int]:
        """Return the shape of ``matrix``."""
        raise NotImplementedError

    @classmethod
    def of(cls, matrix: Tensor, biases: Tensor | None, *, like: Tensor) -> CompressedModule:
        """Return the module of a smaller ``matrix`` in place of ``like`` (d_out, d_in), in its dtype and on its device."""
        d_out, d_in = like.shape
        rank = next(small for small, large in zip(matrix.shape, cls.narrowed(d_out, d_in, 0), strict=True) if large == 0)
        with torch.device("meta"):
            module = cls(d_in, d_out, rank, bias=biases is not None)
        module.matrix = parameter_like(matrix, like)
        module.biases = None if biases is None else parameter_like(biases, like)
        return module

    @classmethod
    def from_spec(cls, entry: Entry, shape: tuple[int, int], leader: CompressedModule | None) -> CompressedModule:
        d_out, d_in = shape
        wide = d_out if cls.narrowed(d_out, d_in, 0)[0] == 0 else d_in
        return cls(d_in, d_out, entry.integer("rank", 1, wide), bias=entry.flag("bias"))._as_told(entry)

    def spec(self, names: Mapping[nn.Module, str]) -> dict[str, object]:
        return {"form": self.form, "rank": self.rank, "bias": self.biases is not None, **self._grid_entry()}

    @property
    def weight(self) -> Tensor:
        matrix = dense_of(self.matrix)
        rows, columns = matrix.shape
        return functional.pad(matrix, (0, self.in_features - columns, 0, self.out_features - rows))

    @property
    def bias(self) -> Tensor | None:
        """The (out_features,) bias that the module stands for; ``biases`` are stored."""
        return None if self.biases is None else functional.pad(self.biases, (0, self.out_features - len(self.biases)))

    def forward(self, input: Tensor) -> Tensor:
        return applied(self.matrix, input, self.biases)

    def extra_repr(self) -> str:
        bias = self.biases is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={bias}"


class NarrowOutput(_Narrow):
    """Maps x (..., n) to the k channels that stay, by ``matrix`` (k, n)."""

    form: ClassVar[str] = "narrow_output"

    @staticmethod
    def narrowed(d_out: int, d_in: int, rank: int) -> tuple[int, int]:
        return rank, d_in


class NarrowInput(_Narrow):
    """Maps the k channels that stay to (..., d_out), by ``matrix`` (d_out, k)."""

    form: ClassVar[str] = "narrow_input"

    @staticmethod
    def narrowed(d_out: int, d_in: int, rank: int) -> tuple[int, int]:
        return d_out, rank


class KeptPairs(PivotIndex):
    """Maps x (..., n) to (..., heads · head_dim): of each head p pairs of dimensions, and zeros in the others.

    ``matrix`` (heads · size · p, n) has for each head the first dimension of its pairs, then the second; ``pivots`` (groups, p), int32,
    are the numbers of the pairs, which all heads of a group share, so that queries and keys keep the same ones.
    """

    form: ClassVar[str] = "kept_pairs"
    factors: ClassVar[tuple[str, ...]] = ("matrix",)
    matrix: Factor
    biases: nn.Parameter | None

    def __init__(self, in_features: int, sizes: tuple[int, int, int], rank: int, pair: str, *, bias: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = sizes
        self.in_features, self.out_features, self.rank, self.pair = in_features, self.heads * self.head_dim, rank, pair
        rows = self.heads * PAIRS[pair] * rank
        self.matrix = nn.Parameter(torch.empty(rows, in_features))
        self.register_parameter("biases", nn.Parameter(torch.empty(rows)) if bias else None)
        self._register_pivots(self.groups, rank, size=self.head_dim // PAIRS[pair])

    @classmethod
    def of(cls, matrix: Tensor, biases: Tensor | None, kept: Tensor, *, head_dim: int, pair: str, like: Tensor) -> KeptPairs:
        """Return the module of ``kept`` pairs (groups, p), ascending, in the dtype and on the device of ``like``.

        Args:
            matrix, biases: (heads, size, p, n) and (heads, size, p), or None.
        """
        sizes = (len(matrix), len(kept), head_dim)
        with torch.device("meta"):
            module = cls(matrix.shape[-1], sizes, kept.shape[1], pair, bias=biases is not None)
        module.matrix = parameter_like(matrix.flatten(0, 2), like)
        module.biases = None if biases is None else parameter_like(biases.flatten(), like)
        module._set_pivots(kept, like.device)
        return module

    @classmethod
    def from_spec(cls, entry: Entry, shape: tuple[int, int], leader: CompressedModule | None) -> KeptPairs:
        heads, head_dim = entry.integer("heads", 1, shape[0]), entry.integer("head_dim", 1, shape[0])
        groups, pair = entry.integer("groups", 1, heads), entry.text("pair") or ""
        if heads * head_dim != shape[0] or heads % groups:
            entry.refuse("heads, groups and head_dim", f"{heads}, {groups} and {head_dim}; the layer is {shape[0]} wide")
        if pair not in PAIRS:
            entry.refuse("pair", f"{pair!r}; {', '.join(PAIRS)} are possible")
        rank = entry.integer("rank", 1, head_dim // PAIRS[pair])
        return cls(shape[1], (heads, groups, head_dim), rank, pair, bias=entry.flag("bias"))._as_told(entry)

    def spec(self, names: Mapping[nn.Module, str]) -> dict[str, object]:
        sizes = {"heads": self.heads, "groups": self.groups, "head_dim": self.head_dim, "pair": self.pair}
        return {"form": self.form, "rank": self.rank, "bias": self.biases is not None, **sizes, **self._grid_entry()}

    @property
    def weight(self) -> Tensor:
        return self._placed(dense_of(self.matrix).T, gather_order(self.pivots, self.indexed)).T  # the cached order may not be loaded yet

    @property
    def bias(self) -> Tensor | None:
        """The (out_features,) bias that the module stands for; ``biases`` are stored."""
        return None if self.biases is None else self._placed(self.biases, gather_order(self.pivots, self.indexed))

    def _placed(self, values: Tensor, order: Tensor) -> Tensor:
        """Return (..., heads · head_dim) from (..., heads · size · p)."""
        size, places = PAIRS[self.pair], self.indexed
        parts = values.reshape(*values.shape[:-1], self.heads, size, self.rank)
        order = order.repeat_interleave(self.heads // self.groups, 0)[:, None].expand(-1, size, -1)
        padded = functional.pad(parts, (0, places - self.rank))
        whole = padded.gather(-1, order.expand(*values.shape[:-1], -1, -1, -1))
        return (whole.transpose(-1, -2) if self.pair == "neighbours" else whole).flatten(-3)

    def forward(self, input: Tensor) -> Tensor:
        return self._placed(applied(self.matrix, input, self.biases), self.order)

    def extra_repr(self) -> str:
        sizes = f"heads={self.heads}, groups={self.groups}, head_dim={self.head_dim}, rank={self.rank}"
        return f"in_features={self.in_features}, {sizes}, pair={self.pair}, bias={self.biases is not None}"


REDUCED_FORMS = frozenset(form.form for form in (NarrowOutput, NarrowInput, KeptPairs))
"""Names in ``config.json`` of layers with fewer channels than their architecture."""
