"""What the pages show, as numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from synthetic import (
    BLOCKS,
    DENSE_NLL,
    FFN,
    HIDDEN,
    KINDS,
    RATIO,
    calibration_json,
    comparison,
    make_run,
    matrices,
    model_json,
    priced_matrices,
    running_status,
    spectra,
    write_answers,
)

from lowrank_core.accounting import allocated_parameters
from lowrank_core.config import RunConfig, SearchConfig
from lowrank_core.errors import BudgetError, ModelError, RunError, TextError
from lowrank_core.runs import RunStatus, write_json
from lowrank_core.search.records import read_trials
from lowrank_core.spectra import effective_rank, rank_for_energy
from lowrank_core.views import calibration, compare, energy, formatting, headers, model, runs, search, sources, spectrum, text
from lowrank_core.views.records import build


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "–"),
        (0, "0"),
        (0.0025504, "0.00255"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (1234.4, "1,234"),
        (1.7e9, "1.70e9"),
    ],
)
def test_numbers_are_words_and_a_missing_one_is_a_dash(value, words):
    assert formatting.number(value) == words


@pytest.mark.parametrize(
    ("value", "words"), [(None, "–"), (math.nan, "–"), (950, "950"), (65_536, "65.5 k"), (6_850_000, "6.85 M"), (7_000_000_000, "7.00 B")]
)
def test_counts_are_shortened_in_their_own_unit(value, words):
    assert formatting.count(value) == words


@pytest.mark.parametrize(("seconds", "words"), [(None, "–"), (0.2, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")])
def test_durations_are_words(seconds, words):
    assert formatting.duration(seconds) == words


def test_fractions_and_sizes_are_words():
    assert formatting.percent(0.3) == "30.0 %"
    assert formatting.percent(math.nan) == "–"
    assert formatting.size(27_400_000) == "26.1 MiB"
    assert formatting.interval(1.0, None) == "–"


# the model


def test_model_facts_count_what_the_run_holds():
    facts = model.model_facts(make_run())
    assert facts.compressible_parameters == sum(m.dense_parameters for m in matrices())
    assert facts.compressible_share == pytest.approx(facts.compressible_parameters / (facts.compressible_parameters + 128 * HIDDEN))
    assert [m.name for m in facts.matrices] == [m.name for m in matrices()]


def test_the_module_table_adds_up_to_the_model():
    facts = model.model_facts(make_run())
    table = model.module_table(facts)
    assert table["parameters"].sum() == facts.parameters
    assert table["share"].sum() == pytest.approx(1.0)
    assert list(table["type"][:7]) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert set(table["count"][:7]) == {BLOCKS}


def test_memory_counts_a_shared_input_once():
    estimate = model.memory_estimate(model.model_facts(make_run()))
    inputs = BLOCKS * (3 * HIDDEN**2 + FFN**2)  # q, k, v share one; o; gate and up share one; down
    assert estimate.statistics_bytes == inputs * 8 * 4
    assert estimate.fits
    assert not replace(estimate, available_bytes=estimate.total_bytes).fits


def test_a_record_without_a_key_is_a_message_that_names_it():
    run = make_run()
    body = model_json()
    del body["vocabulary"]
    write_json(run.path / "model.json", body)
    with pytest.raises(RunError, match=r"model\.json has no 'vocabulary'"):
        model.model_facts(run)


def test_a_record_with_a_wrong_kind_of_value_is_a_message():
    with pytest.raises(RunError, match="windows holds 'many'"):
        build(text.SplitFacts, {"name": "test", "windows": "many", "tokens": 1}, "text.json")


# headers of a checkpoint


def checkpoint(folder: Path) -> Path:
    tensors = {f"{m.name}.weight": np.zeros((m.d_out, m.d_in), np.float16) for m in matrices()}
    tensors |= {
        "model.embed_tokens.weight": np.zeros((128, HIDDEN), np.float16),
        "model.layers.0.input_layernorm.weight": np.zeros(HIDDEN, np.float16),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "vocab_size": 128, "tie_word_embeddings": True})
    )
    return folder


def test_headers_tell_what_the_worker_would_find(tmp_path):
    facts = headers.header_facts(checkpoint(tmp_path / "model"))
    assert sorted(facts.matrices) == sorted(matrices())
    assert facts.parameters == sum(m.dense_parameters for m in matrices()) + 128 * HIDDEN + HIDDEN
    assert facts.bytes == 2 * facts.parameters
    assert facts.tied_embeddings
    assert sorted(facts.input_widths.values()) == sorted([HIDDEN, HIDDEN, HIDDEN, FFN] * BLOCKS)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "can't be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no .safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_a_message(tmp_path, harm, said):
    folder = checkpoint(tmp_path / "model")
    harm(folder)
    with pytest.raises(ModelError, match=said):
        sources.check_model(str(folder))


def test_references_are_told_apart(tmp_path):
    assert sources.check_model("meta-llama/Llama-2-7b-hf") is None
    assert sources.check_model(str(checkpoint(tmp_path / "model"))).blocks == BLOCKS
    for wrong, said in (("", "No model"), ("two words", "neither"), (str(tmp_path / "none"), "There is no folder")):
        with pytest.raises(ModelError, match=said):
            sources.check_model(wrong)


def test_texts_are_checked(tmp_path):
    good, empty, binary = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.bin"
    good.write_text("words")
    empty.touch()
    binary.touch()
    assert sources.check_text(f"file:{good}") == f"file:{good}"
    assert sources.check_text("c4") == "c4"
    for wrong, said in (
        ("lambada", "Unknown"),
        ("file:", "No file"),
        (f"file:{empty}", "is empty"),
        (f"file:{binary}", "not a text file"),
        ("ptb:/none", "no folder"),
    ):
        with pytest.raises(TextError, match=said):
            sources.check_text(wrong)


# spectra and energy


def test_the_atlas_shows_the_metric_of_every_module():
    found = spectra()
    view = spectrum.atlas(found, "effective_rank", "weights", relative=False)
    assert list(view.frame["value"]) == pytest.approx([effective_rank(s.weight_energy) for s in found])
    relative = spectrum.atlas(found, "effective_rank", "weights", relative=True)
    assert list(relative.frame["value"]) == pytest.approx([effective_rank(s.weight_energy) / s.shape.max_rank for s in found])
    assert relative.frame["value"].between(0, 1).all()
    assert relative.percent
    assert relative.high == relative.frame["value"].max()
    assert view.kinds == list(KINDS)
    assert view.depths == list(range(BLOCKS))


@pytest.mark.parametrize("metric", spectrum.METRICS)
def test_no_metric_exceeds_full_rank(metric):
    table = spectrum.atlas_table(spectra(), metric)
    for source in spectrum.SOURCES:
        assert (table[source] >= 1).all()
        assert (table[source] <= table["full_rank"] + 1e-9).all()


def test_few_ranks_are_drawn_but_the_first_32_and_the_last_always():
    ranks = spectrum.log_ranks(11_008)
    assert list(ranks[:32]) == list(range(1, 33))
    assert ranks[-1] == 11_008
    assert 150 <= len(ranks) <= 200
    assert (np.diff(ranks) > 0).all()
    assert list(spectrum.log_ranks(40)) == list(range(1, 41))


def test_scree_curves_begin_at_one_and_have_gaps_where_nothing_is_left():
    layer = spectra()[0]
    curves = spectrum.scree_curves(layer)
    assert curves.weights[0] == curves.features[0] == 1.0
    assert curves.features[3] == pytest.approx(math.sqrt(layer.feature_eigenvalues[3] / layer.feature_eigenvalues[0]))
    empty = replace(layer, feature_eigenvalues=np.zeros_like(layer.feature_eigenvalues))
    assert np.isnan(spectrum.scree_curves(empty).features).all()


def test_energy_kept_and_removed_add_up_to_one():
    curves = energy.energy_curves(spectra()[0])
    assert curves.features + curves.features_left == pytest.approx(np.ones(len(curves.ranks)))
    assert curves.features[-1] == pytest.approx(1.0)
    assert curves.weights_left[-1] == 0.0
    assert (np.diff(curves.features) >= 0).all()


def test_the_tail_is_not_lost_to_cancellation():
    layer = spectra()[0]
    eigenvalues = np.concatenate([[1.0], np.full(layer.feature_eigenvalues.size - 1, 1e-20)])
    curves = energy.energy_curves(replace(layer, feature_eigenvalues=eigenvalues))
    assert curves.features_left[0] == pytest.approx((eigenvalues.size - 1) * 1e-20)


def test_the_sentence_tells_the_numbers_at_a_rank():
    layer = spectra()[0]
    at = energy.energy_at_rank(layer, 3)
    assert at.features_kept == pytest.approx(layer.feature_eigenvalues[:3].sum() / layer.feature_eigenvalues.sum())
    assert at.parameters_kept == pytest.approx(3 * 2 * HIDDEN / HIDDEN**2)
    assert "At rank 3 (12 % of full rank)" in at.sentence()
    assert "stays dense" not in at.sentence()
    assert "stays dense" in energy.energy_at_rank(layer, layer.shape.break_even_rank + 1).sentence()


def test_pooling_takes_energy_away_on_the_samples_scale():
    curves = energy.pooling_curves(spectra()[0])
    assert curves.sample[0] == pytest.approx(1.0)
    assert (curves.pooled <= curves.sample + 1e-12).all()


def test_module_facts_hold_both_ranks():
    layer = spectra()[0]
    value = spectrum.module_facts(layer)["Rank for 95 %, features / weights"][0]
    assert value == f"{rank_for_energy(layer.feature_eigenvalues, 0.95)} / {rank_for_energy(layer.weight_energy, 0.95)}"


# calibration


def test_too_few_tokens_are_warned_of_once():
    run = make_run()
    assert calibration.quality_warnings(calibration.calibration_facts(run)) == []
    write_json(run.path / "calibration.json", calibration_json(tokens=7 * FFN))
    (warning,) = calibration.quality_warnings(calibration.calibration_facts(run))
    assert f"{BLOCKS} of {4 * BLOCKS} inputs" in warning
    body = calibration_json(tokens=7 * FFN) | {"warnings": ["from the worker"]}
    write_json(run.path / "calibration.json", body)
    assert calibration.quality_warnings(calibration.calibration_facts(run)) == ["from the worker"]


def test_groups_are_shown_relative_to_their_mean():
    facts = calibration.calibration_facts(make_run())
    entry = facts.input_of("model.layers.1.mlp.up_proj")
    assert entry.input_group == "1.mlp"
    table = calibration.group_table(entry)
    assert list(table["relative"]) == pytest.approx([0.75, 1.25])
    assert facts.groups == 2
    assert facts.least_tokens_per_dimension == pytest.approx(1280 / FFN)


def test_an_input_without_a_condition_is_no_number():
    run = make_run()
    body = calibration_json()
    for entry in body["inputs"]:
        entry["condition"] = None
    write_json(run.path / "calibration.json", body)
    assert calibration.calibration_facts(run).worst_condition is None


# the search


def test_the_history_keeps_the_best_so_far_over_a_failed_trial():
    view = search.history(read_trials(make_run()), "kl")
    assert list(view.trials["best"]) == pytest.approx([0.41, 0.41, 0.41, 0.35, 0.35, 0.35])
    assert math.isnan(view.trials["value"][4])
    assert view.trials["state"][4] == "failed"
    assert view.baselines == {"Uniform": 0.41, "LoRD, fixed by hand": 0.44}


def test_a_history_without_any_value_has_no_best():
    run = make_run(state="running")
    last = read_trials(run)[-1]
    view = search.history([last], "kl")
    assert view.trials["best"].isna().all()
    assert view.baselines == {}


def test_progress_is_told_against_uniform():
    now = search.progress(read_trials(make_run()), SearchConfig(trials=6))
    assert (now.complete, now.wanted, now.best.number) == (5, 6, 3)
    assert now.gain == pytest.approx(1 - 0.35 / 0.41)
    assert search.progress([], SearchConfig()).gain is None


def test_the_trial_table_marks_the_best_and_has_a_column_for_each_variable():
    trials = read_trials(make_run())
    table = search.trial_table(trials)
    assert list(table["trial"]) == list(range(6))
    assert table["kind"][3] == "sampled ★ best"
    assert table["kind"][0] == "Uniform"
    assert set(search.search_params(trials)) <= set(table.columns)
    assert search.trial_table([]).empty


def test_the_allocation_map_spends_what_the_allocation_counts():
    trial = read_trials(make_run())[3]
    shapes = search.priced(matrices(), "pooled_feature")
    assert list(shapes) == priced_matrices()
    allocation = search.allocation_of(trial, shapes)
    view = search.allocation_map(allocation, shapes)
    spent = sum(value * m.dense_parameters for value, m in zip(view.frame["value"], shapes, strict=True))
    assert spent == pytest.approx(allocated_parameters(shapes, trial.ranks))
    assert (view.frame.loc[view.frame["kind"] == "v_proj", "label"] == "dense").all()
    assert allocation.compression_ratio >= RATIO


def test_the_allocation_that_is_downloaded_can_be_read_again(tmp_path):
    from lowrank_core.allocation import read_ranks

    trial = read_trials(make_run())[3]
    path = tmp_path / "allocation.json"
    path.write_text(search.allocation_of(trial, priced_matrices()).to_json())
    assert read_ranks(path) == dict(trial.ranks)


def test_a_ratio_that_can_not_be_met_is_told_before_the_start():
    shapes = [m for m in matrices() if m.kind in ("q_proj", "v_proj")]
    with pytest.raises(BudgetError, match="can't be met"):
        search.check_budget(RunConfig(search=SearchConfig(compression_ratio=0.8)), shapes)
    assert search.check_budget(RunConfig(), shapes) is None
    kept = search.check_budget(RunConfig(search=SearchConfig(compression_ratio=RATIO)), matrices())
    assert kept.ranks["model.layers.0.self_attn.v_proj"] is None


# comparisons


def test_the_newest_measurement_of_an_allocation_counts():
    bodies = [comparison("trial 3", 3, 3.6), comparison("uniform", "uniform", 3.4), comparison("trial 3", 3, 3.2)]
    found = compare.comparisons(bodies)
    assert [c.label for c in found] == ["trial 3", "uniform"]
    assert found[0].perplexity == pytest.approx(math.exp(3.2))


def test_the_comparison_table_begins_with_the_original():
    run = make_run()
    write_answers(run)
    bodies = compare.answers(run)
    table = compare.comparison_table(compare.comparisons(bodies))
    assert list(table["allocation"]) == ["Original", "trial 3", "Uniform"]
    assert table["perplexity"][0] == pytest.approx(math.exp(DENSE_NLL))
    assert table["removed"][0] == 0.0
    assert table["low"][0] < table["perplexity"][0] < table["high"][0]
    assert [c.compressed_text for c in compare.continuations(bodies)] == ["self):"]
    assert compare.exports(bodies)[0].path.endswith("trial-3")
    assert compare.last_failure(bodies) is None


def test_an_interval_needs_two_finite_windows():
    assert compare.normal_interval([1.0]) is None
    assert compare.normal_interval([1.0, math.nan]) is None
    low, high = compare.normal_interval([2.0, 2.2, 1.8])
    assert low < math.exp(2.0) < high


def test_only_the_newest_answer_counts_as_a_failure():
    failed = {"ok": False, "kind": "export", "error": "disk full", "time": 1.0}
    assert compare.last_failure([comparison("uniform", "uniform", 3.4), failed]).error == "disk full"
    assert compare.last_failure([failed, comparison("uniform", "uniform", 3.4)]) is None


def test_a_trial_is_filed_under_its_baselines_name():
    trials = read_trials(make_run())
    assert compare.label_of(0, trials) == "uniform"
    assert compare.label_of(3, trials) == "trial 3"
    assert compare.label_of("lord_manual", trials) == "lord_manual"


# runs


def test_the_newest_run_with_data_is_shown_first():
    older = make_run()
    make_run(parts=False, state="failed")
    assert runs.default_run().id == older.id
    started = make_run(parts=False, state="running")
    assert runs.default_run().id == started.id


def test_without_a_run_the_recorded_one_is_shown(monkeypatch, tmp_path):
    assert runs.default_run() is None
    recorded = make_run(path=tmp_path / "recorded-run")
    monkeypatch.setattr("lowrank_core.views.runs.recorded_run", lambda: recorded)
    assert runs.default_run() == recorded


def test_labels_differ_and_last():
    first, second = make_run(), make_run()
    labels = runs.run_labels([second, first])
    assert len(set(labels.values())) == 2
    assert runs.run_labels([first])[first.id] == labels[first.id]


def test_the_run_table_counts_complete_trials():
    run = make_run()
    table = runs.run_table([run])
    assert (table["trials"][0], table["best"][0], table["ratio"][0]) == (5, 0.35, RATIO)


def test_a_resumed_warm_worker_counts_as_busy_before_it_says_so():
    run = make_run(state="running")
    assert runs.is_busy(run)
    run.write_status(replace(running_status(), state="stopped"))
    assert runs.is_busy(run)  # alive, and nothing holds it back
    run.pause_marker.touch()
    assert not runs.is_busy(run)
    write_json(run.path / "requests" / "1-ab.json", {"id": "1-ab", "kind": "compare", "arguments": {}})
    assert runs.is_busy(run)


def test_the_signature_changes_when_a_page_has_more_to_show():
    run = make_run(parts=False, state="running")
    before = runs.signature(run)
    assert runs.signature(run) == before
    run.write_status(running_status("Searching", 9))
    assert runs.signature(run) == before  # progress within a stage redraws nothing
    write_json(run.path / "model.json", model_json())
    assert runs.signature(run) != before


def test_status_words_need_no_total():
    assert runs.status_words(RunStatus("running", "Loading")) == ""
    assert runs.status_words(RunStatus("running", "Calibrating", 24, 256, 12.0)) == "24 of 256 · about 12 s left"
    assert runs.status_words(RunStatus("stopped", "", 24, 256, 12.0)) == "24 of 256"
