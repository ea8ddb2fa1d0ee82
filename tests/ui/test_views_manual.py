"""What the page Manual allocation shows, as numbers: rows, bill, sliders' groups, predictions and their record, measurements."""

from __future__ import annotations

import shlex
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from synthetic import RATIO, make_run, model_json, priced_units, write_front, write_rich_study

from lowrank_core.allocation import Draft, allocate
from lowrank_core.allocation.curves import CurveRecord
from lowrank_core.cli import parser
from lowrank_core.cli.options import config_of
from lowrank_core.config import CompressionConfig, RunConfig, SearchConfig
from lowrank_core.errors import BudgetError, ConfigError, RankError, RunError
from lowrank_core.parameters import HeadUnit, Unit, budget_for_ratio, dense_parameters
from lowrank_core.presets.recipes import PRESETS, search_by
from lowrank_core.runs import write_json
from lowrank_core.studies.records import TrialRecord, read_trials
from lowrank_core.studio.manual.expected_kl import Trust, estimate_words, measured_as, predicted_kl, trial_predictions, trust
from lowrank_core.studio.manual.expected_kl_chart import prediction_figure
from lowrank_core.studio.manual.outcome import alongside, picked
from lowrank_core.studio.manual.rank_table import RowEdit, bill, dense_words, draft_rows, edited_draft, groupings, row_groups
from lowrank_core.studio.manual.starting_points import Recipe, first_draft, missing_rules, rules, starts
from lowrank_core.studio.shared.allocation_map import loss_map
from lowrank_core.studio.shared.model_facts import ModelFacts, model_facts
from lowrank_core.studio.shared.reproduce import compress_command, enqueue_command

SEARCH = SearchConfig(RATIO, trials=12, compression=CompressionConfig(value_dense=False))


def record_of(units: list[Unit] | tuple[Unit, ...], estimate: str = "kl") -> CurveRecord:
    curves = {unit.name: 0.1 * np.geomspace(1.0, 1e-3, unit.max_rank + 1) for unit in units}
    return CurveRecord("two_sided", estimate, curves, (0.9, 0.2, 0.4))


def trial(number: int, label: str, ranks: dict[str, int | None], kl: float | None = None, **changes: object) -> TrialRecord:
    result = TrialRecord(number, "complete" if kl is not None else "waiting", label, kl, {}, ranks, 0.3, kl, 20.0, 128, 1.0)
    return replace(result, **changes)


@pytest.fixture
def units() -> list[Unit]:
    return priced_units()


@pytest.fixture
def draft(units) -> Draft:
    return Draft.of(units, {units[0].name: 4, units[1].name: None, units[2].name: 3}, locked=[units[2].name])


@pytest.fixture
def facts() -> ModelFacts:
    result = model_facts(make_run())
    assert result is not None
    return result


# rows


def test_a_row_says_what_a_rank_is_worth(draft, units):
    record = record_of(units)
    frame = draft_rows(draft, record)
    assert list(frame.index) == list(draft.ranks)
    first = frame.iloc[0]
    assert (first["module"], first["kind"], first["block"], first["shape"], first["rank"]) == ("0 · q", "q", 0, "24 × 24", 4)
    assert first["kept"] == round(100 * units[0].parameters(4) / units[0].dense_parameters, 1)
    assert first["energy"] == pytest.approx(1 - record.curves[units[0].name][4] / 0.1)
    assert first["kl"] == pytest.approx(record.curves[units[0].name][4])
    assert first["most"] == units[0].break_even_rank
    dense = frame.iloc[1]
    assert pd.isna(dense["rank"])
    assert (dense["kept"], dense["energy"], dense["kl"], dense["locked"]) == (100.0, 1.0, 0.0, False)
    assert frame.iloc[2]["locked"]
    assert frame["kl"].sum() == pytest.approx(predicted_kl(record, draft.ranks))


def test_what_is_not_known_is_missing(draft, units):
    unknown = draft_rows(draft, None)
    assert unknown["energy"].isna().all()
    assert unknown["kl"].isna().all()
    own = draft_rows(draft, record_of(units, "own"))
    assert own["energy"].notna().all()
    assert own["kl"].isna().all()


