"""Gain of a search over its best rule, and the end of a search without one. Torch-free.

The rule is the enqueued allocation of lowest value, the rival the sampled trial of lowest value; manual allocations are neither's merit.
Both are measured on the same windows, so the gain, the fraction by which the loss of the rival lies below the rule's, has a paired
bootstrap interval. The rival was chosen by the validation text, which makes its gain there optimistic; no trial saw the test text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from lowrank_core.allocation import ALLOCATORS
from lowrank_core.config import SearchConfig
from lowrank_core.runs import JsonMapping, Run
from lowrank_core.studies.bootstrap import bootstrap_interval
from lowrank_core.studies.naming import trial_label
from lowrank_core.studies.records import MANUAL, TrialRecord, counts_of, pareto_front, read_trials
from lowrank_core.studies.requests import CompareAnswer, answers_of
from lowrank_core.wording import fixed, fixed_interval

__all__ = ["FLAT_TRIALS", "Gain", "SearchGain", "extension", "flat_after", "flat_words", "gain_of", "search_gain"]

FLAT_TRIALS = 10
"""Trials in a row without a gain after which a search may stop."""

Losses = tuple[float, ...]


@dataclass(frozen=True)
class Gain:
    """Loss of a trial against that of a rule, on one text.

    Attributes:
        metric: ``KL`` or ``perplexity``.
        rule, best: of the rule, and of the trial.
        interval: 95 %, of ``gain``; None where there is none.
    """

    metric: str
    rule: float
    best: float
    interval: tuple[float, float] | None = None

    @property
    def gain(self) -> float:
        """Fraction of the rule's that the trial's lies below it; negative above it."""
        return 1 - self.best / self.rule if self.rule > 0 else 0.0

    @property
    def shown(self) -> bool:
        """Whether the interval lies above zero."""
        return self.interval is not None and self.interval[0] > 0

    @property
    def words(self) -> str:
        """The gain with its interval; that it is nothing where the interval covers zero."""
        sign = 1 if self.gain >= 0 else -1
        size = f"{self.metric} {fixed(100 * sign * self.gain, 2)}% {'lower' if sign > 0 else 'higher'}"
        if self.interval is None:
            return f"{size}, without an interval that would distinguish it from nothing"
        low, high = sorted(100 * sign * end for end in self.interval)
        interval = f"95% interval {fixed_interval((low, high), 2)}%"
        if self.shown:
            return f"{size} ({interval})"
        return f"nothing: {'the interval covers zero' if low <= 0 else 'it loses more'} ({size}, {interval})"


@dataclass(frozen=True)
class SearchGain:
    """Gain of a search over its best rule, on both texts.

    Attributes:
        rule, best: the trials that are compared; None without one.
        sampled: sampled trials that are complete.
        validation: None where there is no rule, no sampled trial, or none of a lower value.
        test: None where not both were measured on test text.
        front: over a range of ratios, points of the Pareto front that are sampled, and rules.
    """

    rule: TrialRecord | None = None
    best: TrialRecord | None = None
    sampled: int = 0
    validation: Gain | None = None
    test: Gain | None = None
    front: tuple[int, int] | None = None

    @property
    def rivals(self) -> tuple[TrialRecord, ...]:
        """The trials that are compared; none where nothing was added."""
        return () if self.validation is None else tuple(filter(None, (self.best, self.rule)))

    @property
    def words(self) -> str:
        """All of it in a line."""
        if self.front is not None:
            return (
                f"Of {sum(self.front)} points of the Pareto front the search added {self.front[0]}, and {self.front[1]} are rules; over a "
                "range of ratios that has no interval."
            )
        if self.rule is None:
            return "What the search added over a rule is unknown: there is no rule among its complete trials."
        name = trial_label(self.rule)
        if self.best is None:
            return f"The search added nothing over {name}: no sampled trial is complete."
        if self.validation is None:
            return f"The search added nothing over its best rule, {name}: none of its {self.sampled} sampled trials has a lower value."
        test = "not measured" if self.test is None else self.test.words
        added = f"Over the best rule, {name}, the search added ({trial_label(self.best)})"
        return f"{added}: on validation text, {self.validation.words}; on test text, {test}."

    def to_mapping(self) -> dict[str, object]:
        """Return it ready for JSON, with its line."""
        numbers = {"rule": None if self.rule is None else self.rule.number, "best": None if self.best is None else self.best.number}
        parts = {
            name: None if part is None else {**asdict(part), "gain": part.gain, "shown": part.shown}
            for name, part in (("validation", self.validation), ("test", self.test))
        }
        return {**numbers, **parts, "front": self.front, "words": self.words}


def search_gain(run: Run) -> SearchGain:
    """Return what the search of ``run`` added so far.

    Raises:
        RunError: an answer of the worker, or the study, is damaged.
    """
    search = run.config.search
    return SearchGain() if search is None else gain_of(read_trials(run), search, answers_of(run, CompareAnswer))


def gain_of(trials: Sequence[TrialRecord], search: SearchConfig, answers: Sequence[CompareAnswer] = ()) -> SearchGain:
    """Return what ``trials`` added; ``answers``: measurements on test text, the newest last."""
    if search.max_ratio is not None:
        front = pareto_front(trials)
        return SearchGain(front=(sum(t.label == "sampled" for t in front), sum(t.label in ALLOCATORS for t in front)))
    rule, best = _lowest(trials)
    sampled = sum(trial.label == "sampled" and trial.state == "complete" for trial in trials)
    if rule is None or best is None or not _value(best) < _value(rule):
        return SearchGain(rule, best, sampled)
    return SearchGain(rule, best, sampled, _on_validation(rule, best, search), _on_test(rule, best, search, answers))


def _lowest(trials: Sequence[TrialRecord]) -> tuple[TrialRecord | None, TrialRecord | None]:
    """Return the complete rule, and the complete sampled trial, of lowest value; None without one."""
    complete = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
    rules = [trial for trial in complete if trial.label in ALLOCATORS]
    sampled = [trial for trial in complete if trial.label == "sampled"]
    return min(rules, key=_order, default=None), min(sampled, key=_order, default=None)


def _value(trial: TrialRecord) -> float:
    assert trial.value is not None
    return trial.value


def _order(trial: TrialRecord) -> tuple[float, int]:
    return _value(trial), trial.number


def _on_validation(rule: TrialRecord, best: TrialRecord, search: SearchConfig) -> Gain:
    """Return the gain in the objective; of the paper's sum, whose windows are not kept, in the perplexity that is its larger part."""
    if search.objective == "kl":
        return Gain("KL", _value(rule), _value(best), _interval(_losses(rule), _losses(best), logarithms=False))
    values = [trial.perplexity or _value(trial) for trial in (rule, best)]
    return Gain("perplexity", values[0], values[1], _interval(_losses(rule), _losses(best), logarithms=True))


