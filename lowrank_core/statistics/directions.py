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
from lowrank_core.models.experts import Expert
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

    Tokens are ranked by abs(p_i); each different token counts once, where it lies furthest. Directions without variance are left out,
    and of an expert the tokens that are not routed to it.

    Raises:
        ConfigError: there is no such module.
        NumericalError: the covariance isn't finite; names the layer.
        ModelError: the model does not run the module, no token of the windows is routed to it, or its mixture does not say which are.
    """
    layer = next((layer for layer in handle.layers if layer.name == config.module), None)
    if layer is None:
        raise ConfigError(f"{handle.reference} has no compressible module {config.module!r}; one is {handle.layers[0].name}.")
    inputs = statistics.inputs[layer.input_group]
    readout, shares = _readout(handle, layer, inputs.pooled, config)
    seen = windows.first(config.windows)
    parts, places = [], []
    for begin, rows in _inputs(handle, layer, seen, config.batch_size):
        parts.append((rows.inputs.to("cpu", torch.float64) - inputs.mean) @ readout)
        places.append(begin * seen.context + rows.tokens.cpu())
        if progress is not None:
            progress(min(begin + config.batch_size, seen.windows), seen.windows)
    projections, positions = torch.cat(parts), torch.cat(places)
    if not len(positions):
        raise ModelError(
            f"none of the {seen.ids.numel():,} tokens of {seen.windows} windows is routed to the expert of {config.module}, so it has no "
            "directions to show. Take more windows, or another expert."
        )
    result = tuple(
        Direction(number, share, _furthest(handle, seen, projections[:, number - 1], positions, config.tokens))
        for number, share in enumerate(shares, start=1)
    )
    routed = "" if len(positions) == seen.ids.numel() else f", {len(positions):,} of which are routed to the expert"
    words = f"{seen.windows} windows of {seen.context} tokens, {seen.ids.numel():,} tokens{routed}, {handle.dtype}"
    protocol = f"{seen.dataset}, {seen.split} split: {words}"
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
    """Ends a forward pass once the module's ``inputs`` (rows, n) are there, those of ``tokens`` (rows,) of the pass."""

    def __init__(self, inputs: Tensor, tokens: Tensor) -> None:
        super().__init__()
        self.inputs, self.tokens = inputs, tokens


@torch.inference_mode()
def _inputs(handle: ModelHandle, layer: LayerSpec, windows: WindowSet, batch_size: int) -> Iterator[tuple[int, _Seen]]:
    """Yield the first window of each batch, and the layer's inputs in it."""
    owner = handle.module.get_submodule(layer.name.rpartition(".")[0])

    def stop(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        rows = arguments[0].reshape(-1, layer.shape.d_in)
        routed = owner.routed if isinstance(owner, Expert) else None
        tokens = torch.arange(len(rows)) if routed is None else routed.tokens
        if len(tokens) != len(rows):
            raise ModelError(f"the mixture of {layer.name} does not say which tokens reach its experts. Choose a layer outside of it.")
        raise _Seen(rows, tokens)

    hook = handle.module.get_submodule(layer.name).register_forward_pre_hook(stop)
    nothing = _Seen(torch.empty(0, layer.shape.d_in), torch.empty(0, dtype=torch.int64)) if isinstance(owner, Expert) else None
    try:
        for begin in range(0, windows.windows, batch_size):
            yield begin, _until_seen(handle, windows.ids[begin : begin + batch_size], nothing)
    finally:
        hook.remove()


def _until_seen(handle: ModelHandle, ids: Tensor, otherwise: _Seen | None) -> _Seen:
    """Return what the module is given in a pass, or ``otherwise``, where it may be passed over."""
    try:
        handle.module.base_model(input_ids=ids.to(handle.device), use_cache=False)
    except _Seen as seen:
        return seen
    if otherwise is None:
        raise ModelError(f"{handle.reference} did not run the module that was asked for. Choose another one.")
    return otherwise


def _furthest(handle: ModelHandle, windows: WindowSet, projections: Tensor, positions: Tensor, count: int) -> tuple[TokenHit, ...]:
    """Return the ``count`` different tokens of largest magnitude along one direction (rows,), those at ``positions`` (rows,)."""
    ids = windows.ids.flatten()[positions]
    rows: dict[int, int] = {}
    for row in projections.abs().argsort(descending=True, stable=True).tolist():
        rows.setdefault(int(ids[row]), row)
        if len(rows) == count:
            break
    sign = 1.0 if float(projections[next(iter(rows.values()))]) >= 0 else -1.0
    return tuple(_hit(handle, windows, int(positions[row]), sign * float(projections[row])) for row in rows.values())


def _hit(handle: ModelHandle, windows: WindowSet, place: int, projection: float) -> TokenHit:
    window, position = divmod(place, windows.context)
    ids = windows.ids[window]

    def words(start: int, stop: int) -> str:
        return str(handle.tokenizer.decode(ids[max(0, start) : stop].tolist(), clean_up_tokenization_spaces=False))

    before, after = words(position - _BEFORE, position), words(position + 1, position + 1 + _AFTER)
    return TokenHit(words(position, position + 1), before, after, projection)