def test_what_was_entered_in_the_table_becomes_a_draft(draft, units):
    first, second, third = (unit.name for unit in units[:3])
    result = edited_draft(
        draft, [RowEdit(first, {"kept": 50}), RowEdit(second, {"rank": 2, "locked": True}), RowEdit(third, {"locked": False, "rank": 5})]
    )
    assert result == draft.with_locks([third], locked=False).with_kept(first, 0.5).with_rank(second, 2).with_locks(
        [second], locked=True
    ).with_rank(third, 5)
    again = edited_draft(result, [RowEdit(second, {"rank": 2, "locked": True})])
    assert again == result
    assert edited_draft(draft, [RowEdit(first, {"rank": None})]).ranks[first] is None
    with pytest.raises(RankError, match="locked"):
        edited_draft(draft, [RowEdit(third, {"rank": 5})])


def test_a_rank_beyond_break_even_is_told_to_be_dense(units):
    maximum = units[0].break_even_rank
    words = dense_words(units, RowEdit(units[0].name, {"rank": maximum + 1}))
    assert f"rank {maximum + 1} would cost {units[0].parameters(maximum + 1):,} parameters" in words
    assert words.endswith(f"up to rank {maximum}.")
    assert dense_words(units, RowEdit(units[0].name, {"rank": maximum})) == ""
    assert dense_words(units, RowEdit(units[0].name, {"rank": 999})) == ""  # no rank at all: an error says so
    assert dense_words(units, RowEdit(units[0].name, {"rank": None})) == ""


def test_sliders_stand_where_their_unlocked_rows_are(draft, units):
    by_type, by_depth = row_groups(draft)
    assert [group.label for group in by_type] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert [group.label for group in by_depth] == ["Block 0", "Block 1", "Block 2"]
    queries = by_type[0]
    assert queries.kept == round(100 * draft.kept([unit.name for unit in units if unit.kind == "q_proj"]))
    values = by_type[2]
    assert values.locked == 1
    assert units[2].name not in values.names
    assert sum(len(group.names) for group in by_depth) == len(units) - 1


def test_a_stack_and_heads_are_told_in_words(facts):
    heads = [
        {"value": "model.layers.0.self_attn.v_proj", "output": "model.layers.0.self_attn.o_proj", "heads": 2, "groups": 1, "head_dim": 12}
    ]
    run = make_run()
    write_json(run.path / "model.json", {**model_json(), "heads": heads})
    result = model_facts(run)
    assert result is not None
    config = CompressionConfig(basis="two_sided", storage="pivoted", value_dense=False, stacks=True, heads=True)
    units = result.units(config)
    stack = next(unit.name for unit in units if len(unit.members) == 3)
    draft = Draft.of(units, {stack: 5})
    assert draft_rows(draft, None).iloc[0]["kind"] == "q+k+v"
    words = groupings(draft, "model.layers.0.self_attn.v_proj")
    assert next(iter(words)) == stack
    assert sorted(words.values()) == ["0 · q+k+v, as one stack", "0 · v+o, by heads", "alone"]
    by_heads = draft.regrouped(next(unit.name for unit in units if isinstance(unit, HeadUnit)))
    assert "12 per head" in set(draft_rows(by_heads, None)["shape"])
    record = record_of(units)
    shares = loss_map(by_heads.allocation("draft"), units, record).frame.set_index("module")["value"]
    assert shares["model.layers.0.self_attn.v_proj"] == shares["model.layers.0.self_attn.o_proj"] > 0
    assert shares["model.layers.2.mlp.up_proj"] == 0


# the bill


