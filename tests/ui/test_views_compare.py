"""What the Compare page shows, as numbers: models, differences, windows, positions, a second text, tokens, speed."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest
from synthetic import DENSE_NLL, comparison, make_run, write_healing
from synthetic_answers import PIECES, detailed, on_other_text, speed_answer, tokens_answer

from lowrank_core.errors import RunError
from lowrank_core.presets.dense import DENSE
from lowrank_core.presets.differences import COMMON
from lowrank_core.presets.recipes import PRESETS
from lowrank_core.runs.client import results
from lowrank_core.studies.records import read_trials
from lowrank_core.studio.compare import comparison as compare
from lowrank_core.studio.compare import continuations, healing_runs, loss_details, measured_speed, second_text, token_losses
from lowrank_core.studio.shared import model_refs
from lowrank_core.studio.shared.table import Column, Table
from pages.components.tables import in_one_unit


def test_the_sizes_of_a_table_are_in_one_unit_in_a_report_and_on_a_page():
    frame = pd.DataFrame({"name": ["Dense", "a", "b"], "bytes": pd.Series([3 * 2**30, 2**29, None], dtype="Int64")})
    table = Table(frame, (Column.text("name", "Model"), Column("bytes", "Size", "bytes")), "Sizes")
    assert [row[1] for row in table.rows] == ["3.00 GiB", "0.500 GiB", "–"]
    shown = in_one_unit(table)
    assert [column.label for column in shown.shown] == ["Model", "Size (GiB)"]
    assert list(shown.frame["bytes"][:2]) == [3.0, 0.5]
    assert shown.frame["bytes"].isna().sum() == 1


# which models


def test_everything_that_can_be_measured_has_a_name_of_its_own():
    run = make_run()
    write_healing(run)
    search, trials = run.config.search, read_trials(run)
    result = model_refs.candidates(trials, search, healing_runs.healings(run), picked=0)
    assert next(iter(result)) == 3
    assert result[0] == "Uniform (trial 0), value 0.4100"
    assert list(result)[:4] == [3, 5, 0, 2]  # by value; trial 1 goes by its rule's name, trial 4 failed
    assert result["healed:trial-3-distill-12345678"] == "Healed: Trial 3, healed by distill (5678)"
    assert result["uniform"] == "Baseline: Uniform"
    assert (
        [key for key in result if str(key).startswith("preset:")] == [f"preset:{name}" for name in PRESETS] == list(model_refs.PRESET_KEYS)
    )
    assert [key for key in result if str(key).startswith("dense:")] == [f"dense:{name}" for name in DENSE]
    assert len(set(result.values())) == len(result)
    assert model_refs.candidates([], search) == {}
    assert set(model_refs.healable(result)).isdisjoint({*model_refs.PRESET_KEYS, "healed:trial-3-distill-12345678"})


def test_chosen_presets_say_where_they_depart_from_their_papers():
    notes = model_refs.preset_notes(["preset:svd_llm", 3, "uniform", "preset:studio"])
    assert notes == [f"**SVD-LLM** (arXiv 2403.07378): {PRESETS['svd_llm'].differs}", COMMON]
    assert model_refs.preset_notes([3, "uniform", "preset:studio"]) == []


def test_the_usual_choice_is_the_best_trial_and_the_baselines():
    run = make_run()
    trials = read_trials(run)
    result = model_refs.candidates(trials, run.config.search, picked=2)
    assert model_refs.usual_choice(result, trials, None) == [3, "uniform", "lord_manual", "lagrangian"]
    assert model_refs.usual_choice(result, trials, 2)[0] == 2
    assert model_refs.usual_choice(result, trials, 99)[0] == 3
    uniform = model_refs.candidates(trials, run.config.search, picked=0)
    assert model_refs.usual_choice(uniform, trials, 0) == [0, "lord_manual", "lagrangian"]  # trial 0 is the uniform baseline


def test_presets_whose_rounded_ranks_leave_a_part_of_the_budget_are_named():
    run = make_run()
    search = replace(run.config.search, compression_ratio=0.3)
    result = compare.comparisons([comparison("preset:bolaco", "preset:bolaco", 3.4), comparison("preset:svd", "preset:svd", 4.0)])
    dense = 1_000_000
    short = [replace(each, dense_compressible_parameters=dense, compressible_parameters=600_000) for each in result]
    (note,) = compare.unspent_notes(short, search)
    assert note.startswith(f"Preset: {PRESETS['bolaco'].label}: 100,000 of the budget's 700,000 parameters (14.3%) are not spent")
    assert "40.0% is removed where 30.0% was asked for" in note
    exact = [replace(each, dense_compressible_parameters=dense, compressible_parameters=695_000) for each in result]
    assert compare.unspent_notes(exact, search) == []


def test_what_is_measured_or_asked_for_is_not_missing():
    run = make_run()
    trials = read_trials(run)
    bodies = [comparison("uniform", "uniform", 3.4), comparison("preset:svd", "preset:svd", 4.0)]
    result = compare.comparisons(bodies)
    waiting = [{"kind": "compare", "arguments": {"trial": 3}}]
    wanted = [3, 0, "uniform", "preset:svd", "preset:asvd"]  # trial 0 is the uniform baseline
    assert model_refs.unmeasured(wanted, trials, result, waiting) == ["preset:asvd"]
    assert model_refs.unmeasured(wanted, trials, []) == wanted


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("compare", {"trial": 3}, "Trial 3: measuring on test text"),
        ("compare", {"trial": "preset:svd_llm"}, "Preset: SVD-LLM: measuring on test text"),
        ("compare", {"trial": "dense:int4_gptq"}, "Dense in int4 by GPTQ: measuring on test text"),
        ("other_text", {"trial": "uniform", "text": "file:a.txt"}, "Uniform: measuring on a second text (file:a.txt)"),
        ("verify", {"path": "trial-3"}, "measuring an exported folder again"),
        ("shrink", {}, "shrink"),
    ],
)
def test_requests_are_told_in_words(kind, arguments, words):
    assert model_refs.request_words({"kind": kind, "arguments": arguments}) == words


def test_a_preset_that_was_refused_is_no_failure_of_the_page():
    refused = {"ok": False, "kind": "compare", "error": "0.91 can't be met", "arguments": {"trial": "preset:bolaco"}, "time": 1.0}
    assert compare.last_failure([refused]) is None
    assert compare.refusals([refused]) == {"Preset: Bolaco, as published, fixed ratios": "0.91 can't be met"}
    again = {**comparison("preset:bolaco", "preset:bolaco", 3.5)}
    assert compare.refusals([refused, again]) == {}
    assert compare.comparisons([refused, again])[0].name == "Preset: Bolaco, as published, fixed ratios"
    assert compare.comparisons([again])[0].given


def test_two_healings_of_one_model_are_told_apart():
    run = make_run()
    write_healing(run)
    (body,) = results(run)
    second = {**body, "folder": "trial-3-distill-87654321"}
    names = [result.name for result in compare.comparisons([body, second]) if result.form == "healed"]
    assert sorted(names) == ["Trial 3, healed by distill (4321)", "Trial 3, healed by distill (5678)"]
    counted = detailed(comparison("trial 3", 3, 3.2))
    assert {result.flops for result in compare.comparisons([counted, body])} == {900}  # the same ranks


# tables of all


def test_differences_are_from_the_dense_model_with_paired_intervals_the_smallest_first():
    bodies = [comparison("uniform", "uniform", 3.4), comparison("trial 3", 3, 3.2), comparison("preset:svd", "preset:svd", 3.3)]
    table = loss_details.difference_table(compare.comparisons(bodies))
    assert list(table["name"]) == ["Trial 3", "Preset: Weight SVD", "Uniform"]
    assert list(table["kind"]) == ["searched", "rule", "rule"]
    assert table["difference"][0] == pytest.approx(math.exp(3.2) - math.exp(DENSE_NLL))
    assert (table["low"][0], table["high"][0]) == (1.0, 3.0)


def test_the_table_has_every_figure_and_dashes_where_an_older_worker_measured_less():
    result = compare.comparisons([detailed(comparison("trial 3", 3, 3.2)), comparison("uniform", "uniform", 3.4)])
    table = loss_details.comparison_table(result)
    assert set(table.columns) >= {*loss_details.LOST, *loss_details.SAVED}
    assert list(table["difference_interval"]) == ["–", "1.00 to 3.00", "1.00 to 3.00"]
    assert list(table["allocation"]) == ["Dense", "Trial 3", "Uniform"]
    assert list(table["flops"].fillna(-1)) == [1200, 900, -1]
    assert table["reverse_kl"][1] == 0.4
    assert table["top5"][1] == 0.9
    assert pd.isna(table["reverse_kl"][2])
    assert pd.isna(table["difference"][0])
    assert loss_details.comparison_table([]).empty


# one model


def test_windows_are_compared_one_by_one():
    (result,) = compare.comparisons([comparison("trial 3", 3, 3.2)])
    view = loss_details.window_table(result)
    assert list(view.frame["difference"]) == pytest.approx([0.2] * 4)
    assert view.mean == pytest.approx(0.2)
    assert view.better == 0.0
    body = comparison("trial 3", 3, 3.2)
    body["report"] |= {"window_nll": [3.0, 2.9], "dense_window_nll": [3.0, 3.1]}
    view = loss_details.window_table(compare.comparisons([body])[0])
    assert (view.better, view.worst) == (0.5, 0)
    assert "better than the dense model on 50 % of 2 windows" in view.words
    body["report"] |= {"dense_window_nll": []}
    assert loss_details.window_table(compare.comparisons([body])[0]) is None


def test_positions_are_ranges_of_context():
    (result,) = compare.comparisons([detailed(comparison("trial 3", 3, 3.2))])
    table = loss_details.position_table(result)
    assert list(table["context"]) == ["1", "2–3"]
    assert list(table["extra"]) == pytest.approx([0.2, 0.1])
    assert loss_details.position_table(compare.comparisons([comparison("trial 3", 3, 3.2)])[0]).empty
    damaged = detailed(comparison("trial 3", 3, 3.2))
    damaged["report"] |= {"by_position": [7]}
    with pytest.raises(RunError, match="range of positions"):
        loss_details.position_table(compare.comparisons([damaged])[0])


# a second text


def test_ratios_on_both_texts_are_of_the_same_models():
    own = compare.comparisons([detailed(comparison("trial 3", 3, 3.2)), comparison("uniform", "uniform", 3.4)])
    bodies = [on_other_text("uniform", "uniform", 3.5), on_other_text("trial 3", 3, 4.0), on_other_text("preset:svd", "preset:svd", 3.1)]
    others = compare.other_texts(bodies)
    view = second_text.other_text(own, others["file:/data/notes.txt"])
    assert (view.own, view.other) == ("python-stdlib", "file:notes.txt")
    assert list(view.frame["name"]) == ["Preset: Weight SVD", "Uniform", "Trial 3"]
    row = view.frame.set_index("name").loc["Trial 3"]
    assert row["own_ratio"] == pytest.approx(math.exp(0.2))
    assert row["other_ratio"] == pytest.approx(math.exp(1.0))
    assert row["other_low"] < row["other_ratio"] < row["other_high"]
    assert math.isnan(view.frame["own_ratio"][0])  # never measured on the run's own text
    assert view.words.startswith("Largest gap: Trial 3 has 1.221 times the dense model's perplexity on python-stdlib, and 2.718 times")
    ends = dict(zip(["own_low", "own_high", "other_low", "other_high"], [1.2, 1.25, 2.5, 2.9], strict=True))
    apart = replace(view, frame=view.frame.assign(**ends))
    assert apart.words.endswith("; the intervals do not overlap.")
    assert replace(view, frame=view.frame.assign(**ends | {"own_high": 2.6})).words.endswith("do not tell them apart.")
    assert second_text.other_text(own, []) is None


def test_the_text_that_was_asked_for_last_comes_first_and_the_newest_measurement_counts():
    bodies = [on_other_text("uniform", "uniform", 3.5, "file:/a.txt"), on_other_text("uniform", "uniform", 3.5, "file:/b.txt")]
    bodies.append(on_other_text("uniform", "uniform", 3.6, "file:/a.txt"))
    result = compare.other_texts(bodies)
    assert list(result) == ["file:/a.txt", "file:/b.txt"]
    assert [each.nll for each in result["file:/a.txt"]] == [3.6]
    assert compare.comparisons(bodies) == []  # the run's own text is another matter


# tokens


def test_every_token_has_its_extra_loss_and_the_worst_come_first():
    (strip,) = token_losses.strips([tokens_answer(), tokens_answer()])
    assert list(strip.frame["extra"]) == pytest.approx([0.0, 2.0, 0.1, -0.5])
    assert strip.beginning + "".join(strip.frame["piece"]) == "".join(PIECES)
    worst = token_losses.worst_tokens(strip, 2)
    assert list(worst["piece"]) == ["␣<", "␣b"]
    assert list(worst["before"]) == ["if␣a", "if␣a␣<"]
    assert 0.1 <= strip.scale <= 2.0
    assert "half of the extra loss lies in 1 of 4 tokens" in strip.words
    assert strip.title == "Uniform: if a < b:"


def test_an_answer_with_too_few_figures_is_refused():
    with pytest.raises(RunError, match="one value for each token"):
        token_losses.strips([tokens_answer(pieces=["only", " two"])])


# prompts and speed


def test_all_that_continued_one_prompt_stand_under_it():
    answer = {"ok": True, "kind": "generate", "prompt": "def f(", "tokens": 8, "seed": 0, "dense_text": "x):"}
    bodies = [{**answer, "trial": name, "label": name, "compressed_text": text} for name, text in (("uniform", "a"), ("trial 3", "b"))]
    bodies.append({**bodies[0], "seed": 1, "compressed_text": "c"})
    newest, first = continuations.prompts(bodies)
    assert (newest.seed, newest.texts) == (1, (("Uniform", "c"),))
    assert first.texts == (("Uniform", "a"), ("Trial 3", "b"))
    assert first.original == "x):"
    assert first.label("Uniform") == "Uniform"  # earlier versions kept no facts
    facts = {
        "dense_facts": {"tokens": 4, "repeated": 0.0, "ended": True},
        "compressed_facts": {"tokens": 8, "repeated": 0.4, "ended": False},
    }
    (shown,) = continuations.prompts([{**bodies[0], **facts}])
    assert shown.label("Dense") == "Dense: 4 tokens, repeated 4-grams 0.0%, ended by itself"
    assert shown.label("Uniform") == "Uniform: 8 tokens (2.00x dense), repeated 4-grams 40.0%, cut at the limit"


def test_timings_of_one_model_are_told_apart():
    sizes = {"prompt_tokens": 8, "new_tokens": 4, "rounds": 3}
    result = measured_speed.speeds([speed_answer() | {"config": {"batch_size": batch, **sizes}} for batch in (1, 16)])
    names = ["Uniform, batch 16, 8 + 4 tokens, 3 rounds", "Uniform, batch 1, 8 + 4 tokens, 3 rounds"]
    assert list(dict.fromkeys(measured_speed.speedup_table(result)["name"])) == names
    assert set(measured_speed.speedup_table(result[:1])["name"]) == {"Uniform"}


def test_speed_is_told_with_spread_and_protocol():
    result = measured_speed.speeds([speed_answer(), speed_answer("trial 3", memory=False), speed_answer()])
    assert [each.name for each in result] == ["Uniform", "Trial 3"]
    table = measured_speed.speed_table(result[0])
    assert list(table["dense"][:2]) == ["1,000 (900 to 1,100)", "50 (45 to 55)"]
    assert list(table["faster"]) == ["1.00 (0.90 to 1.10)", "2.00 (1.80 to 2.20)", "1.00 (0.90 to 1.10)", "0.50x", "0.50x"]
    assert len(measured_speed.speed_table(result[1])) == 3  # memory was not measured, nor anything counted
    counted = {"parameters": 100, "bytes": 2048}
    body = speed_answer() | {"dense_flops": 1200, "flops": 900}
    for name, factor in (("dense", 2), ("compressed", 1)):
        body[name] |= {key: factor * value for key, value in counted.items()}
    rows = measured_speed.speed_table(measured_speed.speeds([body])[0]).set_index("measure")
    assert list(rows.loc["Parameters"]) == ["200", "100", "0.50x"]
    assert list(rows.loc["Stored"]) == ["4.00 KiB", "2.00 KiB", "0.50x"]
    assert list(rows.loc["FLOPs per token, linears and head"]) == ["1,200", "900", "0.75x"]
    ups = measured_speed.speedup_table(result)
    assert list(ups["median"]) == [1.0, 2.0, 1.0] * 2
    numbers = measured_speed.speed_numbers(result)
    assert list(numbers["decode_tokens_per_second"]) == [50.0, 100.0, 50.0, 100.0]
    damaged = speed_answer()
    del damaged["decode_speedup"]
    with pytest.raises(RunError, match="decode_speedup"):
        measured_speed.speeds([damaged])
