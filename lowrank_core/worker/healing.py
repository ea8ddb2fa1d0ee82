"""Healing of a trial's model in a run: its folder, and resuming."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lowrank_core.allocation import RankAllocation
from lowrank_core.compression.build import CompressedModel
from lowrank_core.config import ExportConfig, to_mapping
from lowrank_core.config.healing import HEALER_LABELS, HealingConfig
from lowrank_core.errors import ConfigError
from lowrank_core.export import HeldOut, export, healed_model, read_manifest, write_healed
from lowrank_core.export.manifest import report_of
from lowrank_core.models import load_model
from lowrank_core.runs import Run, write_json
from lowrank_core.runs.healing_records import read_report, write_report
from lowrank_core.studies.model_ref import ModelKey
from lowrank_core.studies.naming import model_name
from lowrank_core.studies.requests import BehaviourAnswer, HealAnswer, HealRequest, answers_of
from lowrank_core.worker.context import WorkerContext

__all__ = ["behaviour_of", "export_healed", "heal_allocation"]


def _folder(run: Run, allocation: RankAllocation, config: HealingConfig) -> Path:
    """Return the folder of this healing: equal ranks and settings share one."""
    key = json.dumps([dict(allocation.ranks), to_mapping(config)], sort_keys=True)
    words = f"{allocation.label}-{config.method}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    return run.path / "healed" / words.replace(" ", "-")


def heal_allocation(
    worker: WorkerContext, request: HealRequest, allocated: tuple[RankAllocation, CompressedModel], how: Mapping[str, object]
) -> HealAnswer:
    """Heal a compressed model, write it, and measure it on test text before and after.

    What is done already is not done again, and a healing that was stopped or killed goes on from its last validation.

    Args:
        allocated: the allocation and the model compressed so.
        how: the model was made, for its folder.

    Raises:
        LowRankError: as ``healed_model`` and ``write_healed``.
        Cancelled: stopped; what was trained so far stays.
    """
    config, (allocation, model), test = request.healing, allocated, worker.session.windows.test
    folder = _folder(worker.run, allocation, config)
    label = f"{allocation.label}, healed by {config.method}"
    write_json(folder / "request.json", {"label": label, "allocation": allocation.label, "healing": to_mapping(config)})
    before = worker.evaluations.of(allocation.ranks)
    if before is None:
        before = worker.evaluations.keep(
            allocation.ranks, worker.measured(model.handle, test, f"Measuring {model_name(allocation.label)} on test text")
        )
    report, written = read_report(folder), worker.run.path / "exports" / folder.name
    if report is None or not written.is_dir():
        stage = f"Healing {model_name(allocation.label)}: {HEALER_LABELS[config.method]}"
        texts = worker.run.config.text, worker.session.windows.validation
        with worker.reporter.stage(stage, config.steps) as progress:
            healed = healed_model(model, worker.session.handle, texts, config, folder=folder, progress=progress)
        smaller, report = healed
        after = worker.measured(smaller.handle, test, f"Measuring {model_name(label)}, on test text")
        with worker.reporter.stage("Writing the healed model"):
            write_healed(healed, written, (before, after), provenance=how, test=_held_out(worker))
        write_report(folder, report)
    else:
        loaded = load_model(replace(worker.run.config.model, reference=str(written)))
        after = worker.measured(loaded, test, f"Measuring {model_name(label)}, on test text")
    return HealAnswer(
        trial=request.trial,
        label=label,
        path=str(written),
        healing=report.summary,
        report=after.to_mapping(),
        one_shot=before.to_mapping(),
        folder=folder.name,
    )


def export_healed(worker: WorkerContext, name: str, config: ExportConfig) -> str:
    """Write a healed model of this run in the form of ``config``, and return its folder; an existing one is kept.

    It starts from what is on disk, so that what is written here is what was written there.

    Raises:
        ConfigError: the run has no healed model ``name``.
        LowRankError: its files are damaged, or as ``export``.
        Cancelled: stopped or withdrawn.
    """
    run, reporter = worker.run, worker.reporter
    source = run.path / "exports" / Path(name).name
    if not Path(name).name or not source.is_dir() or "healing" not in (manifest := read_manifest(source)).details:
        raise ConfigError(f"this run has no healed model {name!r}. Heal one first.")
    folder = run.path / "exports" / config.folder_name(source.name)
    if not folder.exists():
        with reporter.stage("Loading the healed model"):
            loaded = load_model(replace(run.config.model, reference=str(source)))
        model = CompressedModel(replace(loaded, reference=manifest.made_from), report_of(manifest))
        test = _held_out(worker)
        with reporter.stage("Writing it, and measuring what was written") as progress:
            moments = worker.session.pipeline.input_moment
            export(
                model,
                folder,
                provenance=manifest.provenance,
                config=config,
                figures={**manifest.figures, **behaviour_of(run, f"healed:{source.name}")},
                test=test,
                moments=moments,
                progress=progress,
            )
    return str(folder)


def behaviour_of(run: Run, trial: ModelKey) -> dict[str, object]:
    """Return the newest behaviour of the model ``trial``, under that name, for its model card; nothing where it was not measured."""
    known = [answer.result.to_mapping() for answer in answers_of(run, BehaviourAnswer) if answer.trial == trial]
    return {"behaviour": known[-1]} if known else {}


def _held_out(worker: WorkerContext) -> HeldOut:
    return HeldOut(worker.run.config.text, worker.session.windows.test)