def test_the_bill_is_the_cores_accounting(draft, units, facts):
    result = bill(draft, facts, RATIO, run_ratio=RATIO)
    allocation = draft.allocation("manual")
    assert (result.kept, result.dense) == (allocation.parameters, allocation.dense_parameters)
    assert result.removed == allocation.compression_ratio
    assert result.allowed == result.run_allowed == budget_for_ratio(units, RATIO)
    assert result.left == result.allowed - result.kept
    assert result.dense_model - result.model == allocation.dense_parameters - allocation.parameters
    assert result.model_removed == pytest.approx((result.dense - result.kept) / facts.parameters)
    assert result.dense_bytes - result.bytes == 4 * (result.dense - result.kept)  # plain factors, no indices
    head = 2 * facts.vocabulary * facts.hidden  # of a record that does not tell
    assert result.dense_flops == 2 * dense_parameters(units) + head
    assert result.flops == sum(unit.flops_per_token(draft.ranks[unit.name]) for unit in units) + head
    assert bill(draft, replace(facts, head_flops=0), RATIO, run_ratio=RATIO).dense_flops == result.dense_flops - head


def test_a_fit_spends_the_budget_and_the_bill_says_so(draft, facts):
    assert not bill(draft, facts, RATIO, run_ratio=RATIO).spent
    fitted = bill(draft.fitted(RATIO), facts, RATIO, run_ratio=RATIO)
    assert fitted.spent
    assert 0 <= fitted.left < fitted.step
    assert fitted.counts


def test_what_is_over_the_runs_budget_never_counts(draft, facts):
    assert not bill(draft, facts, 0.01, run_ratio=RATIO).counts
    assert bill(draft, facts, RATIO, run_ratio=None).counts
    assert bill(draft, facts, RATIO, run_ratio=None).share == 1.0
    with pytest.raises(BudgetError, match=r"must be in \[0, 1\)"):
        bill(draft, facts, 1.0, run_ratio=None)
    with pytest.raises(RunError, match="int3"):
        bill(draft, replace(facts, stored_dtype="int3"), RATIO, run_ratio=None)


# predictions


def test_a_prediction_adds_the_errors_up(units):
    record = record_of(units)
    ranks = {units[0].name: 4, units[1].name: None}
    assert predicted_kl(record, ranks) == record.curves[units[0].name][4]
    assert predicted_kl(record, {"unknown": 4}) is None
    assert predicted_kl(record_of(units, "own"), ranks) is None
    assert predicted_kl(None, ranks) is None
    assert predicted_kl(record_of(units, "error_weights"), ranks) is not None


@pytest.mark.parametrize(
    ("estimate", "said"), [("kl", "second-order"), ("error_weights", "measured on validation text"), ("own", "can't be added up")]
)
def test_what_a_prediction_is_made_of_is_told(units, estimate, said):
    assert said in estimate_words(record_of(units, estimate))


def test_predictions_stand_beside_the_measured_trials(units):
    run = make_run(config=SEARCH, study=write_rich_study)
    trials = read_trials(run)
    frame = trial_predictions(trials, record_of(units))
    finished = [trial.number for trial in trials if trial.finished]
    assert list(frame["trial"]) == finished
    assert list(frame["measured"]) == [trials[number].kl for number in finished]
    assert trial_predictions(trials, None).empty


def test_how_far_predictions_go():
    frame = pd.DataFrame({"predicted": [1.0, 2.0, 3.0, 4.0], "measured": [2.0, 4.0, 6.0, 8.0]})
    result = trust(frame)
    assert result == Trust(4, 2.0, 2.0, 2.0, pytest.approx(1.0))
    assert "2.00 to 2.00 times the predicted" in result.sentence()
    assert trust(frame.iloc[:2]) is None
    level = trust(pd.DataFrame({"predicted": [1.0, 1.0, 1.0], "measured": [1.0, 2.0, 3.0]}))
    assert level.order is None
    assert "rank correlation" not in level.sentence()


