"""Spectra of weights alone: before a calibration, or without one; a block at a time, each matrix from its file or from a loaded model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from lowrank_core.errors import NumericalError
from lowrank_core.files.checkpoints import dequantized_method
from lowrank_core.files.weights import read_object, weight_files
from lowrank_core.models.handle import ModelHandle, weight_of
from lowrank_core.parameters import MatrixShape
from lowrank_core.spectra.spectrum import LayerSpectrum
from lowrank_core.statistics.spectra import shuffled
from lowrank_core.types import Progress

__all__ = ["loaded_matrices", "stored_matrices", "weight_spectra"]

_NOTHING = np.zeros(0)

Matrices = Iterable[tuple[MatrixShape, Tensor]]


def loaded_matrices(handle: ModelHandle, *, without: Iterable[str] = ()) -> Iterator[tuple[MatrixShape, Tensor]]:
    """Yield the compressible matrices of a loaded model in its order, but for those named in ``without``."""
    left_out = frozenset(without)
    for layer in handle.layers:
        if layer.name not in left_out:
            yield layer.shape, weight_of(handle.module.get_submodule(layer.name)).detach()


def stored_matrices(folder: Path, shapes: Sequence[MatrixShape]) -> Iterator[tuple[MatrixShape, Tensor]] | None:
    """Return an iterator that reads one matrix at a time from the safetensors of ``folder``; memory holds no other.

    Nothing is read yet. None where a matrix is no tensor of its own (experts in one tensor, quantised blocks): load the model then.

    Args:
        shapes: of its matrices, as its headers tell them.

    Raises:
        ModelError: the folder holds no weights that are loaded.
    """
    if dequantized_method(read_object(folder / "config.json")):
        return None
    places: dict[str, Path] = {}
    for name in weight_files(folder).loaded:
        with safe_open(folder / name, framework="pt") as archive:
            places |= dict.fromkeys(archive.keys(), folder / name)
    if not all(f"{shape.name}.weight" in places for shape in shapes):
        return None
    return ((shape, _read(places[f"{shape.name}.weight"], f"{shape.name}.weight")) for shape in shapes)


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as archive:
        result: Tensor = archive.get_tensor(name)
    return result


def weight_spectra(
    matrices: Matrices, *, total: int, known: Sequence[LayerSpectrum] = (), progress: Progress | None = None
) -> Iterator[tuple[LayerSpectrum, ...]]:
    """Yield the spectra of all matrices so far, whenever a block is done; those of features are empty.

    Args:
        matrices: in the order of their blocks.
        total: number of matrices, for ``progress``.
        known: spectra of an earlier session, which come first.

    Raises:
        NumericalError: a weight isn't finite; names the layer.
    """
    result = list(known)
    for _, block in groupby(matrices, key=lambda entry: entry[0].depth):
        for shape, weight in block:
            result.append(_spectrum(shape, weight))
            if progress is not None:
                progress(len(result), total)
        yield tuple(result)


def _spectrum(shape: MatrixShape, weight: Tensor) -> LayerSpectrum:
    if not torch.isfinite(weight).all():
        raise NumericalError(f"{shape.name}: its weight holds NaN or Inf. Load another checkpoint.")
    exact = weight.to("cpu", torch.float64)
    own, chance = (torch.linalg.svdvals(matrix).numpy().astype(np.float64) for matrix in (exact, shuffled(exact.float())))
    return LayerSpectrum(shape, own, _NOTHING, _NOTHING, _NOTHING, chance)
