"""Sensitivities as tables: every measured cell once, gaps as gaps, correlations as scipy finds them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from synthetic import make_run, matrices, spectra, text_json, write_sensitivity

from lowrank_core.config import CompressionConfig, SearchConfig
from lowrank_core.errors import RunError
from lowrank_core.presets.recipes import preset_named
from lowrank_core.runs import Run, write_json
from lowrank_core.sensitivity.config import SensitivityConfig
from lowrank_core.sensitivity.records import SensitivityRecord, append_cell, read_records, record_path
from lowrank_core.studio.energy.energy_table import energy_at_rank
from lowrank_core.studio.sensitivity import sensitivity_table as views
from lowrank_core.studio.sensitivity.sensitivity_chart import depth_figure, scatter_figure, types_figure
from lowrank_core.studio.sensitivity.sensitivity_plan import plan_of, usual_compression
from lowrank_core.studio.shared.layer_map_chart import map_figure

TYPES, MODULES = 7, len(matrices())
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def run() -> Run:
    run = make_run(search=False)
    write_sensitivity(run)
    return run


def record_of(run: Run) -> SensitivityRecord:
    (record,) = read_records(run)
    return record


def test_every_cell_is_a_row_with_its_protocol(run: Run):
    record = record_of(run)
    table = views.cell_table(record, matrices(), spectra())
    assert len(table) == len(record.cells) == 3 * (TYPES + MODULES)
    assert table["kl"].to_list() == [cell.kl for cell in record.cells]
    assert set(table["windows"]) == {4}
    assert set(table["tokens"]) == {124}
    assert views.measured_ratios(table) == views.measured_ratios(table, "type") == [0.2, 0.5, 0.8]
    row = table[(table["name"] == UP) & (table["kept"] == 0.5)].iloc[0]
    assert (row["kind"], row["depth"]) == ("up_proj", 1)
    assert row["kept_share"] <= 0.5


def test_estimates_are_the_energies_that_the_rank_removes(run: Run):
    table = views.cell_table(record_of(run), matrices(), spectra())
    row = table[(table["name"] == UP) & (table["kept"] == 0.5)].iloc[0]
    spectrum = next(spectrum for spectrum in spectra() if spectrum.shape.name == UP)
    at = energy_at_rank(spectrum, int(row["rank"]))
    assert row["features_pooled"] == pytest.approx(at.features_left)
    assert row["weights"] == pytest.approx(at.weights_left)
    assert row["features_absolute"] == pytest.approx(at.features_left * spectrum.feature_eigenvalues.sum())
    sample = spectrum.feature_eigenvalues_sample
    assert row["features_sample"] == pytest.approx(1 - sample[: row["rank"]].sum() / sample.sum())
    assert row["predicted"] == pytest.approx(2 * row["kl"])
    assert np.isnan(table[table["scope"] == "type"]["weights"]).all()


def test_the_map_has_what_was_measured_and_gaps_elsewhere():
    run = make_run(search=False)
    write_sensitivity(run, cells=TYPES + 5)
    cells = views.cell_table(record_of(run), matrices())
    view = views.sensitivity_map(cells, matrices(), 0.5)
    assert view.log
    assert np.isfinite(view.frame["value"]).sum() == 5
    assert view.frame["label"].to_list()[-1] == "not measured"
    assert (view.low, view.high) == (view.frame["value"].min(), view.frame["value"].max())
    assert np.nanmax(map_figure(view).data[0].z) == pytest.approx(np.log10(view.high))
    assert views.coverage(cells, matrices(), 0.5) == f"5 of {MODULES} modules measured."
    assert views.measured_ratios(cells) == [0.5]


def test_what_is_no_number_on_a_log_scale_is_told_and_not_drawn(run: Run):
    record = record_of(run)
    first, second, *rest = (cell for cell in record.cells if cell.scope == "module" and cell.kept == 0.5)
    odd = replace(record, cells=(replace(first, kl=-1e-12), replace(second, kl=None, kl_stderr=None, error="diverged"), *rest))
    cells = views.cell_table(odd, matrices(), spectra())
    words = views.coverage(cells, matrices(), 0.5)
    assert words.startswith(f"{MODULES} of {MODULES} modules measured, 1 diverged, 1 below 1e-09 nats")
    view = views.sensitivity_map(cells, matrices(), 0.5)
    assert np.isnan(view.frame["value"][:2]).all()
    assert "diverged" in view.frame["label"][1]
    assert cells["kl"].iloc[0] == -1e-12
    assert views.correlations(cells, 0.5).set_index("estimate").loc["predicted", "n"] == MODULES - 1


def test_curves_are_the_cells_in_order(run: Run):
    cells = views.cell_table(record_of(run), matrices())
    types = views.type_curves(cells)
    assert len(types) == 3 * TYPES
    for _, rows in types.groupby("kind"):
        assert rows["kept_share"].is_monotonic_increasing
    assert views.module_curve(cells, UP)["kept"].to_list() == [0.2, 0.5, 0.8]
    depth = views.depth_curves(cells, "up_proj")
    assert depth["depth"].to_list() == [0, 1, 2] * 3
    assert depth["kept"].is_monotonic_increasing
    assert len(types_figure(types, views.module_curve(cells, UP), sorted(set(types["kind"]))).data) == TYPES + 1
    chosen = next(matrix for matrix in matrices() if matrix.name == UP)
    assert [trace.name for trace in depth_figure(depth, ["up_proj"], chosen, 3).data] == ["20% kept", "50% kept", "80% kept"]


@pytest.mark.parametrize("heights", [[1.0, 1.0, 1.0], [3.0, 1.0, 1.01, 5.0], [2.0], [1.0, 1.05, 1.1, 1.15]])
def test_labels_keep_their_order_and_their_distance(heights: list[float]):
    cells = pd.DataFrame({"kind": [f"t{i}" for i in range(len(heights))], "shown": [10.0**h for h in heights], "kept_share": 0.5})
    figure = types_figure(cells.assign(rank=1, kl_stderr=0.1, name="t"), cells.iloc[:0], list(cells["kind"]))
    written = {label.text: float(label.y) for label in figure.layout.annotations}
    places = [written[f"<b>all t{i}</b>"] for i in range(len(heights))]
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    low, high = figure.layout.yaxis.range
    assert all(places[b] - places[a] > 0.05 * (high - low) for a, b in pairwise(order))
    assert np.mean(places) == pytest.approx(np.mean(heights), abs=0.2 * (high - low))


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_scipy_s(ties: bool):
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((2, 40))
    if ties:
        x, y = x.round(), (x + y).round()
    assert views.spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert views.spearman(x, np.exp(x)) == pytest.approx(1)
    assert views.spearman(x, -x) == pytest.approx(-1)


def test_spearman_of_too_little_is_nothing():
    assert views.spearman(np.array([1.0, 2.0]), np.array([1.0, 2.0])) is None
    assert views.spearman(np.ones(5), np.arange(5.0)) is None


def test_correlations_say_over_how_many(run: Run):
    cells = views.cell_table(record_of(run), matrices(), spectra())
    result = views.correlations(cells, 0.5).set_index("estimate")
    here = views.at_ratio(cells, 0.5)
    assert result.loc["predicted", "rho"] == pytest.approx(1)  # twice the measured one
    assert result.loc["weights", "rho"] == pytest.approx(spearmanr(here["kl"], here["weights"]).statistic)
    assert set(result["n"]) == {MODULES}
    assert set(result["n_all"]) == {3 * MODULES}
    assert views.rho_words(0.5, 3) == "Spearman's ρ = 0.50 over 3 modules: few modules, so ρ is unreliable"
    assert views.rho_words(None, 21) == "Spearman's ρ = – over 21 modules"
    assert list(views.correlations(views.cell_table(record_of(run), matrices()), 0.5)["estimate"]) == ["predicted"]
    figure = scatter_figure(here, views.ESTIMATES["predicted"], list(dict.fromkeys(here["kind"])), UP)
    assert sum(len(trace.x) for trace in figure.data if trace.mode == "markers") == MODULES


def test_measured_values_for_other_pages(run: Run):
    result = views.measured_costs(run)
    assert list(result) == [0.2, 0.5, 0.8]
    assert set(result[0.5]) == {matrix.name for matrix in matrices()}
    assert result[0.5][UP] == pytest.approx(1e-3 * 0.25 * 2)
    assert views.measured_costs(make_run(search=False)) == {}


def test_the_ratio_shown_first_is_the_one_with_the_most_modules():
    assert views.fullest({0.2: {"a": 1.0, "b": 1.0}, 0.5: {"a": 1.0}, 0.8: {"a": 1.0}}) == 0.2
    assert views.fullest({0.2: {"a": 1.0}, 0.6: {"a": 1.0}, 0.8: {"a": 1.0}}) == 0.6
    assert views.fullest({}) is None


def test_a_damaged_record_is_an_error_that_says_what_to_do(run: Run):
    (path,) = (run.path / "sensitivity").iterdir()
    path.write_text("nonsense\n")
    with pytest.raises(RunError, match=r"damaged in line 1: .*Delete the file"):
        views.measured_costs(run)


def test_a_plan_counts_what_is_left_and_what_it_takes():
    run = make_run(search=False)
    config = SensitivityConfig(kept=(0.2, 0.5, 0.8), windows=4, basis="two_sided")
    empty = plan_of(run, matrices(), config)
    assert (empty.cells, empty.missing, empty.seconds) == (3 * (TYPES + MODULES), 3 * (TYPES + MODULES), None)
    write_sensitivity(run, cells=10)
    begun = plan_of(run, matrices(), config)
    assert begun.missing == begun.cells - 10
    assert begun.seconds == pytest.approx(0.5 * begun.missing)
    assert plan_of(run, matrices(), replace(config, windows=2)).missing == empty.cells  # other windows are measured again
    assert plan_of(run, matrices(), replace(config, windows=2)).seconds == pytest.approx(0.25 * empty.cells)


def test_a_plan_does_not_count_what_another_damping_gave():
    compression = CompressionConfig(basis="two_sided", input_damping=1e-3)
    run = make_run(config=SearchConfig(0.3, compression=compression))
    config = SensitivityConfig(kept=(0.2, 0.5, 0.8), windows=4, storage="factored")
    write_sensitivity(run, cells=10)  # at the usual damping
    plan = plan_of(run, matrices(), config)
    assert plan.missing == plan.cells


def test_a_plan_takes_no_more_windows_than_the_text_holds():
    run = make_run()
    text = text_json()
    text["splits"]["validation"]["windows"] = 3
    write_json(run.path / "text.json", text)
    assert plan_of(run, matrices(), SensitivityConfig(kept=(0.5,), scopes=("type",))).windows == 3


def test_a_plan_goes_by_the_trials_before_there_are_cells():
    run = make_run()
    plan = plan_of(run, matrices(), SensitivityConfig(kept=(0.5,), scopes=("type",)))
    assert plan.source == "the trials of this run"
    assert plan.seconds == pytest.approx(1.5 / 128 * plan.tokens * TYPES)


def test_factors_are_those_of_the_run_s_search_one_by_one():
    run = make_run(config=SearchConfig(0.3, variables="error_weight", compression=preset_named("studio").compression))
    usual = usual_compression(run)
    assert (usual.basis, usual.storage, usual.stacks, usual.heads) == ("two_sided", "pivoted", False, False)


def test_the_newest_record_is_first_and_records_do_not_mix(run: Run):
    record = record_of(run)
    other = replace(record.setting, windows=2)
    append_cell(record_path(run, other), other, record.cells[0])
    assert {len(result.cells) for result in read_records(run)} == {1, len(record.cells)}
