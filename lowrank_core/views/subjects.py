"""Which compressed models can be measured, what they are called, and what requests say in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lowrank_core.allocation import ALLOCATORS
from lowrank_core.config import SearchConfig
from lowrank_core.presets import PRESETS
from lowrank_core.search.records import HEALED, PRESET, TrialRecord
from lowrank_core.search.space import BASELINES
from lowrank_core.views.compare import Comparison, label_of, name_of
from lowrank_core.views.formatting import number, percent
from lowrank_core.views.healing import Healing
from lowrank_core.views.trials import answers_of, trial_label

__all__ = ["PRESET_KEYS", "Subject", "candidates", "healable", "request_words", "unmeasured", "usual_choice"]

Subject = int | str
"""A trial's number, an allocator's name, ``preset:NAME`` or ``healed:FOLDER``."""

PRESET_KEYS: tuple[Subject, ...] = tuple(f"{PRESET}{name}" for name in PRESETS)

_KINDS = {
    "compare": "measuring on test text",
    "other_text": "measuring on a second text",
    "tokens": "reading a text token by token",
    "generate": "continuing a prompt",
    "speed": "timing",
    "export": "writing the model",
    "measure": "putting an allocation in line",
    "heal": "healing",
    "verify": "measuring an exported folder again",
}


def candidates(
    trials: Sequence[TrialRecord], search: SearchConfig, healings: Sequence[Healing] = (), picked: int | None = None
) -> dict[Subject, str]:
    """Return what can be measured: the best trial (or the Pareto front), the one that is ``picked``, healed models, what allocators
    choose, and presets. Empty without a complete trial; a label never changes while its model is there."""
    answers = answers_of(trials, search)
    if not answers:
        return {}
    found: dict[Subject, str] = {trial.number: _answer_label(trial, search) for trial in answers}
    chosen = next((trial for trial in trials if trial.number == picked and trial.state == "complete"), None)
    if chosen is not None and chosen.number not in found:
        found[chosen.number] = f"Chosen: {trial_label(chosen)}, value {number(chosen.value, 4)}"
    at = "" if search.most_ratio is None else f" at {percent(search.compression_ratio, 0)} removed"
    healed: dict[Subject, str] = {f"{HEALED}{each.folder}": f"Healed: {each.name}" for each in healings if each.report is not None}
    rules: dict[Subject, str] = {
        name: f"{'Baseline' if name in BASELINES else 'Allocator'}: {method.label}{at}" for name, method in ALLOCATORS.items()
    }
    presets: dict[Subject, str] = {f"{PRESET}{name}": f"Preset: {preset.label}{at}" for name, preset in PRESETS.items()}
    return found | healed | rules | presets


def _answer_label(trial: TrialRecord, search: SearchConfig) -> str:
    if search.most_ratio is None:
        return f"Best: {trial_label(trial)}, value {number(trial.value, 4)}"
    return f"Front: {trial_label(trial)}, {percent(trial.compression_ratio)} removed, value {number(trial.value, 4)}"


def usual_choice(found: Mapping[Subject, str], trials: Sequence[TrialRecord], picked: int | None) -> list[Subject]:
    """Return what is chosen before the user chooses: the picked trial or the first of all, and the baselines that it is not."""
    first = picked if picked in found else next(iter(found))
    assert first is not None
    return [first, *(name for name in BASELINES if name in found and name != label_of(first, trials))]


def healable(found: Mapping[Subject, str]) -> dict[Subject, str]:
    """Return those that are allocations of the run's own search: they can be healed and exported."""
    return {key: label for key, label in found.items() if not str(key).startswith((PRESET, HEALED))}


def unmeasured(
    subjects: Sequence[Subject], trials: Sequence[TrialRecord], found: Sequence[Comparison], waiting: Sequence[Mapping[str, object]] = ()
) -> list[Subject]:
    """Return those of ``subjects`` that have no measurement in ``found``, nor wait for one among the requests ``waiting``."""
    asked = {_argument(request, "trial") for request in waiting}
    known = {comparison.key for comparison in found}
    return [subject for subject in subjects if label_of(subject, trials) not in known and subject not in asked]


def _argument(request: Mapping[str, object], name: str) -> object:
    arguments = request.get("arguments")
    return arguments.get(name) if isinstance(arguments, Mapping) else None


def request_words(request: Mapping[str, object]) -> str:
    """Return what a request asks for: ``trial 3: measuring on test text``."""
    kind, trial = str(request.get("kind")), _argument(request, "trial")
    name = f"trial {trial}" if isinstance(trial, int) else name_of(trial.removeprefix(HEALED)) if isinstance(trial, str) else ""
    text = _argument(request, "text") if kind == "other_text" else None
    words = _KINDS.get(kind, kind) + (f" ({text})" if text else "")
    return f"{name}: {words}" if name else words
