"""Calibration: one pass over the calibration windows, one set of moments for each input that layers share."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank_core.config import TOKENS_PER_DIMENSION, CalibrationConfig
from lowrank_core.errors import ModelError, NumericalError
from lowrank_core.models.handle import LayerSpec, ModelHandle
from lowrank_core.moments import InputStatistics, PooledAccumulator
from lowrank_core.spectra import LayerSpectrum, Vector
from lowrank_core.text.windows import WindowSet

__all__ = ["LayerStatistics", "cached_statistics", "collect_statistics", "load_statistics", "save_statistics", "statistics_key"]

Progress = Callable[[int, int], None]
"""Called with (done, total); may raise ``Cancelled``."""

_FORMAT = 1
"""Raise it when the meaning of a stored statistic changes: old caches are then not found."""


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of every input, by input group, and how they were gathered."""

    inputs: Mapping[str, InputStatistics]
    config: CalibrationConfig
    seconds: float

    def warnings(self) -> tuple[str, ...]:
        """Return what a user should know before trusting the covariances."""
        thin = {name: s for name, s in self.inputs.items() if s.count < TOKENS_PER_DIMENSION * s.width}
        if not thin:
            return ()
        worst = min(thin, key=lambda name: thin[name].count / thin[name].width)
        tokens, width = thin[worst].count, thin[worst].width
        return (
            f"{len(thin)} of {len(self.inputs)} covariances rest on fewer than {TOKENS_PER_DIMENSION} tokens per dimension "
            f"(the thinnest, {worst}: {tokens} tokens for {width} dimensions). Use more calibration windows.",
        )

    def describe(self, spectra: Sequence[LayerSpectrum], layers: Sequence[LayerSpec]) -> dict[str, object]:
        """Return the figures of each input, ready for JSON; ``spectra`` tell the conditions of the covariances."""
        members: dict[str, list[str]] = {}
        for layer in layers:
            members.setdefault(layer.input_group, []).append(layer.name)
        values = {s.shape.name: s.input_eigenvalues for s in spectra}
        return {
            "tokens": max(s.count for s in self.inputs.values()),
            "seconds": self.seconds,
            "group_size": self.config.group_size,
            "group_weights": self.config.group_weights,
            "inputs": [_describe_input(name, members[name], s, values[name]) for name, s in self.inputs.items()],
            "warnings": list(self.warnings()),
        }


def _describe_input(name: str, layers: list[str], statistics: InputStatistics, values: Vector) -> dict[str, object]:
    least = float(values[-1])
    return {
        "input_group": name,
        "width": statistics.width,
        "layers": layers,
        "tokens": statistics.count,
        "tokens_per_dimension": statistics.count / statistics.width,
        "condition": float(values[0]) / least if least > 0 else None,
        "group_tokens": statistics.group_counts.tolist(),
        "group_traces": statistics.group_traces.tolist(),
        "group_mean_shifts": statistics.group_mean_shifts.tolist(),
        "pooled_to_sample": statistics.pooled_to_sample,
    }


