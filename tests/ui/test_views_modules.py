"""The Spectra and Feature energy pages' tables, as numbers: metrics, densities, marks, directions, bands, measured loss, quality."""

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
    RATIO,
    calibration_json,
    directions,
    make_run,
    matrices,
    priced_units,
    spectra,
    write_front,
)

from lowrank_core.allocation import allocation_from_ranks
from lowrank_core.config import SearchConfig
from lowrank_core.errors import RunError
from lowrank_core.parameters import HeadUnit, MatrixShape, Unit
from lowrank_core.runs import write_json
from lowrank_core.spectra.spectrum import LayerSpectrum, retained_energy
from lowrank_core.studies.records import TrialRecord, read_trials
from lowrank_core.studio.energy import energy_table
from lowrank_core.studio.overview import calibration_quality
from lowrank_core.studio.shared import module_choices
from lowrank_core.studio.shared.allocation_map import allocation_map, allocation_of
from lowrank_core.studio.shared.protocol import spectra_protocol, trial_protocol
from lowrank_core.studio.spectra import density, map_metrics, spectrum_table
from lowrank_core.studio.spectra.top_directions import direction_facts, direction_failure

NAME = "model.layers.1.mlp.up_proj"


def of_values(singular_values: np.ndarray, rows: int, columns: int) -> LayerSpectrum:
    shape = MatrixShape("model.layers.0.a", "a", 0, rows, columns)
    return LayerSpectrum(shape, singular_values, singular_values**2, singular_values**2, singular_values**2)


def trial(number: int, ranks: dict[str, int | None], **changes: object) -> TrialRecord:
    result = TrialRecord(number, "complete", "sampled", 0.5, {}, ranks, 0.3, 0.5, 20.0, 128, 1.0)
    return replace(result, **changes)


# metrics


def test_equal_energies_give_their_number_in_every_rank_metric():
    flat = of_values(np.concatenate([np.full(20, 3.0), np.zeros(12)]), 32, 40)
    for name, expected in (("effective_rank", 20), ("stable_rank", 20), ("participation_ratio", 20), ("rank_90", 18), ("rank_95", 19)):
        assert spectrum_table.atlas_table([flat], name)["weights"][0] == pytest.approx(expected), name


def test_the_atlas_counts_the_outliers_of_weights_alone():
    noise = np.random.default_rng(0).standard_normal((120, 160))
    spiked = noise + 6 * np.outer(np.ones(120), np.ones(160)) / 12
    result = [of_values(np.linalg.svd(weight, compute_uv=False), 120, 160) for weight in (noise, spiked)]
    table = spectrum_table.atlas_table(result, "outliers")
    assert list(table["weights"]) == [0, 1]
    assert "features" not in table
    view = spectrum_table.atlas(result, "outliers", "weights", relative=False)
    assert list(view.frame["label"]) == [
        "0 of 120 singular values beyond the bulk",
        "1 of 120 singular values beyond the bulk",
    ]


def test_an_exponent_says_the_range_it_was_fitted_to_and_is_a_gap_where_there_is_none():
    tail = np.sqrt(np.sort(np.random.default_rng(1).pareto(1.5, 200) + 1)[::-1])
    result = [of_values(tail, 200, 200), of_values(np.ones(24), 24, 24)]
    view = spectrum_table.atlas(result, "alpha", "weights", relative=True)  # α is no rank: never relative
    fit = result[0].weight_tail
    assert fit is not None
    assert view.frame["value"][0] == pytest.approx(fit.alpha)
    assert f"fitted to the largest {fit.count} of 200 eigenvalues" in view.frame["label"][0]
    assert math.isnan(view.frame["value"][1])
    assert view.frame["label"][1] == "– too few eigenvalues for a tail"
    assert view.low == view.high == pytest.approx(fit.alpha)
    assert not view.percent


def test_a_matrix_of_zeros_is_a_gap_in_every_metric():
    dead = of_values(np.zeros(24), 24, 24)
    for name in map_metrics.offered(module_choices.RunFacts()):
        for source in map_metrics.METRICS[name].sources:
            assert math.isnan(spectrum_table.atlas([dead], name, source, relative=True).frame["value"][0]), (name, source)


