"""The dense model in 8 and 4 bits, under names: what a compressed model of the same size has to beat. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lowrank_core.config import check_choice

__all__ = ["DENSE", "DenseModel", "dense_named"]


@dataclass(frozen=True)
class DenseModel:
    """A dense model whose compressible layers are on a grid.

    Attributes:
        grid: of ``files.grids.GRIDS``; rounding: as ``ExportConfig`` has it.
    """

    name: str
    label: str
    reference: str
    grid: str
    rounding: str = "nearest"


_GPTQ = "arXiv 2210.17323"

_MODELS = (
    DenseModel("int8", "Dense in int8", "rounding to nearest", "int8"),
    DenseModel("int4", "Dense in int4", "rounding to nearest", "int4"),
    DenseModel("int4_gptq", "Dense in int4 by GPTQ", _GPTQ, "int4", "gptq"),
    DenseModel("int4_128", "Dense in int4, groups of 128", "rounding to nearest", "int4_128"),
    DenseModel("int4_128_gptq", "Dense in int4 by GPTQ, groups of 128", _GPTQ, "int4_128", "gptq"),
)

DENSE: Mapping[str, DenseModel] = MappingProxyType({model.name: model for model in _MODELS})


def dense_named(name: str) -> DenseModel:
    """Return the quantised dense model ``name``.

    Raises:
        ConfigError: there is none; the message lists those that are.
    """
    check_choice("dense", name, DENSE)
    return DENSE[name]
