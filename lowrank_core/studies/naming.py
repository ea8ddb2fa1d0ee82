"""Names of trials and models: one rule for pages, report and commands."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_core.allocation import ALLOCATORS
from lowrank_core.presets.dense import DENSE
from lowrank_core.presets.recipes import PRESETS
from lowrank_core.studies.model_ref import ModelRef
from lowrank_core.studies.records import MANUAL, TrialRecord

__all__ = ["model_name", "trial_label"]


def trial_label(trial: TrialRecord) -> str:
    """Return ``Trial 7``, or with what it is if it was not sampled: ``Uniform (trial 0)``."""
    name = _given_name(trial)
    return f"{name} (trial {trial.number})" if name else f"Trial {trial.number}"


def _given_name(trial: TrialRecord) -> str:
    return ALLOCATORS[trial.label].label if trial.label in ALLOCATORS else "Manual" if trial.label == MANUAL else ""


def model_name(label: str, trials: Sequence[TrialRecord] = ()) -> str:
    """Return what a model is called on every page, in the report and by commands: as ``trial_label`` calls its trial.

    Args:
        label: what a measurement is filed under: ``trial N``, an allocator's name, ``preset:NAME``; with ``, healed by METHOD`` and more.
        trials: of the run; without them a trial goes by its number, and a rule by its name alone.
    """
    before, comma, how = label.partition(",")
    return f"{_name(before, trials)}{comma}{how}"


def _name(label: str, trials: Sequence[TrialRecord]) -> str:
    ref = ModelRef.find(label)
    if ref is not None and ref.kind == "preset" and ref.name in PRESETS:
        return f"Preset: {PRESETS[ref.name].label}"
    if ref is not None and ref.kind == "dense" and ref.name in DENSE:
        return DENSE[ref.name].label
    number = ref.number if ref is not None else None
    alike = [trial for trial in trials if (trial.number == number if number is not None else trial.label == label != MANUAL)]
    if len(alike) == 1:  # a search over a range of ratios has a rule's allocation at each end
        return trial_label(alike[0])
    if number is not None:
        return f"Trial {number}"
    return ALLOCATORS[label].label if label in ALLOCATORS else label