def test_what_a_trial_keeps_is_offered_only_where_there_is_a_trial():
    assert "kept" not in map_metrics.offered(module_choices.RunFacts())
    run, units = make_run(), priced_units()
    chosen = module_choices.chosen_trial(read_trials(run), run.config.search, None)
    assert chosen is not None
    assert chosen.number == 3
    facts = module_choices.facts_of_trial(chosen, units)
    assert "kept" in map_metrics.offered(facts)
    view = spectrum_table.atlas(spectra(), "kept", "", relative=True, facts=facts)
    expected = allocation_map(allocation_of(chosen, units), units).frame
    assert list(view.frame["value"]) == pytest.approx(list(expected["value"]))
    assert view.percent
    table = spectrum_table.atlas_table(spectra(), "kept", facts)
    assert list(table["value"]) == list(view.frame["value"])
    assert "value_relative" not in table


def test_the_users_trial_comes_before_the_best_and_a_range_of_ratios_has_no_best():
    trials = [trial(0, {"a": 1}, value=0.2), trial(1, {"a": 2}), trial(2, {})]
    search = SearchConfig(0.3)
    assert module_choices.chosen_trial(trials, search, None) == trials[0]
    assert module_choices.chosen_trial(trials, search, 1) == trials[1]
    assert module_choices.chosen_trial(trials, search, 2) == trials[0]  # it has no ranks yet
    assert module_choices.chosen_trial(trials, SearchConfig(0.2, max_ratio=0.6), None) is None


def test_ranks_of_stacks_and_heads_are_those_of_each_matrix():
    q, k = MatrixShape("l.0.q", "q", 0, 24, 24), MatrixShape("l.0.k", "k", 0, 12, 24)
    v, o = MatrixShape("l.0.v", "v", 0, 12, 24), MatrixShape("l.0.o", "o", 0, 24, 24)
    units = [Unit((q, k)), HeadUnit((v, o), heads=4, groups=2, head_dim=6)]
    ranks = {"l.0.q+l.0.k": 14, "l.0.v+l.0.o": 3}
    result = module_choices.facts_of_trial(trial(7, dict(allocation_from_ranks("x", units, ranks).ranks)), units).choices
    assert {name: choice.rank for name, choice in result.items()} == {"l.0.q": 14, "l.0.k": 12, "l.0.v": 6, "l.0.o": 12}
    assert "by heads" in result["l.0.v"].words


# one module


def test_the_break_even_ranks_are_where_factors_begin_to_cost_more():
    shape = MatrixShape("a", "a", 0, 30, 50)
    marks = {mark.label: mark.rank for mark in spectrum_table.rank_marks(shape)}
    plain, pivoted = marks["break-even rank"], marks["pivoted break-even rank"]
    assert plain * (30 + 50) < 30 * 50 <= (plain + 1) * (30 + 50)
    assert pivoted * (80 - pivoted) + pivoted < 1500
    assert (pivoted + 1) * (80 - pivoted - 1) + pivoted + 1 >= 1500 or pivoted + 1 > 30
    facts = module_choices.RunFacts("Trial 7", {"a": module_choices.Choice(0.4, 9, "rank 9, 40 % kept")})
    assert spectrum_table.rank_marks(shape, facts)[0] == spectrum_table.RankMark(9, "Trial 7: rank")
    dense = module_choices.RunFacts("Trial 7", {"a": module_choices.Choice(1.0, None, "dense")})
    assert len(spectrum_table.rank_marks(shape, dense)) == 2