def test_the_figure_holds_the_trials_and_the_diagonal():
    frame = pd.DataFrame(
        {
            "trial": [0, 1],
            "name": ["Uniform (trial 0)", "a <b>"],
            "kind": ["baseline", "sampled"],
            "predicted": [0.1, 0.01],
            "measured": [0.2, 0.02],
        }
    )
    figure = prediction_figure(frame, now=0.05)
    line, *points = figure.data
    assert list(line.x) == list(line.y)
    assert line.x[0] < 0.01 < 0.2 < line.x[1]
    assert {trace.name: (trace.x[0], trace.y[0]) for trace in points} == {"baseline": (0.1, 0.2), "sampled": (0.01, 0.02)}
    assert "&lt;b&gt;" in next(trace for trace in points if trace.name == "sampled").customdata[0][1]
    assert any("this draft" in note.text for note in figure.layout.annotations)
    assert len(prediction_figure(frame.iloc[:0]).data) == 1


# beginnings


def test_a_draft_begins_from_the_chosen_trial_else_the_best_else_uniform(units):
    trials = read_trials(make_run(config=SEARCH, study=write_rich_study))
    recipe = Recipe(tuple(units), SEARCH, None)
    draft, name = first_draft(recipe, trials, 1)
    assert (name, draft.parameters) == ("LoRD, fixed ratios (trial 1)", recipe.draft(trials[1]).parameters)
    assert first_draft(recipe, trials, None)[1] == "Trial 3"
    draft, name = first_draft(recipe, [], None)
    assert name == "Uniform"
    assert draft.ranks == allocate("uniform", units, RATIO).ranks


def test_beginnings_are_listed_best_first_and_rules_where_they_can_be_asked(units):
    trials = read_trials(make_run(config=SEARCH, study=write_rich_study))
    bare = Recipe(tuple(units), SEARCH, None)
    assert list(rules(bare)) == ["uniform", "lord_manual"]
    assert "Lagrangian (equal slopes)" in missing_rules(bare)
    whole = Recipe(tuple(units), SEARCH, record_of(units))
    assert missing_rules(whole) == []
    assert missing_rules(Recipe(tuple(units), SEARCH, replace(record_of(units), influence=()))) == ["Block influence (MoDeGPT)"]
    result = starts(whole, trials, 1)
    keys = list(result)
    assert keys[:3] == [3, 1, "uniform"]
    assert result[3].startswith("Best: Trial 3")
    assert len(set(keys)) == len(keys)
    many = read_trials(make_run(config=SearchConfig(0.2, max_ratio=0.6), study=write_front))
    assert not any(
        words.startswith("Best") for words in starts(replace(bare, search=SearchConfig(0.2, max_ratio=0.6)), many, None).values()
    )


@pytest.mark.parametrize("name", ["uniform", "energy", "lagrangian", "threshold", "svd_llm_v2", "block_influence"])
def test_a_rule_fits_the_rest_and_leaves_locks(units, name):
    recipe = Recipe(tuple(units), SEARCH, record_of(units))
    draft = Draft.of(units, {units[0].name: 2}, locked=[units[0].name])
    result = recipe.refitted(draft, name, RATIO)
    assert result.ranks[units[0].name] == 2
    assert result.parameters <= budget_for_ratio(units, RATIO)
    assert (
        recipe.ruled(name, RATIO).ranks
        == allocate(name, units, RATIO, curves=recipe.record.curves, influence=recipe.record.influence).ranks
    )


def test_a_recipe_that_keeps_values_dense_locks_them(units):
    recipe = Recipe(tuple(units), SearchConfig(RATIO), None)
    draft = recipe.ruled("uniform", RATIO)
    assert draft.locked == {unit.name for unit in units if unit.kind == "v_proj"}
    assert all(draft.ranks[name] is None for name in draft.locked)
    assert draft.fitted(RATIO).locked == draft.locked


def test_a_file_of_another_model_is_refused(units):
    recipe = Recipe(tuple(units), SEARCH, None)
    result = recipe.from_file(b'{"ranks": {"%s": 3}, "locked": []}' % units[0].name.encode(), "mine.json")
    assert (result.ranks[units[0].name], result.locked) == (3, frozenset())
    with pytest.raises(ConfigError, match="no compressible layer"):
        recipe.from_file(b'{"lm_head": 3}', "mine.json")
    with pytest.raises(ConfigError, match="not UTF-8"):
        recipe.from_file(b"\xff\xfe", "mine.json")


