"""Measuring the top directions of a module's features: the tokens that lie furthest along each.

Notation::

    x, μ     an input of the module (n,) and its mean over the calibration
    C, W     pooled covariance (n, n) of the input; weight (m, n)
    v_i      i-th eigenvector of C (input), or Wᵀ u_i with the i-th eigenvector u_i of W C Wᵀ (output); λ_i its eigenvalue
    p_i      (x - μ) · v_i / √λ_i: a token's projection, in standard deviations along the direction
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lowrank_core.config.directions import DirectionsConfig
from lowrank_core.errors import ConfigError, ModelError
from lowrank_core.linalg import principal_directions
from lowrank_core.models.handle import LayerSpec, ModelHandle, weight_of
from lowrank_core.spectra.directions import Direction, Directions, TokenHit
from lowrank_core.statistics.calibration import LayerStatistics
from lowrank_core.text.windows import WindowSet
from lowrank_core.types import Progress

__all__ = ["top_directions"]

_BEFORE, _AFTER = 8, 4  # tokens of context


def top_directions(
    handle: ModelHandle,
    windows: WindowSet,
    statistics: LayerStatistics,
    config: DirectionsConfig,
    *,
    progress: Progress | None = None,
) -> Directions:
    """Return the top directions of one side of a module, each with the tokens of ``windows`` that lie furthest along it.

    Tokens are ranked by abs(p_i); each different token counts once, where it lies furthest. Directions without variance are left out.

    Raises:
        ConfigError: there is no such module.
        NumericalError: the covariance isn't finite; names the layer.
        ModelError: the model does not run the module.
    """
    layer = next((layer for layer in handle.layers if layer.name == config.module), None)
    if layer is None:
        raise ConfigError(f"{handle.reference} has no compressible module {config.module!r}; one is {handle.layers[0].name}.")
    inputs = statistics.inputs[layer.input_group]
    readout, shares = _readout(handle, layer, inputs.pooled, config)
    seen = windows.first(config.windows)
    parts = []
    for rows in _inputs(handle, layer, seen, config.batch_size):
        parts.append((rows.to("cpu", torch.float64) - inputs.mean) @ readout)
        if progress is not None:
            progress(min(len(parts) * config.batch_size, seen.windows), seen.windows)
    projections, ids = torch.cat(parts), seen.ids.flatten()
    result = tuple(
        Direction(number, share, _furthest(handle, seen, projections[:, number - 1], ids, config.tokens))
        for number, share in enumerate(shares, start=1)
    )
    dtype = handle.dtype
    protocol = f"{seen.dataset}, {seen.split} split: {seen.windows} windows of {seen.context} tokens, {ids.numel():,} tokens, {dtype}"
    return Directions(config.module, config.side, protocol, result)


def _readout(handle: ModelHandle, layer: LayerSpec, pooled: Tensor, config: DirectionsConfig) -> tuple[Tensor, list[float]]:
    """Return v_i / √λ_i as columns (n, k), and the shares of energy."""
    if config.side == "input":
        values, vectors = principal_directions(pooled, layer.name)
    else:
        weight = weight_of(handle.module.get_submodule(layer.name)).detach().to("cpu", torch.float64)
        values, vectors = principal_directions(weight @ pooled @ weight.T, layer.name)
        vectors = weight.T @ vectors[:, : config.directions]
    total = float(values.sum())
    count = int((values[: config.directions] > torch.finfo(torch.float64).eps * total).sum())
    return vectors[:, :count] / values[:count].sqrt(), [float(value) / total for value in values[:count]]


class _Seen(Exception):
    """Ends a forward pass once the module's input is there."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows


@torch.inference_mode()
def _inputs(handle: ModelHandle, layer: LayerSpec, windows: WindowSet, batch_size: int) -> Iterator[Tensor]:
    """Yield the layer's inputs (tokens, n), a batch of windows at a time."""

    def stop(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        raise _Seen(arguments[0])

    hook = handle.module.get_submodule(layer.name).register_forward_pre_hook(stop)
    try:
        for ids in torch.split(windows.ids, batch_size):
            yield _until_seen(handle, ids).reshape(-1, layer.shape.d_in)
    finally:
        hook.remove()


def _until_seen(handle: ModelHandle, ids: Tensor) -> Tensor:
    try:
        handle.module.base_model(input_ids=ids.to(handle.device), use_cache=False)
    except _Seen as seen:
        return seen.rows
    raise ModelError(f"{handle.reference} did not run the module that was asked for. Choose another one.")


def _furthest(handle: ModelHandle, windows: WindowSet, projections: Tensor, ids: Tensor, count: int) -> tuple[TokenHit, ...]:
    """Return the ``count`` different tokens of largest magnitude along one direction (tokens,)."""
    places: dict[int, int] = {}
    for place in projections.abs().argsort(descending=True, stable=True).tolist():
        places.setdefault(int(ids[place]), place)
        if len(places) == count:
            break
    sign = 1.0 if float(projections[next(iter(places.values()))]) >= 0 else -1.0
    return tuple(_hit(handle, windows, place, sign * float(projections[place])) for place in places.values())


def _hit(handle: ModelHandle, windows: WindowSet, place: int, projection: float) -> TokenHit:
    window, position = divmod(place, windows.context)
    ids = windows.ids[window]

    def words(start: int, stop: int) -> str:
        return str(handle.tokenizer.decode(ids[max(0, start) : stop].tolist(), clean_up_tokenization_spaces=False))

    before, after = words(position - _BEFORE, position), words(position + 1, position + 1 + _AFTER)
    return TokenHit(words(position, position + 1), before, after, projection)
