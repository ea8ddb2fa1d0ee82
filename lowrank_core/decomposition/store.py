"""Factors on disk: a safetensors file for each block, mapped when a unit is asked for, so that memory holds what is being used.

Error curves are read once. Factors are stored in float32, the finest that a model is written in; a float64 model's stay in float64.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lowrank_core.config import CompressionConfig
from lowrank_core.decomposition.factorization import FactorBasis
from lowrank_core.decomposition.head_factorization import HeadBasis
from lowrank_core.decomposition.module_reduction import PairBasis, WidthBasis
from lowrank_core.decomposition.units import AnyBasis, factorized, shrinkage_of, units_by_block
from lowrank_core.errors import ModelError
from lowrank_core.models.handle import ModelHandle
from lowrank_core.models.mapped import release
from lowrank_core.parameters import HeadUnit, PairUnit, Unit, WidthUnit
from lowrank_core.statistics.calibration import LayerStatistics
from lowrank_core.statistics.store import (
    StoredStatistics,
    block_path,
    damage_told,
    exclusive,
    finish,
    finished_blocks,
    is_finished,
    write_tensors,
)
from lowrank_core.types import Progress
from lowrank_core.wording import amount

__all__ = ["StoredBases", "cached_bases"]

_FORMAT = 2
"""Raise it when the meaning of stored factors changes: old ones are then ignored."""

_WIDE = ("ups", "down", "values", "outputs", "firsts", "lower", "query", "key")
"""Fields that hold factors."""

_WHOLE = ("order",)
"""Fields that hold whole numbers."""


class StoredBases(Mapping[str, AnyBasis]):
    """Nested factors by unit, each mapped from its block's file when it is asked for, and not kept. All files are checked at the start."""

    def __init__(self, folder: Path, units: Sequence[Unit]) -> None:
        """Raises NumericalError: a file is damaged."""
        self._folder = folder
        self._units = {unit.name: unit for unit in units}
        self._places: dict[str, tuple[Path, str]] = {}
        self._errors: dict[str, Tensor] = {}
        with damage_told(folder):
            for block in sorted(finished_blocks(folder, "factors")):
                self._index(block_path(folder, "factors", block))
            if missing := next((name for name in self._units if name not in self._places), None):
                raise ValueError(f"{missing} is missing")

    def _index(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            for position, name in enumerate(json.loads(file.metadata()["names"])):
                self._places[name] = path, str(position)
                self._errors[name] = file.get_tensor(f"{position}/errors").clone()

    def __getitem__(self, name: str) -> AnyBasis:
        """Raises NumericalError: the file has been damaged since."""
        unit = self._units[name]
        path, position = self._places[name]
        with damage_told(self._folder), safe_open(path, framework="pt") as file:
            basis = _from_tensors(unit, {part: file.get_tensor(f"{position}/{part}") for part in _parts_of(file, position)})
        return replace(basis, errors=self._errors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)


def _parts_of(file: Any, position: str) -> list[str]:
    return [key.removeprefix(f"{position}/") for key in file.keys() if key.startswith(f"{position}/")]  # noqa: SIM118


def _tensors(basis: AnyBasis, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the fields of a basis as tensors: entries of a tuple are numbered, and None is left out."""
    result: dict[str, Tensor] = {}

    def put(name: str, value: object, kind: torch.dtype) -> None:
        if isinstance(value, tuple):
            for index, part in enumerate(value):
                put(f"{name}/{index}", part, kind)
        elif value is not None:
            tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            result[name] = tensor.to(kind, copy=True).contiguous()

    for field in fields(basis):
        if field.name != "unit":
            narrow = torch.int64 if field.name in _WHOLE else torch.float64
            put(field.name, getattr(basis, field.name), dtype if field.name in _WIDE else narrow)
    return result


def _from_tensors(unit: Unit, parts: Mapping[str, Tensor]) -> AnyBasis:
    common = {"errors": parts["errors"], "damping": float(parts["damping"]), "condition": float(parts["condition"])}
    if isinstance(unit, HeadUnit):
        names = ("value_biases", "output_bias", "output_mean", "reduced_mean")
        optional = {name: parts.get(name) for name in names}
        return HeadBasis(unit, values=parts["values"], outputs=parts["outputs"], **optional, **common)  # type: ignore[arg-type]
    if isinstance(unit, PairUnit):
        weights = {name: parts[name] for name in ("order", "query", "key")}
        return PairBasis(unit, query_bias=parts.get("query_bias"), key_bias=parts.get("key_bias"), **weights, **common)  # type: ignore[arg-type]
    members = range(len(unit.members))
    if isinstance(unit, WidthUnit):
        firsts = members[:-1]
        return WidthBasis(
            unit,
            firsts=tuple(parts[f"firsts/{index}"] for index in firsts),
            biases=tuple(parts.get(f"biases/{index}") for index in firsts),
            last_bias=parts.get("last_bias"),
            order=parts["order"],
            outputs=parts["outputs"],
            lower=parts["lower"],
            **common,  # type: ignore[arg-type]
        )
    return FactorBasis(
        unit,
        ups=tuple(parts[f"ups/{index}"] for index in members),
        down=parts["down"],
        biases=tuple(parts.get(f"biases/{index}") for index in members),
        means=tuple((parts[f"means/{index}/0"], parts[f"means/{index}/1"]) for index in members) if "means/0/0" in parts else (),
        **common,  # type: ignore[arg-type]
    )


def _key(statistics: LayerStatistics, units: Sequence[Unit], config: CompressionConfig, dtype: torch.dtype) -> str:
    """Return the name of these factors: a hash of the statistics that they rest on, the units, and what decomposes them."""
    sources = []
    for part in (statistics.inputs, statistics.outputs):
        assert isinstance(part, StoredStatistics) or not part  # of others the content isn't known
        sources.append(part.name if isinstance(part, StoredStatistics) else "")
    members = sorted([[member.name for member in unit.members], isinstance(unit, HeadUnit)] for unit in units)
    parts = [_FORMAT, sources, members, config.basis, config.input_damping, config.gradient_damping, str(dtype), *shrinkage_of(config)]
    parts += ["modules"] if config.modules else []
    return "factors-" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def cached_bases(
    handle: ModelHandle,
    statistics: LayerStatistics,
    units: Sequence[Unit],
    config: CompressionConfig,
    store: Path,
    *,
    progress: Progress | None = None,
) -> StoredBases:
    """Return the factors of ``units``, decomposed block by block and kept in ``store``, named by what they come from.

    Memory holds those of one block. An interrupted decomposition goes on after its last finished block; where another process is at the
    same one, this one waits for it.

    Raises:
        as ``factorize``; ModelError where the disk has no room; NumericalError also where stored ones are damaged.
    """
    dtype = torch.promote_types(handle.stored_dtype, torch.float32)
    folder = store / _key(statistics, units, config, dtype)
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, len(units))

    if not is_finished(folder):
        with exclusive(folder, lambda: tick(0)):
            if not is_finished(folder):
                there = finished_blocks(folder, "factors")
                for block, members in units_by_block(units).items():
                    if block in there:
                        tick(len(members))
                    else:
                        _store(folder, block, handle, statistics, members, config, dtype, tick)
                finish(folder)
    return StoredBases(folder, units)


def _store(
    folder: Path,
    block: int,
    handle: ModelHandle,
    statistics: LayerStatistics,
    units: Sequence[Unit],
    config: CompressionConfig,
    dtype: torch.dtype,
    tick: Any,
) -> None:
    tensors: dict[str, Tensor] = {}
    for position, (_, basis) in enumerate(factorized(handle, statistics, units, config)):
        tensors |= {f"{position}/{name}": tensor for name, tensor in _tensors(basis, dtype).items()}
        tick(1)
    release(handle.module)
    needed, free = sum(tensor.nbytes for tensor in tensors.values()), disk_usage(folder).free
    if free < needed:
        raise ModelError(f"the factors of a block need {amount(needed)} in {folder}, and {amount(free)} are free. Make room.")
    write_tensors(block_path(folder, "factors", block), tensors, {"names": json.dumps([unit.name for unit in units])})
