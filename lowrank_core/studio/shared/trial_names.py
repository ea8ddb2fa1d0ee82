"""Names and kinds of trials."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lowrank_core.allocation import ALLOCATORS
from lowrank_core.config import SearchConfig
from lowrank_core.studies.naming import model_name, trial_label
from lowrank_core.studies.records import MANUAL, TrialRecord, best_trial, pareto_front
from lowrank_core.studio.shared.formatting import kind_label, number, percent
from lowrank_core.wording import given_percent

__all__ = [
    "KINDS",
    "answers_of",
    "kind_of",
    "model_name",
    "partial_value",
    "ratio_words",
    "state_words",
    "trial_label",
    "trial_note",
    "unit_label",
]

_EXPERT = re.compile(r"\.\d+\..*\.(\d+)\.\w+$")  # the second number of a path

KINDS = ("sampled", "baseline", "manual", "running", "waiting", "stopped early", "outside budget", "failed")
"""Kinds of trials, each with its own shape."""

_BY_STATE = {"pruned": "stopped early", "infeasible": "outside budget"}


def kind_of(trial: TrialRecord) -> str:
    """Return which of ``KINDS`` a trial is."""
    if trial.state != "complete":
        return _BY_STATE.get(trial.state, trial.state)
    return "baseline" if trial.label in ALLOCATORS else "manual" if trial.label == MANUAL else "sampled"


def answers_of(trials: Sequence[TrialRecord], search: SearchConfig) -> list[TrialRecord]:
    """Return the result of a search: its best trial, or the Pareto front over a range of ratios."""
    if search.max_ratio is not None:
        return pareto_front(trials)
    best = best_trial(trials)
    return [] if best is None else [best]


def partial_value(trial: TrialRecord) -> float | None:
    """Return the mean loss over the windows that were measured; None without any."""
    return sum(trial.windows.values()) / len(trial.windows) if trial.windows else None


def state_words(trial: TrialRecord) -> str:
    """Return the outcome of a trial in words."""
    if trial.state == "failed":
        return f"failed: {trial.error}" if trial.error else "failed: its worker ended"
    if trial.state == "pruned":
        return f"stopped early after {len(trial.windows)} windows, {number(partial_value(trial), 4)} per token on them"
    if trial.state == "infeasible" and trial.label == MANUAL:
        return "over the budget: measured, but never the best"
    if trial.state == "infeasible":
        return "outside the range of ratios that counts: measured, but never the best"
    return trial.state


def trial_note(trial: TrialRecord) -> str:
    """Return a trial in one sentence."""
    start = f"{trial_label(trial)}, {state_words(trial)}"
    if not trial.finished:
        return start
    measured = f"value {number(trial.value, 4)}, perplexity {number(trial.perplexity)}, {percent(trial.compression_ratio)} removed"
    return f"{start}: {measured}"


def ratio_words(search: SearchConfig) -> str:
    """Return the ratio of a search, or its range."""
    if search.max_ratio is None:
        return given_percent(search.compression_ratio)
    return f"{given_percent(search.compression_ratio)} to {given_percent(search.max_ratio)}"


def unit_label(name: str) -> str:
    """Return a short unit name: ``3 · q+k`` for the stack of q and k in block 3, ``3 · up e5`` for a matrix of expert 5."""
    parts = [_block_and_kind(member) for member in name.split("+")]
    blocks = list(dict.fromkeys(block for block, _ in parts))
    kinds = "+".join(dict.fromkeys(kind for _, kind in parts))
    return f"{'+'.join(blocks)} · {kinds}" if all(blocks) else kinds


def _block_and_kind(name: str) -> tuple[str, str]:
    result, expert = re.search(r"\.(\d+)\.", name), _EXPERT.search(name)
    kind = kind_label(name.rsplit(".", 1)[-1])
    return (result[1] if result else ""), f"{kind} e{expert[1]}" if expert else kind
