"""What a search added over its best rule: known losses give known numbers, and it may stop where that is nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lowrank_core.commands.search import work
from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource, RunConfig, SearchConfig, TextConfig
from lowrank_core.errors import ConfigError
from lowrank_core.runs import create_run
from lowrank_core.studies import gain
from lowrank_core.studies.gain import extension, flat_after, flat_words, gain_of, search_gain
from lowrank_core.studies.records import TrialRecord, read_trials
from lowrank_core.studies.requests import CompareAnswer, answers_of
from lowrank_core.worker.main import run_worker

KL = SearchConfig(0.3)
PERPLEXITY = SearchConfig(0.3, objective="perplexity")
RULE = (0.10, 0.20, 0.30, 0.40, 0.15, 0.25, 0.35, 0.25)
BETTER = (0.08, 0.17, 0.28, 0.36, 0.11, 0.23, 0.33, 0.20)
"""KL of eight windows: the sum falls from 2.00 to 1.76, and each window's falls."""
NOISE = (0.05, 0.25, 0.20, 0.50, 0.10, 0.30, 0.34, 0.25)
"""The sum falls to 1.99: up in some windows, down in others."""


def _trial(number: int, label: str, losses: Sequence[float], state: str = "complete") -> TrialRecord:
    mean = float(np.mean(losses))
    value = mean if state == "complete" else None
    return TrialRecord(number, state, label, value, {}, {}, 0.3, mean, float(np.exp(mean)), 8, 1.0, dict(enumerate(losses)))


def _answer(trial: int | str, kl: Sequence[float], nll: Sequence[float], **changes: object) -> CompareAnswer:
    report = {"protocol": "eight windows", "kl": float(np.mean(kl)), "perplexity": float(np.exp(np.mean(nll))), "window_nll": list(nll)}
    return CompareAnswer(trial=trial, report={**report, "window_kl": list(kl), **changes})


TRIALS = [_trial(0, "uniform", [2 * x for x in RULE]), _trial(1, "lagrangian", RULE), _trial(2, "sampled", BETTER)]


# the numbers


def test_known_losses_have_known_gains():
    added = gain_of(TRIALS, KL, [_answer(1, RULE, RULE), _answer(2, BETTER, BETTER)])
    assert (added.rule, added.best) == (TRIALS[1], TRIALS[2])
    for part in (added.validation, added.test):
        assert part.metric == "KL"
        assert (part.rule, part.best) == pytest.approx((0.25, 0.22))
        assert part.gain == pytest.approx(1 - 1.76 / 2.00)
        assert part.interval == pytest.approx(_drawn_again(RULE, BETTER, lambda rule, best: 1 - best / rule), abs=0.004)
    assert added.words.startswith(
        "Over the best rule, Lagrangian (equal slopes) (trial 1), the search added (Trial 2): on validation text, KL 12.00% lower (95% int"
    )


def test_a_gain_in_perplexity_is_that_of_the_exponentials():
    part = gain_of(TRIALS, PERPLEXITY).validation
    assert part.metric == "perplexity"
    assert part.gain == pytest.approx(1 - np.exp(0.22 - 0.25))
    assert part.interval == pytest.approx(_drawn_again(RULE, BETTER, lambda rule, best: 1 - np.exp(best - rule)), abs=0.002)


def _drawn_again(rule: Sequence[float], best: Sequence[float], statistic) -> tuple[float, float]:
    """The paired bootstrap, in a loop, with draws of its own."""
    generator = np.random.default_rng(5)
    results = []
    for _ in range(4000):
        rows = generator.integers(0, len(rule), len(rule))
        results.append(statistic(np.mean([rule[row] for row in rows]), np.mean([best[row] for row in rows])))
    low, high = np.percentile(results, [2.5, 97.5])
    return float(low), float(high)


def test_pairing_is_what_shows_a_small_gain():
    noise = np.linspace(0, 3, 40)
    trials = [_trial(0, "uniform", [1 + x for x in noise]), _trial(1, "sampled", [0.97 + x for x in 1.001 * noise])]
    assert gain_of(trials, KL).validation.shown


def test_a_gain_that_can_not_be_told_from_none_is_called_nothing():
    trials = [TRIALS[1], _trial(2, "sampled", NOISE)]
    part = gain_of(trials, KL).validation
    assert part.interval[0] < 0 < part.interval[1]
    assert part.words.startswith("nothing: the interval covers zero (KL 0.50% lower, 95% interval -")
    worse = gain.Gain("KL", 1.0, 1.1, (-0.2, -0.05)).words
    assert worse == "nothing: it loses more (KL 10.00% higher, 95% interval 5.00 to 20.00%)"
    one = gain_of([_trial(0, "uniform", [0.2]), _trial(1, "sampled", [0.1])], KL).validation.words
    assert one == "KL 50.00% lower, without an interval that would distinguish it from nothing"
    alike = gain_of([TRIALS[1], _trial(2, "sampled", [0.9 * x for x in RULE])], KL).validation
    assert alike.interval is None  # the windows do not differ in the ratio but by rounding: nothing is known of its spread


def test_where_nothing_can_be_compared_the_line_says_why():
    assert "there is no rule among its complete trials" in gain_of([TRIALS[2]], KL).words
    assert "no sampled trial is complete" in gain_of(TRIALS[:2], KL).words
    beaten = gain_of([*TRIALS[:2], _trial(2, "sampled", [2 * x for x in RULE])], KL)
    assert beaten.words.endswith("none of its 1 sampled trials has a lower value.")
    assert beaten.validation is None
    manual = gain_of([*TRIALS[:2], replace(TRIALS[2], label="manual")], KL)
    assert "no sampled trial is complete" in manual.words  # what a person chose is not the search's merit
    assert gain_of(TRIALS, KL).words.endswith("on test text, not measured.")


