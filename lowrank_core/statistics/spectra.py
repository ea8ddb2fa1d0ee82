"""From statistics to spectra: what a page or `lowrank analyze` shows of each matrix."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from lowrank_core.linalg import eigenvalues, square_root
from lowrank_core.models.handle import ModelHandle, weight_of
from lowrank_core.spectra.spectrum import LayerSpectrum
from lowrank_core.statistics.calibration import LayerStatistics
from lowrank_core.types import Progress, Vector

__all__ = ["shuffled", "spectra_of"]

_SHUFFLE_SEED = 0


def spectra_of(
    handle: ModelHandle, statistics: LayerStatistics, *, known: Iterable[LayerSpectrum] = (), progress: Progress | None = None
) -> tuple[LayerSpectrum, ...]:
    """Return the spectrum of every compressible layer, in the order of the model.

    Args:
        known: spectra whose weights were decomposed before (``weight_spectra``): their singular values are taken.

    Raises:
        NumericalError: a weight or covariance isn't finite; names the layer.
    """
    result, weights = [], {spectrum.shape.name: spectrum for spectrum in known}
    roots: dict[str, tuple[torch.Tensor, torch.Tensor, Vector]] = {}
    for done, layer in enumerate(handle.layers, start=1):
        if layer.input_group not in roots:
            roots.clear()  # readers of one input stand together: keep one group's roots at a time
            inputs = statistics.inputs[layer.input_group]
            pooled = square_root(inputs.pooled, layer.input_group)
            values = eigenvalues(inputs.pooled, layer.input_group).numpy()
            roots[layer.input_group] = (pooled, square_root(inputs.sample, layer.input_group), values)
        pooled_root, sample_root, input_eigenvalues = roots[layer.input_group]
        weight = weight_of(handle.module.get_submodule(layer.name)).detach().to("cpu", torch.float64)
        before = weights.get(layer.name)
        result.append(
            LayerSpectrum(
                shape=layer.shape,
                weight_singular_values=_singular_values(weight) if before is None else before.weight_singular_values,
                feature_eigenvalues=_singular_values(weight @ pooled_root) ** 2,
                feature_eigenvalues_sample=_singular_values(weight @ sample_root) ** 2,
                input_eigenvalues=input_eigenvalues,
                shuffled_singular_values=(
                    _singular_values(shuffled(weight.float())).astype(np.float64) if before is None else before.shuffled_singular_values
                ),
            )
        )
        if progress is not None:
            progress(done, len(handle.layers))
    return tuple(result)


def shuffled(weight: torch.Tensor) -> torch.Tensor:
    """Return ``weight`` (m, n) with its entries in random places, the same ones each time: no direction is left but by chance."""
    places = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(_SHUFFLE_SEED))
    return weight.flatten()[places].reshape(weight.shape)


def _singular_values(matrix: torch.Tensor) -> Vector:
    values: Vector = torch.linalg.svdvals(matrix).numpy()
    return values