def test_the_scree_shows_chance_on_the_scale_of_the_weights():
    layer = spectra()[0]
    curves = spectrum_table.scree_curves(layer)
    first = layer.weight_singular_values[0]
    assert curves.shuffled is not None
    assert curves.shuffled[2] == pytest.approx(layer.shuffled_singular_values[2] / first)
    spread = math.sqrt((layer.weight_singular_values**2).sum() / HIDDEN**2)
    assert curves.bulk_edge == pytest.approx(spread * 2 * math.sqrt(HIDDEN) / first)
    assert list(spectrum_table.scree_table(curves)) == ["rank", "weights", "features", "shuffled_weights", "bulk_edge"]
    old = spectrum_table.scree_curves(replace(layer, shuffled_singular_values=None))
    assert old.shuffled is None
    assert "shuffled_weights" not in spectrum_table.scree_table(old)


@pytest.mark.parametrize("source", ["weights", "features"])
def test_a_density_integrates_to_all_eigenvalues(source):
    layer = spectra()[5]
    result = density.density(layer, source)
    widths = np.diff(np.log10(result.edges))
    assert (result.shares * widths).sum() + result.below == pytest.approx(1)
    energies = map_metrics.energies_of(layer, source)
    assert result.edges[-1] == pytest.approx(energies.max() / energies.mean())
    assert len(result.edges) <= 100


def test_only_weights_stand_beside_a_random_matrix():
    layer = spectra()[4]  # 48 x 24
    result = density.density(layer, "weights")
    assert result.bulk_edge == pytest.approx((1 + math.sqrt(HIDDEN / FFN)) ** 2)
    assert result.beyond == 0
    x, shares = result.bulk["x"].to_numpy(), result.bulk["share_per_decade"].to_numpy()
    assert np.trapezoid(shares, np.log10(x)) == pytest.approx(1, abs=0.01)
    assert density.density(layer, "features").bulk_edge is None
    assert density.density(of_values(np.zeros(4), 4, 4), "weights") is None


# directions


def test_directions_are_the_newest_answer_for_that_side_of_that_module():
    bodies = [directions(NAME), directions(NAME, "output"), directions("another")]
    result = direction_facts(bodies, NAME, "input")
    assert list(result.frame["direction"]) == [1, 1, 2, 2]
    assert list(result.frame["share"]) == [0.5, 0.5, 0.125, 0.125]
    assert list(result.frame["token"][:2]) == ["␣def", "↵"]
    assert result.frame["context"][0] == "↵⟦ def⟧ mean("
    assert list(result.frame["projection"][:2]) == [7.5, -3.25]
    assert direction_facts(bodies, "elsewhere", "input") is None
    newer = {**directions(NAME), "protocol": "newer"}
    assert direction_facts([*bodies, newer], NAME, "input").protocol == "newer"


def test_directions_that_failed_are_told_until_they_are_there():
    failed = {"ok": False, "kind": "directions", "arguments": {"module": NAME, "side": "input"}, "error": "no room", "time": 2.0}
    assert direction_failure([failed], NAME, "input") == "no room"
    assert direction_failure([failed], NAME, "output") is None
    assert direction_failure([failed, directions(NAME)], NAME, "input") is None
    with pytest.raises(RunError, match="an answer"):
        direction_facts([{**directions(NAME), "directions": [{"number": "x"}]}], NAME, "input")


# energy