@contextmanager
def _recording(handle: ModelHandle, accumulators: Mapping[str, PooledAccumulator], context: int) -> Iterator[None]:
    """Feed the accumulators while the model runs; the hooks are gone afterwards whatever happens."""

    def hook_for(name: str, accumulator: PooledAccumulator) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            accumulator.update(_by_window(name, arguments[0], context))

        return hook

    hooks = [handle.module.get_submodule(name).register_forward_pre_hook(hook_for(name, a)) for name, a in accumulators.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _by_window(name: str, inputs: Tensor, context: int) -> Tensor:
    """Return inputs as (windows, context, n); OPT, for one, flattens them to (tokens, n) before its feed-forward layers."""
    if inputs.ndim == 3:
        return inputs
    if inputs.shape[0] % context:
        raise ModelError(f"{name} sees only some of the tokens (an expert that others are routed to); such layers can't be calibrated.")
    return inputs.reshape(-1, context, inputs.shape[-1])


def _check_memory(handle: ModelHandle, widths: Mapping[str, int]) -> None:
    needed = sum(4 * 8 * width * width for width in widths.values())  # group, total, pooled and one temporary, float64
    free = psutil.virtual_memory().available
    if handle.device.type == "cpu" and needed > free:
        raise ModelError(
            f"calibration of {handle.reference} needs about {needed / 2**30:.1f} GiB for its covariances, "
            f"and {free / 2**30:.1f} GiB are free. "
            "Use a machine with more memory, or a smaller model."
        )


def collect_statistics(
    handle: ModelHandle, windows: WindowSet, config: CalibrationConfig, *, progress: Progress | None = None
) -> LayerStatistics:
    """Run the model over ``windows`` and return the moments of every input of its compressible layers.

    The same model, windows and config give bit-equal results on one machine.

    Raises:
        NumericalError: an input holds NaN or Inf; names the layer.
        ModelError: the model has nothing to compress, the windows do not fit it, the covariances do not fit in memory, or a layer
            does not see every token.
    """
    if not handle.layers:
        raise ModelError(f"{handle.reference} has no dense linear layer left to compress. Give the original model.")
    handle.check_tokens(windows.ids)
    widths = {layer.input_group: layer.shape.d_in for layer in handle.layers}
    _check_memory(handle, widths)
    accumulators = {
        group: PooledAccumulator(group, width, group_size=config.group_size, group_weights=config.group_weights, device=handle.device)
        for group, width in widths.items()
    }
    began = time.perf_counter()
    with _recording(handle, accumulators, windows.context), torch.inference_mode():
        for start in range(0, windows.windows, config.batch_size):
            batch = windows.ids[start : start + config.batch_size].to(handle.device)
            handle.module.base_model(input_ids=batch, use_cache=False)  # without the head: no layer of ours is behind it
            if progress is not None:
                progress(min(start + config.batch_size, windows.windows), windows.windows)
    inputs = {group: accumulator.finish() for group, accumulator in accumulators.items()}
    return LayerStatistics(inputs, config, time.perf_counter() - began)


def statistics_key(handle: ModelHandle, windows: WindowSet, config: CalibrationConfig) -> str:
    """Return the name of these statistics: a hash of model, tokens and config (not of the batch size)."""
    parts = [_FORMAT, handle.fingerprint, windows.sha256, config.group_size, config.group_weights]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def cached_statistics(
    handle: ModelHandle, windows: WindowSet, config: CalibrationConfig, store: Path, *, progress: Progress | None = None
) -> tuple[LayerStatistics, bool]:
    """Return the statistics, and whether ``store`` had them; new ones are kept there, named by their content.

    Raises:
        as ``collect_statistics``; NumericalError also where the stored ones are damaged.
    """
    folder = store / statistics_key(handle, windows, config)
    stored = load_statistics(folder, config)
    if stored is not None:
        return stored, True
    statistics = collect_statistics(handle, windows, config, progress=progress)
    save_statistics(folder, statistics)
    return statistics, False


_TENSORS = tuple(f.name for f in fields(InputStatistics) if f.name != "count")


def save_statistics(folder: Path, statistics: LayerStatistics) -> None:
    """Write statistics under ``folder``: complete, or not at all."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        record: dict[str, object] = {"seconds": statistics.seconds, "inputs": {}}
        for index, (name, inputs) in enumerate(statistics.inputs.items()):
            save_file({part: getattr(inputs, part).contiguous() for part in _TENSORS}, temporary / f"{index}.safetensors")
            record["inputs"][name] = {"file": f"{index}.safetensors", "count": inputs.count}  # type: ignore[index]
        (temporary / "statistics.json").write_text(json.dumps(record), encoding="utf-8")
        if not folder.exists():
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_statistics(folder: Path, config: CalibrationConfig) -> LayerStatistics | None:
    """Return the statistics in ``folder``; None if there are none.

    Raises:
        NumericalError: the cache is damaged.
    """
    try:
        record = json.loads((folder / "statistics.json").read_text(encoding="utf-8"))
        inputs = {
            name: InputStatistics(count=entry["count"], **load_file(folder / entry["file"])) for name, entry in record["inputs"].items()
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise NumericalError(f"the stored statistics in {folder} are damaged ({error}). Delete that folder and calibrate again.") from error
    return LayerStatistics(inputs, config, record["seconds"])
