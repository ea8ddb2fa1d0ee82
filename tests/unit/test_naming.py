"""One name and one count, whoever shows them."""

from __future__ import annotations

import pytest

from lowrank_core.studies.naming import model_name, trial_label
from lowrank_core.studies.records import MANUAL, TrialRecord, counts_of


def trial(number: int, label: str = "sampled", state: str = "complete") -> TrialRecord:
    measured = 0.1 if state in ("complete", "infeasible") else None
    return TrialRecord(number, state, label, measured, {}, {}, 0.3, measured, None, None, 1.0)


TRIALS = [
    *(trial(0, "uniform"), trial(1, "lagrangian"), trial(2), trial(3, state="pruned"), trial(4, state="infeasible")),
    *(trial(5, MANUAL), trial(6, MANUAL, "infeasible"), trial(7, state="failed"), trial(8, state="running"), trial(9, MANUAL, "waiting")),
]


@pytest.mark.parametrize("record", TRIALS)
def test_a_trial_has_the_name_of_its_measurement(record: TrialRecord):
    assert model_name(f"trial {record.number}", TRIALS) == trial_label(record)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("uniform", "Uniform (trial 0)"),
        ("trial 0", "Uniform (trial 0)"),
        ("trial 5", "Manual (trial 5)"),
        ("trial 2, healed by distill", "Trial 2, healed by distill"),
        ("uniform, healed by distill (ab12)", "Uniform (trial 0), healed by distill (ab12)"),
        ("trial 99", "Trial 99"),
        ("preset:svd", "Preset: Weight SVD"),
        ("preset:none", "preset:none"),
    ],
)
def test_names(label: str, name: str):
    assert model_name(label, TRIALS) == name


def test_a_rule_without_a_single_trial_goes_by_its_own_name():
    assert model_name("uniform") == "Uniform"
    assert model_name("uniform", [trial(0, "uniform"), trial(1, "uniform")]) == "Uniform"  # at both ends of a range of ratios
    assert model_name("trial 1", [trial(0, "uniform"), trial(1, "uniform")]) == "Uniform (trial 1)"


def test_one_count_says_what_is_counted():
    result = counts_of(TRIALS)
    assert (result.complete, result.pruned, result.outside, result.manual, result.failed) == (5, 1, 1, 2, 1)
    assert result.measured == sum(record.finished for record in TRIALS) == 6
    assert result.words == (
        "5 trials complete (1 stopped early; 1 outside the budget, measured and never the best; 2 manual, on top; 1 failed, not counted)"
    )
    assert counts_of(TRIALS[:1]).words == "1 trial complete"
    assert counts_of([]).words == "0 trials complete"
