"""Measurable models of a run, their labels, and labels of requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lowrank_core.allocation import ALLOCATORS, RULES
from lowrank_core.config import SearchConfig
from lowrank_core.presets.dense import DENSE
from lowrank_core.presets.differences import COMMON
from lowrank_core.presets.recipes import PRESETS
from lowrank_core.studies.model_ref import ModelKey, ModelRef
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studies.requests import REQUESTS
from lowrank_core.studies.space import BASELINES
from lowrank_core.studio.compare.comparison import Comparison, argument_of, label_of
from lowrank_core.studio.compare.healing_runs import Healing
from lowrank_core.studio.shared.formatting import number, percent
from lowrank_core.studio.shared.trial_names import answers_of, model_name, trial_label

__all__ = ["PRESET_KEYS", "candidates", "healable", "preset_notes", "request_words", "unmeasured", "usual_choice"]

PRESET_KEYS: tuple[ModelKey, ...] = tuple(ModelRef("preset", name).key for name in PRESETS)


def candidates(
    trials: Sequence[TrialRecord], search: SearchConfig, healings: Sequence[Healing] = (), picked: int | None = None
) -> dict[ModelKey, str]:
    """Return the measurable models: complete trials (best or Pareto front first), healed models, allocators, presets, and the dense
    model in 8 and 4 bits.

    A label stays the same while its model is there: Streamlit knows an option by it. Trials that a rule chose go by the rule's name,
    but for those of the answer and the one that is ``picked``.
    """
    results = answers_of(trials, search)
    if not results:
        return {}
    first = [trial.number for trial in results]
    complete = sorted((trial for trial in trials if trial.state == "complete"), key=lambda trial: (trial.value or 0.0, trial.number))
    others = [trial for trial in complete if trial.number == picked or search.max_ratio is not None or trial.label not in ALLOCATORS]
    result: dict[ModelKey, str] = {
        trial.number: _trial_label(trial, search) for trial in (*results, *(trial for trial in others if trial.number not in first))
    }
    at = "" if search.max_ratio is None else f" at {percent(search.compression_ratio, 0)} removed"
    healed: dict[ModelKey, str] = {
        ModelRef("healed", each.folder).key: f"Healed: {each.name}" for each in healings if each.report is not None
    }
    rules: dict[ModelKey, str] = {
        name: f"{'Baseline' if name in BASELINES else 'Allocator'}: {method.label}{at}" for name, method in RULES.items()
    }
    presets: dict[ModelKey, str] = {ModelRef("preset", name).key: f"Preset: {preset.label}{at}" for name, preset in PRESETS.items()}
    dense: dict[ModelKey, str] = {ModelRef("dense", name).key: model.label for name, model in DENSE.items()}
    return result | healed | rules | presets | dense


def _trial_label(trial: TrialRecord, search: SearchConfig) -> str:
    removed = "" if search.max_ratio is None else f"{percent(trial.compression_ratio)} removed, "
    return f"{trial_label(trial)}, {removed}value {number(trial.value, 4)}"


def preset_notes(chosen: Sequence[ModelKey]) -> list[str]:
    """Return how the chosen presets differ from their papers, ending with what holds for all."""
    presets = [PRESETS[ModelRef.parse(key).name] for key in chosen if key in PRESET_KEYS]
    notes = [f"**{preset.label}** ({preset.reference}): {preset.differs}" for preset in presets if preset.differs]
    return [*notes, COMMON] if notes else []


def usual_choice(result: Mapping[ModelKey, str], trials: Sequence[TrialRecord], picked: int | None) -> list[ModelKey]:
    """Return the default choice: the picked trial or the first, and the baselines."""
    first = picked if picked in result else next(iter(result))
    assert first is not None
    return [first, *(name for name in BASELINES if name in result and name != label_of(first, trials))]


def healable(result: Mapping[ModelKey, str]) -> dict[ModelKey, str]:
    """Return the allocations of the run's own search, which can be healed and exported."""
    return {key: label for key, label in result.items() if ModelRef.parse(key).searched}


def unmeasured(
    subjects: Sequence[ModelKey], trials: Sequence[TrialRecord], result: Sequence[Comparison], waiting: Sequence[Mapping[str, object]] = ()
) -> list[ModelKey]:
    """Return those of ``subjects`` neither measured nor queued."""
    asked = {argument_of(request, "trial") for request in waiting}
    known = {comparison.key for comparison in result}
    return [subject for subject in subjects if label_of(subject, trials) not in known and subject not in asked]


def request_words(request: Mapping[str, object]) -> str:
    """Return a request in words: ``Trial 3: measuring on test text``."""
    kind, trial = str(request.get("kind")), argument_of(request, "trial")
    ref = None if trial is None else ModelRef.find(trial)
    name = "" if ref is None else model_name(ref.name if ref.kind == "healed" else ref.label)
    text = argument_of(request, "text") if kind == "other_text" else None
    words = (REQUESTS[kind].words if kind in REQUESTS else kind) + (f" ({text})" if text else "")
    return f"{name}: {words}" if name else words
