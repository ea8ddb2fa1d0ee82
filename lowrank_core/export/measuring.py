"""The perplexity of a folder as it was written: the same when it is exported and when it is verified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank_core.config import ModelSource, TextConfig
from lowrank_core.evaluation import evaluate
from lowrank_core.export.manifest import Measurement, Protocol
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.text import WindowSet, load_windows
from lowrank_core.types import Progress

__all__ = ["HeldOut", "metrics_of", "held_out", "loaded_like", "measured"]

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class HeldOut:
    """Windows that the model was not made with, and the config that cut them: with it they can be cut again."""

    config: TextConfig
    windows: WindowSet


def loaded_like(handle: ModelHandle, folder: Path) -> ModelHandle:
    """Load the model in ``folder`` to where ``handle`` is, and as that is held.

    Raises:
        ModelError: it can't be loaded.
    """
    return load_model(ModelSource(str(folder), str(handle.device), _DTYPES.get(handle.module.dtype, "auto")), weights=handle.weights)


def measured(handle: ModelHandle, test: HeldOut, *, progress: Progress | None = None) -> Measurement:
    """Measure a model that was loaded from the folder in question.

    Raises:
        NumericalError: a window's loss is not finite.
        ModelError: the windows do not fit the model.
    """
    windows, config = test.windows, test.config
    report = evaluate(handle, windows, progress=progress)
    protocol = Protocol(
        text=config.reference,
        split=windows.split,
        windows=windows.windows,
        context=windows.context,
        bos=config.bos,
        seed=config.seed,
        dtype=handle.dtype,
        sha256=windows.sha256,
        line=windows.protocol,
    )
    return Measurement(report.perplexity, report.perplexity_interval, report.nll, protocol)


def held_out(handle: ModelHandle, config: TextConfig) -> HeldOut:
    """Return the test windows of a text.

    Raises:
        TextError: the text can't be read, or its test split is shorter than one window.
    """
    return HeldOut(config, load_windows(config, handle.tokenizer, "test", count=config.test_windows))


def metrics_of(report: Mapping[str, object], *, healed: Mapping[str, object] | None = None) -> dict[str, object]:
    """Return what a model card shows of a compressed model next to its dense one, and of the healed model on the same windows.

    Args:
        report, healed: ``EvaluationReport.to_mapping()`` of the one-shot compressed, and of the healed model.
    """
    rows = {"dense": _figure(report, "dense_"), "compressed": _figure(report, ""), "healed": _figure(healed or {}, "")}
    result = {"perplexity": {name: row for name, row in rows.items() if row["perplexity"] is not None}, "protocol": report.get("protocol")}
    warnings = report.get("warnings")
    return {**result, "warnings": list(warnings)} if isinstance(warnings, list | tuple) and warnings else result


def _figure(report: Mapping[str, object], which: str) -> dict[str, object]:
    return {"perplexity": report.get(f"{which}perplexity"), "interval": report.get(f"{which}perplexity_interval")}
