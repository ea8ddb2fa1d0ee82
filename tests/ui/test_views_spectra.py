"""Spectra, energy and calibration, as numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from synthetic import (
    BLOCKS,
    FFN,
    HIDDEN,
    KINDS,
    calibration_json,
    make_run,
    spectra,
)

from lowrank_core.runs import write_json
from lowrank_core.spectra.spectrum import effective_rank, rank_for_energy
from lowrank_core.studio.energy import energy_table
from lowrank_core.studio.overview import calibration_quality
from lowrank_core.studio.spectra import spectrum_table


def test_the_atlas_shows_the_metric_of_every_module():
    result = spectra()
    view = spectrum_table.atlas(result, "effective_rank", "weights", relative=False)
    assert list(view.frame["value"]) == pytest.approx([effective_rank(s.weight_energy) for s in result])
    relative = spectrum_table.atlas(result, "effective_rank", "weights", relative=True)
    assert list(relative.frame["value"]) == pytest.approx([effective_rank(s.weight_energy) / s.shape.max_rank for s in result])
    assert relative.frame["value"].between(0, 1).all()
    assert relative.percent
    assert relative.high == relative.frame["value"].max()
    assert view.kinds == list(KINDS)
    assert view.depths == list(range(BLOCKS))


@pytest.mark.parametrize("metric", [metric for metric in spectrum_table.METRICS.values() if metric.ranks], ids=lambda metric: metric.name)
def test_no_metric_exceeds_full_rank(metric):
    table = spectrum_table.atlas_table(spectra(), metric.name)
    for source in metric.sources:
        assert (table[source] >= (0 if metric.name == "outliers" else 1)).all()
        assert (table[source] <= table["full_rank"] + 1e-9).all()
        assert list(table[f"{source}_relative"]) == pytest.approx(list(table[source] / table["full_rank"]))


def test_few_ranks_are_drawn_but_the_first_32_and_the_last_always():
    ranks = spectrum_table.log_ranks(11_008)
    assert list(ranks[:32]) == list(range(1, 33))
    assert ranks[-1] == 11_008
    assert 150 <= len(ranks) <= 200
    assert (np.diff(ranks) > 0).all()
    assert list(spectrum_table.log_ranks(40)) == list(range(1, 41))


def test_scree_curves_begin_at_one_and_have_gaps_where_nothing_is_left():
    layer = spectra()[0]
    curves = spectrum_table.scree_curves(layer)
    assert curves.weights[0] == curves.features[0] == 1.0
    assert curves.features[3] == pytest.approx(math.sqrt(layer.feature_eigenvalues[3] / layer.feature_eigenvalues[0]))
    empty = replace(layer, feature_eigenvalues=np.zeros_like(layer.feature_eigenvalues))
    assert np.isnan(spectrum_table.scree_curves(empty).features).all()


def test_energy_kept_and_removed_add_up_to_one():
    curves = energy_table.energy_curves(spectra()[0])
    assert list(curves["features_kept"] + curves["features_removed"]) == pytest.approx([1.0] * len(curves))
    assert curves["features_kept"].iloc[-1] == pytest.approx(1.0)
    assert curves["weights_removed"].iloc[-1] == 0.0
    assert curves["features_kept"].is_monotonic_increasing


def test_the_tail_is_not_lost_to_cancellation():
    layer = spectra()[0]
    eigenvalues = np.concatenate([[1.0], np.full(layer.feature_eigenvalues.size - 1, 1e-20)])
    curves = energy_table.energy_curves(replace(layer, feature_eigenvalues=eigenvalues))
    assert curves["features_removed"].iloc[0] == pytest.approx((eigenvalues.size - 1) * 1e-20)


def test_the_sentence_tells_the_numbers_at_a_rank():
    layer = spectra()[0]
    at = energy_table.energy_at_rank(layer, 3)
    assert at.features_kept == pytest.approx(layer.feature_eigenvalues[:3].sum() / layer.feature_eigenvalues.sum())
    assert at.parameters_kept == pytest.approx(3 * 2 * HIDDEN / HIDDEN**2)
    assert "At rank 3 (12 % of full rank)" in at.sentence()
    assert "stays dense" not in at.sentence()
    assert "stays dense" in energy_table.energy_at_rank(layer, layer.shape.break_even_rank + 1).sentence()


def test_pooling_takes_energy_away_on_the_samples_scale():
    curves = energy_table.pooling_curves(spectra()[0])
    assert curves["sample"].iloc[0] == pytest.approx(1.0)
    assert (curves["pooled"] <= curves["sample"] + 1e-12).all()


def test_module_facts_hold_both_ranks():
    layer = spectra()[0]
    value = spectrum_table.module_facts(layer)["Rank for 95 %, features / weights"][0]
    assert value == f"{rank_for_energy(layer.feature_eigenvalues, 0.95)} / {rank_for_energy(layer.weight_energy, 0.95)}"


# calibration


def test_too_few_tokens_are_warned_of_once():
    run = make_run()
    assert calibration_quality.quality_warnings(calibration_quality.calibration_facts(run)) == []
    write_json(run.path / "calibration.json", calibration_json(tokens=7 * FFN))
    (warning,) = calibration_quality.quality_warnings(calibration_quality.calibration_facts(run))
    assert f"{BLOCKS} of {4 * BLOCKS} inputs" in warning
    body = calibration_json(tokens=7 * FFN) | {"warnings": ["from the worker"]}
    write_json(run.path / "calibration.json", body)
    assert calibration_quality.quality_warnings(calibration_quality.calibration_facts(run)) == ["from the worker"]


def test_groups_are_shown_relative_to_their_mean():
    facts = calibration_quality.calibration_facts(make_run())
    entry = facts.input_of("model.layers.1.mlp.up_proj")
    assert entry.input_group == "1.mlp"
    table = calibration_quality.group_table(entry)
    assert list(table["relative"]) == pytest.approx([0.75, 1.25])
    assert facts.groups == 2
    assert facts.min_tokens_per_dimension == pytest.approx(1280 / FFN)


def test_an_input_without_a_condition_is_no_number():
    run = make_run()
    body = calibration_json()
    for entry in body["inputs"]:
        entry["condition"] = None
    write_json(run.path / "calibration.json", body)
    assert calibration_quality.calibration_facts(run).worst_condition is None


def test_the_worst_condition_is_that_of_the_singular_input():
    run = make_run()
    body = calibration_json()
    inputs = body["inputs"]
    assert calibration_quality.calibration_facts(run).condition_words == "10,000"
    inputs[0]["condition"] = None
    inputs[1]["condition"] = 7.3e17  # as an earlier version recorded what is rounding of a zero
    write_json(run.path / "calibration.json", body)
    facts = calibration_quality.calibration_facts(run)
    assert facts.inputs[1].condition is None
    assert facts.condition_words == f"∞ (2 of {len(inputs)} singular)"
