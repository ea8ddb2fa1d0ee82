"""Common base of low-rank layers, and their entries in ``config.json``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NoReturn, Self

import torch
from torch import Tensor, nn

from lowrank_core.errors import ModelError
from lowrank_core.files.grids import GRIDS, Grid
from lowrank_core.layers.pivoting import gather_order
from lowrank_core.layers.quantized import Factor, QuantizedMatrix, empty_as, quantized_as

__all__ = ["CompressedModule", "Entry", "PivotIndex", "parameter_like"]


@dataclass(frozen=True)
class Entry:
    """Entry of a compressed layer in ``config.json``; values are checked on access.

    Attributes:
        name: dotted path of the layer.
        values: as they were read; not to be trusted.
        stack_rows: of all matrices that share its first factor, its own included.
    """

    name: str
    values: Mapping[str, object]
    stack_rows: int

    def integer(self, key: str, low: int, high: int) -> int:
        """Return an integer in [low, high]; raises ModelError for anything else."""
        value = self.values.get(key)
        if type(value) is not int or not low <= value <= high:
            self.refuse(key, f"{value!r}; {low} to {high} are possible")
        return value

    def flag(self, key: str) -> bool:
        """Return true or false; raises ModelError for anything else."""
        value = self.values.get(key)
        if type(value) is not bool:
            self.refuse(key, f"{value!r}; true or false are possible")
        return value

    def given(self, key: str) -> bool:
        """Return whether the flag is there, and true; raises ModelError if it is no flag."""
        return key in self.values and self.flag(key)

    def text(self, key: str, default: str | None = None) -> str | None:
        """Return a string, or the default where there is none; raises ModelError for anything else."""
        value = self.values.get(key, default)
        if value is not None and not isinstance(value, str):
            self.refuse(key, f"{value!r}; a text is expected")
        return value

    def refuse(self, key: str, reason: str) -> NoReturn:
        raise ModelError(
            f"model: config.json gives the compressed layer {self.name!r} no valid {key} ({reason[:200]}). Export the model again."
        )


class CompressedModule(nn.Module):
    """A module that stands for one linear layer, and can say in JSON what it is built like.

    Attributes:
        form: its name in ``config.json``.
        factors: names of the attributes that hold its factors; one that a leader holds is None.
        in_features, out_features: of the matrix that it stands for.
        rank: of that matrix, or of each of its heads.
    """

    form: ClassVar[str]
    factors: ClassVar[tuple[str, ...]]
    in_features: int
    out_features: int
    rank: int

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The (out_features, in_features) matrix that the module stands for; made again each time, so changing it changes nothing.

        transformers reads (and, before weights are loaded, initialises) ``weight`` of layers that it knows by name.
        """

    @abstractmethod
    def spec(self, names: Mapping[nn.Module, str]) -> dict[str, object]:
        """Return the entry of ``config.json``; ``names`` holds the dotted path of every module of the model."""

    @classmethod
    @abstractmethod
    def from_spec(cls, entry: Entry, shape: tuple[int, int], leader: CompressedModule | None) -> CompressedModule:
        """Return an empty module for a dense layer of ``shape`` (d_out, d_in).

        Raises:
            ModelError: a value is missing, of the wrong type, or impossible.
        """

    @property
    def grid(self) -> Grid | None:
        """The grid that its factors are rounded to; None where they are floats."""
        return next((factor.grid for _, factor in self.stored_factors() if isinstance(factor, QuantizedMatrix)), None)

    def stored_factors(self) -> Iterator[tuple[str, Factor]]:
        """Yield name and value of each factor that this module holds itself."""
        for name in self.factors:
            factor = getattr(self, name)
            if factor is not None:
                yield name, factor

    def quantize(self, grid: Grid, stored_dtype: torch.dtype) -> None:
        """Round the factors to the nearest numbers of a grid, with scales that are exact in ``stored_dtype``; biases and indices stay.

        Raises:
            NumericalError: a factor holds NaN, Inf, or numbers too large for the grid.
        """
        for name, factor in list(self.stored_factors()):
            if not isinstance(factor, QuantizedMatrix):
                self.store(name, quantized_as(factor, grid, stored_dtype))

    def store(self, name: str, factor: QuantizedMatrix) -> None:
        """Put a rounded matrix in the place of the factor ``name``."""
        delattr(self, name)
        setattr(self, name, factor)

    def _grid_entry(self) -> dict[str, object]:
        """Return what ``config.json`` says of the factors' grid; nothing where they are floats."""
        return {} if self.grid is None else {self.grid.name: True}

    def _as_told(self, entry: Entry) -> Self:
        """Return this empty module, with factors on the grid that the entry names."""
        for grid in GRIDS.values():
            if entry.given(grid.name):
                for name, factor in list(self.stored_factors()):
                    self.store(name, empty_as(tuple(factor.shape), grid))
                break
        return self

    def settle(self, name: str) -> None:
        """Derive what isn't stored from what was loaded.

        Raises:
            ModelError: what was loaded is impossible; ``name`` is the layer's.
        """


class PivotIndex(CompressedModule):
    """A module with sorted row numbers ``pivots`` (..., r) below a size, and the order to gather by that follows from them.

    ``pivots`` are int32, stored, and keep their type in casts. ``order`` (..., size) is derived again after each load.
    """

    pivots: Tensor
    order: Tensor

    def _register_pivots(self, *shape: int, size: int) -> None:
        self.indexed = size
        self.register_buffer("pivots", torch.arange(shape[-1], dtype=torch.int32).expand(shape).clone())
        self.register_buffer("order", gather_order(self.pivots, size), persistent=False)

    def _set_pivots(self, pivots: Tensor, device: torch.device) -> None:
        # A copy: what was loaded is a view of the mapped file, and would keep all of it resident.
        self.pivots = pivots.to(device=device, dtype=torch.int32, copy=True)
        self.order = gather_order(self.pivots, self.indexed)

    def _pivots_fit(self) -> bool:
        pivots = self.pivots
        if pivots.dtype != torch.int32:
            return False
        inside = (pivots >= 0) & (pivots < self.indexed)
        return bool(inside.all() and (pivots.diff(dim=-1) > 0).all())

    def settle(self, name: str) -> None:
        if self.pivots.device.type != "meta" and not self._pivots_fit():
            raise ModelError(f"model: the pivots of the layer {name!r} are damaged. Export the model again.")
        self._set_pivots(self.pivots, self.pivots.device)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, object],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)  # type: ignore[no-untyped-call]
        try:
            self.settle(prefix.removesuffix("."))
        except ModelError as error:
            error_msgs.append(str(error))


def parameter_like(value: Tensor, like: Tensor) -> nn.Parameter:
    """Return a copy of ``value`` in the dtype and on the device of ``like``, trained if that is."""
    copied = value.detach().to(device=like.device, dtype=like.dtype, copy=True, memory_format=torch.contiguous_format)
    return nn.Parameter(copied, requires_grad=like.requires_grad)