def test_the_band_of_a_type_is_the_quartiles_over_its_modules():
    result = spectra()
    band = energy_table.energy_band(result, "q_proj")
    assert len(band) == 200
    alike = [s for s in result if s.shape.kind == "q_proj"]
    row = band[(band["source"] == "features") & np.isclose(band["rank_share"], 0.25)].iloc[0]
    kept = [retained_energy(s.feature_eigenvalues)[HIDDEN // 4 - 1] for s in alike]
    assert [row["kept_low"], row["kept_median"], row["kept_high"]] == pytest.approx(list(np.quantile(kept, [0.25, 0.5, 0.75])))
    assert row["removed_median"] == pytest.approx(1 - np.median(kept))
    last = band[band["rank_share"] == 1.0]
    assert list(last["kept_median"]) == pytest.approx([1, 1])
    assert list(last["removed_high"]) == [0, 0]


def test_the_loss_beside_an_energy_is_the_nearest_that_was_measured():
    trials = [
        trial(0, {}, label="uniform", compression_ratio=0.4, value=0.9, kl=0.9),
        trial(1, {}, compression_ratio=0.402, value=0.7, kl=0.7),
        trial(2, {}, compression_ratio=0.4, value=0.8, kl=0.8),
        trial(3, {}, label="uniform", compression_ratio=0.2, value=0.1, kl=0.1),
        trial(4, {}, state="pruned", compression_ratio=0.5),
        trial(5, {}, state="running", compression_ratio=None),
    ]
    result = energy_table.measured_loss(trials, 0.55)
    assert result.kept == pytest.approx(0.598)
    assert list(result.frame["name"]) == ["Trial 1", "Uniform (trial 0)"]  # of the sampled ones the best
    assert "keep 55.0 % of the module's parameters" in result.sentence()
    assert "4.80 points away" in result.sentence()
    assert energy_table.measured_loss(trials, 1.4).asked == 1.0
    assert list(energy_table.measured_loss(trials, 0.9).frame["kl"]) == [0.1]
    assert energy_table.measured_loss(trials[4:], 0.5) is None


def test_over_a_range_of_ratios_the_loss_follows_the_rank():
    trials = read_trials(make_run(config=SearchConfig(0.2, max_ratio=0.6), study=write_front))
    near = [energy_table.measured_loss(trials, kept).frame["kl"].min() for kept in (0.8, 0.4)]
    assert near[0] < near[1]


# calibration


def test_inputs_stand_where_their_readers_are_with_their_condition_damped():
    result = spectra()
    facts = calibration_quality.calibration_facts(make_run())
    table = calibration_quality.input_table(facts, result, damping=0.01).set_index("input")
    assert len(table) == 4 * BLOCKS
    assert table.loc["1.attn", "kind"] == "q, k, v"
    assert table.loc["2.down", "depth"] == 2
    values = result[0].input_eigenvalues
    added = 0.01 * values.mean()
    assert table.loc["0.attn", "damped_condition"] == pytest.approx((values[0] + added) / (values[-1] + added))
    assert not table["thin"].any()
    assert calibration_quality.input_table(facts, result)["damped_condition"].isna().all()


def test_thin_inputs_are_marked():
    run = make_run()
    write_json(run.path / "calibration.json", calibration_json(tokens=7 * FFN))
    table = calibration_quality.input_table(calibration_quality.calibration_facts(run), spectra())
    assert set(table.loc[table["thin"], "kind"]) == {"down"}


def test_the_quality_map_can_be_picked_from_and_has_gaps():
    run = make_run()
    body = calibration_json()
    body["inputs"][0]["condition"] = None
    write_json(run.path / "calibration.json", body)
    facts = calibration_quality.calibration_facts(run)
    table = calibration_quality.input_table(facts, spectra())
    chosen = matrices()[1].name  # k of block 0 reads the first input
    view = calibration_quality.quality_map(facts, table, "condition", chosen)
    assert view.frame["module"][0] == chosen
    assert math.isnan(view.frame["value"][0])
    assert view.frame["label"][0] == "– not finite"
    assert view.frame["value"][1] == pytest.approx(4)  # log10
    assert view.kinds == ["q, k, v", "o", "gate, up", "down"]
    assert set(view.frame["module"]) <= {m.name for m in matrices()}
    assert len(KINDS) == 7


def test_protocols_tell_the_text_the_windows_and_the_dtype():
    run = make_run()
    assert spectra_protocol(run) == (
        "Model demo held as float32; python-stdlib, calibration split, context 32, BOS first in every window; 1,280 tokens; "
        "statistics in float64."
    )
    expected = "python-stdlib, validation split; 4 windows of 32 tokens, BOS first in every window; model demo held as float32."
    assert trial_protocol(run) == expected
    cheaper = make_run(config=SearchConfig(RATIO, top_k=16, autocast=True, trials=6))
    assert "held as bfloat16 (autocast); KL on the 16 likeliest tokens" in trial_protocol(cheaper)