def test_the_test_part_is_of_the_same_windows_in_the_newest_measurements():
    old = {"window_kl": None}
    answers = [_answer(1, RULE, RULE), _answer(2, RULE, RULE), _answer("lagrangian", BETTER, BETTER), _answer(2, RULE, RULE)]
    assert gain_of(TRIALS, KL, answers).test.best == pytest.approx(0.25)
    assert gain_of(TRIALS, KL, answers).test.rule == pytest.approx(0.22)  # a rule may be asked for by its name, too
    assert gain_of(TRIALS, KL, [answers[0], _answer(2, RULE, RULE, protocol="other windows")]).test is None
    before = [CompareAnswer(trial=a.trial, report={k: v for k, v in a.report.items() if k not in old}) for a in answers[:2]]
    assert gain_of(TRIALS, KL, before).test.metric == "perplexity"  # earlier versions kept no KL of windows


def test_over_a_range_of_ratios_points_of_the_front_are_counted():
    ranged = replace(KL, max_ratio=0.6)
    trials = [
        replace(_trial(n, label, [loss]), compression_ratio=r)
        for n, (label, loss, r) in enumerate([("uniform", 0.1, 0.3), ("sampled", 0.2, 0.4), ("sampled", 0.3, 0.5), ("uniform", 0.9, 0.4)])
    ]
    assert gain_of(trials, ranged).front == (2, 1)
    assert gain_of(trials, ranged).words.startswith("Of 3 points of the Pareto front the search added 2, and 1 are rules")


# stopping

FLAT = SearchConfig(0.3, trials=40, startup_trials=3, stop_when_flat=True)


def _history(*losses: Sequence[float]) -> list[TrialRecord]:
    return [TRIALS[0], TRIALS[1], *(_trial(2 + n, "sampled", each) for n, each in enumerate(losses))]


def test_a_search_is_flat_after_ten_trials_in_a_row_without_a_gain():
    trials = _history(*[NOISE] * 30)
    assert flat_after(trials[:12], FLAT) is None
    assert flat_after(trials[:13], FLAT) == 13  # three to start with, then ten
    assert flat_after(trials, replace(FLAT, startup_trials=8)) == 18
    assert flat_after([*trials[:13], _trial(13, "sampled", BETTER)], FLAT) == 13  # what was in flight does not change it
    assert flat_words(trials[:13], FLAT).startswith("Stopped by itself after 13 of 40 trials: for 10 in a row, ")
    assert flat_words(trials, replace(FLAT, stop_when_flat=False)) == ""


def test_a_gain_begins_the_count_again_and_some_trials_do_not_count():
    assert flat_after(_history(*[NOISE] * 8, BETTER, *[NOISE] * 40), FLAT) is None  # the gain stays: the best trial is the best so far
    trials = _history(*[NOISE] * 11)
    extra = [replace(trials[5], number=20 + n, label="manual") for n in range(5)] + [_trial(30, "sampled", NOISE, "failed")]
    assert flat_after([*trials[:12], *extra], FLAT) is None
    stopped = [_trial(20, "sampled", NOISE[:6], "pruned")]
    assert flat_after([*trials[:12], *stopped], FLAT) == 13
    assert flat_after(trials[2:], FLAT) is None  # without a rule there is nothing to compare with


def test_what_is_extended_goes_on_from_where_it_stopped():
    trials = _history(*[NOISE] * 11)
    assert extension(trials, FLAT, 5) == {"trials": 18, "stop_when_flat": False}
    assert extension(trials[:8], FLAT, 5) == {"trials": 45}


@pytest.mark.parametrize("changes", [{"max_ratio": 0.5}, {"projected": False}])
def test_a_search_without_such_a_comparison_can_not_stop_by_it(changes: dict[str, object]):
    with pytest.raises(ConfigError, match="stop when flat compares trials at one ratio"):
        replace(FLAT, **changes)


def test_a_worker_stops_once_it_is_flat_measures_both_and_stays_stopped(
    llama_checkpoint: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gain, "FLAT_TRIALS", 3)
    text = TextConfig(f"file:{text_file}", context=32, calibration_windows=40, validation_windows=4, test_windows=6)
    search = replace(FLAT, sampler="random", compression=CompressionConfig(basis="weight_svd"), startup_trials=3, confirmed=1)
    run = create_run(RunConfig(ModelSource(str(llama_checkpoint)), text, CalibrationConfig(group_size=8), search))
    run_worker(run, verbose=False)
    trials, status = read_trials(run), run.status()
    assert len(trials) == flat_after(trials, search) == 6
    assert (status.state, status.message) == ("finished", flat_words(trials, search))
    measured = [answer.trial for answer in answers_of(run, CompareAnswer)]
    body = work(run.path, 0.0)  # resumed: it stays as it is
    assert (body["trials"], body["state"], body["stopped_when_flat"]) == (6, "finished", status.message)
    assert search_gain(run).words in str(body["text"])
    assert [answer.trial for answer in answers_of(run, CompareAnswer)] == measured
    assert set(measured) >= {trial.number for trial in search_gain(run).rivals}
    body = work(run.path, 0.0, changes={"more_trials": 2})
    assert (body["trials"], body["stopped_when_flat"]) == (8, "")
