"""From a compressed model to the folder of a healed one: the steps that a run and the command share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lowrank_core.compression.build import CompressedModel
from lowrank_core.config import ExportConfig, TextConfig
from lowrank_core.config.healing import HealingConfig
from lowrank_core.evaluation import EvaluationReport
from lowrank_core.export.manifest import ExportManifest
from lowrank_core.export.measuring import HeldOut, metrics_of
from lowrank_core.export.writing import export
from lowrank_core.healing.trainer import heal
from lowrank_core.models import ModelHandle
from lowrank_core.runs.healing_records import HealingReport
from lowrank_core.text import WindowSet, load_windows
from lowrank_core.types import Progress

__all__ = ["healed_model", "write_healed"]


def healed_model(
    model: CompressedModel,
    dense: ModelHandle,
    texts: tuple[TextConfig, WindowSet],
    config: HealingConfig,
    *,
    folder: Path,
    progress: Progress | None = None,
) -> tuple[CompressedModel, HealingReport]:
    """Return ``model`` trained towards ``dense``, and what happened; ``folder`` is where a training that was killed goes on.

    Args:
        texts: the text whose calibration split is trained on, drawn by the healing's own seed, and the windows that choose.

    Raises:
        LowRankError: as ``load_windows`` and ``heal``.
    """
    text, validation = texts
    training = load_windows(replace(text, seed=config.seed), model.handle.tokenizer, "calibration", count=config.train_windows)
    result = heal(model.handle, dense, (training, validation), config, folder=folder, progress=progress)
    return CompressedModel(replace(result.handle, reference=dense.reference), model.report), result.report


def write_healed(
    healed: tuple[CompressedModel, HealingReport],
    folder: Path,
    measured: tuple[EvaluationReport, EvaluationReport],
    *,
    provenance: Mapping[str, object],
    test: HeldOut,
    config: ExportConfig | None = None,
) -> ExportManifest:
    """Write the result of ``healed_model``, with its metrics before and after for the card.

    Args:
        measured: on test text, as it was compressed and as it is healed.
        provenance: how the compressed model was made.

    Raises:
        LowRankError: as ``export``.
    """
    (model, report), (before, after) = healed, measured
    figures = metrics_of(before.to_mapping(), healed=after.to_mapping())
    return export(model, folder, provenance={**provenance, "healing": report.summary}, config=config, figures=figures, test=test)