def _losses(trial: TrialRecord) -> Losses:
    return tuple(trial.windows[window] for window in sorted(trial.windows))


def _on_test(rule: TrialRecord, best: TrialRecord, search: SearchConfig, answers: Sequence[CompareAnswer]) -> Gain | None:
    """Return the gain on test text: in KL where trials are judged by it, and measurements of earlier versions have its windows."""
    ours, theirs = _report(best, answers), _report(rule, answers)
    if ours is None or theirs is None or ours.get("protocol") != theirs.get("protocol"):
        return None
    by_kl = search.objective == "kl" and "window_kl" in ours and "window_kl" in theirs
    metric, windows = ("kl", "window_kl") if by_kl else ("perplexity", "window_nll")
    interval = _interval(tuple(theirs.get(windows, ())), tuple(ours.get(windows, ())), logarithms=not by_kl)
    return Gain("KL" if by_kl else metric, float(theirs[metric]), float(ours[metric]), interval)


def _report(trial: TrialRecord, answers: Sequence[CompareAnswer]) -> JsonMapping | None:
    """Return the newest measurement of a trial, or of the rule that it is."""
    keys = {trial.number, *({trial.label} & set(ALLOCATORS))}
    return next((answer.report for answer in reversed(answers) if answer.trial in keys), None)


@lru_cache(maxsize=512)
def _interval(rule: Losses, best: Losses, *, logarithms: bool) -> tuple[float, float] | None:
    """Return the interval of the gain, drawing the same windows of both; None unless both have the same.

    Args:
        rule, best: mean loss of each window.
        logarithms: whether what is compared is the exponential of the mean loss.
    """
    if len(rule) != len(best):
        return None
    gain = _gain_of_logarithms if logarithms else _gain_of_means
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw of windows without any loss
        return bootstrap_interval(gain, np.stack([rule, best], axis=-1))


def _gain_of_means(pair: np.ndarray) -> np.ndarray:
    return np.asarray(np.where(pair[..., 0] > 0, 1 - pair[..., 1] / pair[..., 0], 0.0))


def _gain_of_logarithms(pair: np.ndarray) -> np.ndarray:
    return np.asarray(1 - np.exp(pair[..., 1] - pair[..., 0]))


def flat_after(trials: Sequence[TrialRecord], search: SearchConfig) -> int | None:
    """Return after how many trials the search could be called flat first; None as long as it can't.

    That is where, after the startup trials, no interval of the gain on validation text lay above zero after each of ten trials in a row.
    Trials count by number, whether sampled, a rule or stopped early, but manual ones and those that failed do not. It depends on the
    trials alone, and more of them don't change it: a search that was killed, or resumed, stops where it would have stopped anyway.
    """
    rule, best, in_a_row = None, None, 0
    ended = [trial for trial in trials if trial.label != MANUAL and (trial.finished or trial.state == "pruned")]
    for done, trial in enumerate(sorted(ended, key=lambda trial: trial.number), start=1):
        rule, best = _lowest([*filter(None, (rule, best)), trial])
        if rule is not None and done > search.startup_trials:
            in_a_row = 0 if _better(rule, best, search) else in_a_row + 1
        if in_a_row == FLAT_TRIALS:
            return done
    return None


def _better(rule: TrialRecord, best: TrialRecord | None, search: SearchConfig) -> bool:
    return best is not None and _value(best) < _value(rule) and _on_validation(rule, best, search).shown


def flat_words(trials: Sequence[TrialRecord], search: SearchConfig) -> str:
    """Return why the search stopped by itself; empty where it did not."""
    count = flat_after(trials, search) if search.stop_when_flat else None
    if count is None or count >= search.trials:
        return ""
    return (
        f"Stopped by itself after {count} of {search.trials} trials: for {FLAT_TRIALS} in a row, the interval of what it added over the "
        "best rule on validation text covered zero."
    )


def extension(trials: Sequence[TrialRecord], search: SearchConfig, more: int) -> Mapping[str, object]:
    """Return what changes for ``more`` trials: a search that stopped by itself goes on from there, and does not stop so again."""
    if search.stop_when_flat and flat_after(trials, search) is not None:
        return {"trials": counts_of(trials).complete + more, "stop_when_flat": False}
    return {"trials": search.trials + more}
