"""The Spectra and Feature energy pages: what they ask, what they show, what they say where something is missing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from synthetic import FFN, calibration_json, directions, make_run, model_json, spectra, write_sensitivity
from test_pages import charts, sound, words

from lowrank_core.config import to_mapping
from lowrank_core.config.directions import DirectionsConfig
from lowrank_core.runs import write_json
from lowrank_core.runs.client import pending_requests
from lowrank_core.spectra.spectrum import load_spectra, save_spectra
from lowrank_core.studio.shared.layer_map import LayerMap
from lowrank_core.studio.spectra.map_metrics import METRICS
from lowrank_core.studio.spectra.spectrum_table import atlas

NAME = "model.layers.1.mlp.up_proj"
NONE = np.zeros(0)


@pytest.mark.parametrize("metric", ["alpha", "outliers", "kept", "cost"])
def test_every_kind_of_metric_can_be_shown(app, metric):
    write_sensitivity(make_run())
    test = app("spectra")
    assert test.selectbox(key="metric").options == [result.label for result in METRICS.values()]
    test.selectbox(key="metric").set_value(metric).run()
    assert sound(test)
    assert METRICS[metric].label in words(test)
    assert len(charts(test)) == 5


def test_measured_losses_are_shown_at_the_ratio_that_is_chosen(app):
    cells = {(cell.name, cell.kept): cell for cell in write_sensitivity(make_run())}
    test = app("spectra", module=NAME)
    test.selectbox(key="metric").set_value("cost").run()
    assert test.selectbox(key="metric_kept").options == ["20 %", "50 %", "80 %"]
    for kept in (0.5, 0.2):
        test.selectbox(key="metric_kept").set_value(kept).run()
        assert sound(test)
        table = next(frame.value for frame in test.dataframe if "value" in frame.value)
        assert table.set_index("module")["value"][NAME] == cells[NAME, kept].kl


def test_without_a_trial_its_ranks_are_no_metric(app):
    make_run(search=False)
    test = app("spectra")
    assert METRICS["kept"].label not in test.selectbox(key="metric").options
    assert "Trial" not in words(test)


def test_a_metric_that_the_next_run_does_not_have_gives_way(app):
    older = make_run(search=False)
    newer = make_run()
    test = app("spectra", run=newer.id)
    test.selectbox(key="metric").set_value("kept").run()
    test.selectbox(key="run_picker").set_value(older.id).run()
    assert sound(test)
    assert "Effective rank of every module's features" in words(test)


def test_the_chosen_trials_rank_is_told_with_the_module(app):
    make_run()
    assert "Trial 3: " in words(app("spectra", trial="3", module=NAME))


def test_spectra_of_an_older_version_say_nothing_of_shuffling(app):
    run = make_run()
    assert "shuffled matrix" in words(app("spectra"))
    save_spectra(run.path / "spectra.npz", [replace(spectrum, shuffled_singular_values=None) for spectrum in spectra()])
    test = app("spectra")
    assert sound(test)
    assert "shuffled" not in words(test)


def test_directions_are_asked_for_and_shown(app, monkeypatch):
    monkeypatch.setattr("lowrank_core.runs.client._launch", lambda run: None)
    run = make_run(search=False)
    test = app("spectra", module=NAME)
    assert f"Not read yet for the input of `{NAME}`" in words(test)
    test.number_input(key="direction_count").set_value(3)
    test.button(key="find_directions").click().run()
    assert sound(test)
    (request,) = pending_requests(run)
    assert request["kind"] == "directions"
    assert request["arguments"] == to_mapping(DirectionsConfig(NAME, directions=3))
    write_json(run.path / "results" / f"{request['id']}.json", directions(NAME))
    test.run()
    table = next(frame.value for frame in test.dataframe if "projection" in frame.value)
    assert list(table["projection"]) == [7.5, -3.25, 7.5, -3.25]
    assert "calibration split: 4 windows of 32 tokens" in words(test)


def test_directions_that_failed_are_told_here_and_not_on_compare(app):
    run = make_run()
    arguments = {"module": NAME, "side": "input"}
    write_json(
        run.path / "results" / "9.json",
        {"ok": False, "kind": "directions", "arguments": arguments, "error": "the covariance is not finite", "time": 1.0},
    )
    test = app("spectra", module=NAME)
    assert [error.value for error in test.error] == ["The directions could not be read: the covariance is not finite"]
    assert not app("compare").error


def test_a_recorded_run_is_not_asked(app, tmp_path, monkeypatch):
    run = make_run(path=tmp_path / "recorded-run")
    write_json(run.path / "run.json", {**run.record, "recorded": True})
    monkeypatch.setattr("lowrank_core.studio.shared.run_list.recorded_run", lambda: run)
    test = app("spectra")
    assert sound(test)
    assert test.button(key="find_directions").disabled
    assert "recorded run has no worker" in test.button(key="find_directions").help
    assert "no text to show tokens from" in words(test)


def test_energy_stands_beside_a_measured_loss_or_says_that_there_is_none(app):
    make_run()
    test = app("energy")
    assert "Energy is not a loss. The factors at this rank keep" in words(test)
    table = next(frame.value for frame in test.dataframe if "kl" in frame.value)
    assert "Uniform (trial 0)" in list(table["name"])
    make_run(search=False)
    assert "this run has no measured loss yet" in words(app("energy"))


def test_the_energy_of_all_modules_of_a_type_is_a_band(app):
    make_run()
    test = app("energy", module=NAME)
    test.segmented_control(key="energy_scope").set_value("type").run()
    assert sound(test)
    assert "Energy kept, all 3 up modules" in words(test)
    assert len(charts(test)) == 5


def test_the_calibration_panel_tells_damping_and_thin_inputs(app):
    run = make_run()
    test = app("energy")
    assert "Damping in use 1e-06" in words(test)
    for quality in ("condition", "damped_condition", "pooled_to_sample"):
        test.selectbox(key="quality").set_value(quality).run()
        assert sound(test)
    write_json(run.path / "calibration.json", calibration_json(tokens=7 * FFN))
    assert "fewer than 8 tokens per dimension" in " ".join(warning.value for warning in app("energy").warning)
    make_run(search=False)
    test = app("energy")
    assert "Damping in use none" in words(test)
    assert "Condition number after damping" not in test.selectbox(key="quality").options


# --- experts ---------------------------------------------------------------------------------------------------------


def with_experts(run):
    """Give the run's second block a mixture: four experts in place of its feed-forward layer, one of which no token reached."""
    known = load_spectra(run.path / "spectra.npz")
    model = next(entry for entry in known if entry.shape.kind == "up_proj" and entry.shape.depth == 1)
    experts = []
    for number in range(4):
        shape = replace(model.shape, name=f"model.layers.1.mlp.experts.{number}.up", kind="experts.up", expert=number)
        experts.append(replace(model, shape=shape))
    save_spectra(run.path / "spectra.npz", [*known, *experts])
    body = run.part("calibration")
    entry = next(entry for entry in body["inputs"] if model.shape.name in entry["layers"])
    added = [{**entry, "input_group": s.shape.name, "layers": [s.shape.name], "group_tokens": [100.0 * s.shape.expert]} for s in experts]
    write_json(run.path / "calibration.json", {**body, "inputs": [*body["inputs"], *added]})
    return run