def test_the_command_that_makes_a_model_of_a_draft_is_one_the_command_line_takes():
    config = RunConfig(search=search_by(PRESETS["studio"], 0.4))
    line = compress_command(config, "mine file.json", "smaller")
    arguments = parser().parse_args(shlex.split(line)[1:])
    assert (arguments.command, arguments.ranks, arguments.preset, str(arguments.out)) == ("compress", "mine file.json", "studio", "smaller")
    assert config_of(arguments, CompressionConfig, usual=PRESETS["studio"].compression) == config.search.compression
    changed = replace(config.search.compression, fit_windows=3, heads=False, gradient_damping=0.5)
    line = compress_command(replace(config, search=replace(config.search, compression=changed)), "mine.json", "smaller")
    arguments = parser().parse_args(shlex.split(line)[1:])
    assert config_of(arguments, CompressionConfig, usual=PRESETS[arguments.preset].compression) == changed
    assert compress_command(RunConfig(), "mine.json", "smaller") == ""
    enqueued = parser().parse_args(shlex.split(enqueue_command("a run", "mine.json"))[1:])
    assert (enqueued.command, str(enqueued.folder), str(enqueued.ranks)) == ("enqueue", "a run", "mine.json")


# where a measurement stands


def test_a_measurement_is_followed_from_asking_to_its_result():
    ranks = {"a": 3, "b": None}
    asked = {"kind": "measure", "arguments": {"ranks": ranks}}
    other = {"kind": "measure", "arguments": {"ranks": {"a": 4}}}
    assert picked(ranks, [], [], []).stage == "new"
    result = picked(ranks, [], [other, asked], [])
    assert (result.stage, result.others, result.open) == ("asked", 1, True)
    waiting, running = trial(1, "manual", ranks), trial(1, "manual", ranks, state="running")
    assert picked(ranks, [waiting], [], [{**asked, "ok": True}]).stage == "waiting"
    assert picked(ranks, [running], [], []).stage == "running"
    assert picked(ranks, [trial(1, "manual", {"a": 3}, 0.1)], [], []).stage == "measured"  # b is dense in both
    failed = picked(ranks, [trial(1, "manual", ranks, state="failed", error="not finite")], [], [])
    assert (failed.stage, failed.error) == ("failed", "not finite")
    refused = picked(ranks, [], [], [{**asked, "ok": False, "error": "no"}, {**other, "ok": True}])
    assert (refused.stage, refused.error, refused.open) == ("refused", "no", False)
    assert picked({"b": None}, [trial(0, "uniform", ranks, 0.2)], [], []).stage == "new"


def test_ranks_are_found_among_the_trials_measured_ones_first():
    ranks = {"a": 3}
    trials = [trial(0, "uniform", ranks, 0.2), trial(1, "sampled", {"a": 4}, 0.1), trial(2, "manual", ranks)]
    assert measured_as(trials, {"a": 3, "b": None}).number == 0
    assert measured_as(trials[2:], ranks).number == 2
    assert measured_as(trials, {"a": 9}) is None


def test_a_draft_stands_beside_the_best_and_the_baseline(units):
    trials = [
        trial(0, "uniform", {units[0].name: 5}, 0.3),
        trial(1, "sampled", {units[0].name: 6}, 0.1),
        trial(2, "manual", {units[0].name: 7}, 0.2),
    ]
    frame = alongside(trials[2], trials, SEARCH, record_of(units))
    assert list(frame["name"]) == ["This draft: Manual (trial 2)", "Uniform: trial 0", "Best: Trial 1"]
    assert list(frame["kl"]) == [0.2, 0.3, 0.1]
    assert frame["predicted"].notna().all()
    same = alongside(trials[1], trials, SEARCH, None)
    assert list(same["name"]) == ["This draft, best: Trial 1", "Uniform: trial 0"]
    assert same["predicted"].isna().all()
    ranged = alongside(trials[1], trials, SearchConfig(0.2, max_ratio=0.6), None)
    assert list(ranged["name"]) == ["This draft: Trial 1", "Uniform: trial 0"]
