"""What a trial, and any other compressed model of a run, is called: the one name of every page, of the report and of the commands."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lowrank_core.allocation import ALLOCATORS
from lowrank_core.presets.recipes import PRESETS
from lowrank_core.studies.records import MANUAL, PRESET, TrialRecord

__all__ = ["model_name", "trial_label"]


def trial_label(trial: TrialRecord) -> str:
    """Return ``Trial 7``, or with what it is if it was not sampled: ``Uniform (trial 0)``."""
    name = _given_name(trial)
    return f"{name} (trial {trial.number})" if name else f"Trial {trial.number}"


def _given_name(trial: TrialRecord) -> str:
    return ALLOCATORS[trial.label].label if trial.label in ALLOCATORS else "By hand" if trial.label == MANUAL else ""


def model_name(label: str, trials: Sequence[TrialRecord] = ()) -> str:
    """Return what a model is called on every page, in the report and by commands: as ``trial_label`` calls its trial.

    Args:
        label: what a measurement is filed under: ``trial N``, an allocator's name, ``preset:NAME``; with ``, healed by METHOD`` and more.
        trials: of the run; without them a trial goes by its number, and a rule by its name alone.
    """
    before, comma, how = label.partition(",")
    return f"{_name(before, trials)}{comma}{how}"


def _name(label: str, trials: Sequence[TrialRecord]) -> str:
    if label.startswith(PRESET) and (preset := PRESETS.get(label.removeprefix(PRESET))) is not None:
        return f"Preset: {preset.label}"
    number = re.fullmatch(r"trial (\d+)", label)
    alike = [trial for trial in trials if trial.number == int(number[1])] if number else [t for t in trials if t.label == label != MANUAL]
    if len(alike) == 1:  # a search over a range of ratios has a rule's allocation at each end
        return trial_label(alike[0])
    if number:
        return f"Trial {number[1]}"
    return ALLOCATORS[label].label if label in ALLOCATORS else label