def test_a_mixture_is_one_cell_and_one_entry_and_its_experts_are_next_to_each_other(app):
    run = with_experts(make_run())
    view = atlas(load_spectra(run.path / "spectra.npz"), "effective_rank", "features", relative=True)
    cells = view.cells[view.cells["kind"] == "experts.up"]
    assert len(cells) == 1
    assert cells.iloc[0]["label"].startswith("4 experts: ")
    assert view.title == "Share of full rank (mean of experts)"
    assert replace(view, frame=view.frame[view.frame["kind"] != "experts.up"]).title == "Share of full rank"
    tokens = LayerMap("Tokens", view.frame.assign(value=range(len(view.frame))), of_experts="min")
    assert tokens.cells.set_index("kind").loc["experts.up", "value"] == len(view.frame) - 4
    test = app("spectra", run=run.id)
    test.selectbox(key="module_picker").set_value("model.layers.1.mlp.experts.0.up").run()
    assert sound(test)
    assert any("calibration routed 0 to 300 tokens to each, 1 of them none at all" in entry.value for entry in test.markdown)
    pick = next(box for box in test.selectbox if box.label == "Expert")
    assert len(pick.options) == 4
    pick.set_value("model.layers.1.mlp.experts.3.up").run()
    assert sound(test)
    assert test.query_params["module"] == "model.layers.1.mlp.experts.3.up"


def test_no_experts_are_shown_outside_a_mixture(app):
    test = app("spectra", run=make_run().id)
    assert not any(box.label == "Expert" for box in test.selectbox)
    assert not any("experts" in entry.value for entry in test.markdown)


def test_weights_are_shown_block_by_block_before_the_calibration_is_done(app):
    run = make_run(search=False, parts=False, state="running")
    write_json(run.path / "model.json", model_json())
    assert "This page fills in by itself" in words(app("spectra"))
    alone = [replace(s, feature_eigenvalues=NONE, feature_eigenvalues_sample=NONE, input_eigenvalues=NONE) for s in spectra()]
    save_spectra(run.path / "weight_spectra.npz", alone[:7])
    test = app("spectra")
    assert sound(test)
    assert f"Weights alone: 7 of {len(alone)} matrices" in words(test)
    assert "Effective rank of every module's weights" in words(test)
    assert "Features (outputs)" not in str(test.get("button_group"))
    assert "Known when the calibration is done." in words(test)
    save_spectra(run.path / "weight_spectra.npz", alone)
    assert f"Weights alone: {len(alone)} of {len(alone)} matrices" in words(app("spectra"))
    save_spectra(run.path / "spectra.npz", spectra())
    assert "Weights alone" not in words(app("spectra"))
    assert sound(app("energy"))
