"""Figures as what they are made of: traces, axis titles, size."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from synthetic import make_run, matrices, priced_units, spectra, write_answers, write_front, write_rich_study

from lowrank_core.parameters import MatrixShape
from lowrank_core.spectra.spectrum import LayerSpectrum
from lowrank_core.studies.records import read_trials
from lowrank_core.studio.energy.energy_chart import band_figure, energy_figure, groups_figure, pooling_figure
from lowrank_core.studio.energy.energy_table import energy_band, energy_curves, pooling_curves
from lowrank_core.studio.overview.calibration_quality import calibration_facts, group_table
from lowrank_core.studio.search import history_chart as search
from lowrank_core.studio.search.history import history
from lowrank_core.studio.search.history_chart import history_chart
from lowrank_core.studio.search.pareto_chart import front, front_chart
from lowrank_core.studio.search.trial_windows_chart import window_chart, window_losses
from lowrank_core.studio.shared.allocation_map import allocation_map, allocation_of
from lowrank_core.studio.shared.chart_style import (
    BLUE,
    CONFIG,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    finished,
    legible,
    word_colour,
)
from lowrank_core.studio.shared.layer_map import layer_map
from lowrank_core.studio.shared.layer_map_chart import map_figure
from lowrank_core.studio.shared.module_choices import Choice, RunFacts
from lowrank_core.studio.shared.trial_names import KINDS
from lowrank_core.studio.shared.vega import VegaChart
from lowrank_core.studio.spectra.density import density
from lowrank_core.studio.spectra.depth_profile_chart import profile_figure
from lowrank_core.studio.spectra.spectrum_chart import density_figure, scree_figure
from lowrank_core.studio.spectra.spectrum_table import atlas, scree_curves

MEGABYTE = 1_000_000


def figures() -> dict[str, go.Figure]:
    run = make_run(state="running")
    write_answers(run)
    trials = read_trials(run)
    layer = spectra()[0]
    shapes = priced_units()
    entry = calibration_facts(run).input_of(layer.shape.name)
    return {
        "atlas": map_figure(atlas(spectra(), "stable_rank", "features", relative=False), layer.shape.name),
        "scree": scree_figure(scree_curves(layer)),
        "density of weights": density_figure(density(layer, "weights")),
        "density of features": density_figure(density(layer, "features")),
        "profile": profile_figure(atlas(spectra(), "alpha", "features", relative=False)),
        "band": band_figure(energy_band(spectra(), "q_proj"), "kept", 0.25),
        "band removed": band_figure(energy_band(spectra(), "q_proj"), "removed", 0.25),
        "retained": energy_figure(energy_curves(layer), "kept", 5),
        "left": energy_figure(energy_curves(layer), "removed", 5),
        "pooling": pooling_figure(pooling_curves(layer)),
        "groups": groups_figure(group_table(entry)),
        "allocation": map_figure(allocation_map(allocation_of(trials[3], shapes), shapes)),
    }


def words(figure: go.Figure) -> str:
    return " ".join(annotation.text for annotation in figure.layout.annotations)


def test_every_figure_has_axis_titles_a_fixed_height_and_keeps_zoom():
    for name, figure in figures().items():
        assert figure.layout.xaxis.title.text, name
        assert figure.layout.height, name
        assert figure.layout.uirevision == "constant", name
        assert figure.layout.yaxis.title.text or figure.layout.yaxis.ticktext or figure.data[0].orientation == "h", name


def test_axes_say_kept_and_removed():
    drawn = figures()
    assert "Retained" in drawn["retained"].layout.yaxis.title.text
    assert "Discarded" in drawn["left"].layout.yaxis.title.text
    assert "kept" in drawn["allocation"].data[0].colorbar.title.text


def test_plotly_shows_no_logo():
    assert CONFIG["displaylogo"] is False


def big_model(blocks: int, width: int) -> list[LayerSpectrum]:
    values = np.geomspace(1.0, 1e-4, width)
    return [
        LayerSpectrum(MatrixShape(f"model.layers.{depth}.mlp.{kind}", kind, depth, width, width), values, values, values, values)
        for depth in range(blocks)
        for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]


def test_no_figure_of_an_80_layer_model_is_above_a_megabyte():
    result = big_model(80, 4096)
    view = atlas(result, "rank_95", "features", relative=True)
    assert len(map_figure(view).to_json()) < MEGABYTE
    assert len(profile_figure(view).to_json()) < MEGABYTE
    for figure in (
        scree_figure(scree_curves(result[0])),
        density_figure(density(result[0], "weights")),
        band_figure(energy_band(result[:14], "q_proj"), "kept", 0.5),
        energy_figure(energy_curves(result[0]), "kept", 64),
        pooling_figure(pooling_curves(result[0])),
    ):
        assert len(figure.to_json()) < MEGABYTE / 10
        assert max(len(trace.x) for trace in figure.data) <= 200


def contrast(one: str, other: str) -> float:
    """WCAG 2.1: 21 for black on white, 1 for the same colour twice."""

    def light(colour: str) -> float:
        parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_words_of_every_colour_can_be_read_on_light_and_dark_pages():
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)
    for colour in (BLUE, SKY, GREEN, ORANGE, VERMILLION, PURPLE, GREY):
        assert min(contrast(word_colour(colour), page) for page in ("#FCFCFA", "#11161B")) > 3.2


def test_notes_take_the_colour_of_words_and_lines_keep_theirs():
    figure = finished(go.Figure(go.Scatter(y=[1, 2], line={"color": ORANGE})), height=100, x="x", y="y")
    figure.add_annotation(text="a", font={"color": ORANGE})
    figure.add_annotation(text="b")
    assert [note.font.color for note in legible(figure).layout.annotations] == [word_colour(ORANGE), None]
    assert figure.data[0].line.color == ORANGE


def test_long_titles_and_names_take_lines_that_a_narrow_window_holds():
    names = ["trial 3", "Preset: SVD-LLM in PIFA's storage"]
    figure = finished(go.Figure(go.Scatter(x=[1, 2], y=names)), height=100, x="Features, pooled: share of energy removed (log scale)", y="")
    figure.update_yaxes(type="category")
    drawn = legible(figure).layout
    assert drawn.xaxis.title.text == "Features, pooled: share of<br>energy removed (log scale)"
    assert list(drawn.yaxis.tickvals) == names
    assert list(drawn.yaxis.ticktext) == ["trial 3", "Preset: SVD-LLM in<br>PIFA's storage"]
    short = legible(finished(go.Figure(), height=100, x="Block (depth, from the embedding to the head)", y="")).layout
    assert short.xaxis.title.text == "Block (depth, from the embedding to the head)"


def test_the_map_can_be_picked_from_and_outlines_the_chosen_module():
    names = [m.name for m in matrices()]
    figure = map_figure(atlas(spectra(), "stable_rank", "weights", relative=True), names[8])
    cells, targets = figure.data
    assert cells.type == "heatmap"
    assert [row[0] for row in targets.customdata] == names
    (outline,) = figure.layout.shapes
    assert (outline.x0 + outline.x1) / 2 == pytest.approx(1)  # depth 1
    assert (outline.y0 + outline.y1) / 2 == pytest.approx(1)  # k_proj
    assert not map_figure(atlas(spectra(), "stable_rank", "weights", relative=True), "elsewhere").layout.shapes


def test_a_block_without_a_module_leaves_a_gap():
    shapes = [m for m in matrices() if not (m.kind == "v_proj" and m.depth == 1)]
    figure = map_figure(layer_map(shapes, [0.5] * len(shapes), [""] * len(shapes), "share", percent=True))
    assert math.isnan(figure.data[0].z[2][1])
    assert figure.data[0].text[2][1] == "–"
    assert figure.data[0].text[2][0] == "50"


def test_the_scree_is_on_log_axes_with_the_break_even_rank():
    layer = spectra()[0]
    figure = scree_figure(scree_curves(layer))
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert layer.shape.break_even_rank in [line.x0 for line in figure.layout.shapes]
    assert f"break-even rank {layer.shape.break_even_rank}" in words(figure)
    assert "weights" in words(figure)
    assert "features" in words(figure)


def test_marked_ranks_are_named_on_heights_of_their_own():
    layer = spectra()[0]
    facts = RunFacts("Trial 7", {layer.shape.name: Choice(0.4, 5, "rank 5")})
    figure = scree_figure(scree_curves(layer, facts))
    marks = [note for note in figure.layout.annotations if "rank" in note.text]
    assert len(marks) == 3
    assert len({note.y for note in marks}) == 3
    assert "Trial 7: rank 5" in words(figure)


def boxes(figure, width: float, height: float) -> dict[str, tuple[float, float, float, float]]:
    """Return label -> left, right, bottom and top on a plot of so many pixels, as fractions of it."""
    (low, high), (bottom, top) = figure.layout.xaxis.range, figure.layout.yaxis.range
    result = {}
    for text in figure.layout.annotations:
        at = text.x if text.xref == "paper" else (text.x - low) / (high - low)
        y = text.y if text.yref == "paper" else (text.y - bottom) / (top - bottom)
        lines = re.sub(r"</?b>", "", text.text).split("<br>")
        wide, tall = 6.2 * max(map(len, lines)) / width, 14 * len(lines) / height
        left, under = at - wide if text.xanchor == "right" else at, y - tall if text.yanchor == "top" else y
        result[text.text] = (left, left + wide, under, under + tall)
    return result


def crossed(figure, width: float, height: float) -> list[str]:
    """Return the labels that a dotted line runs through, or that stand on others."""
    low, high = figure.layout.xaxis.range
    found = boxes(figure, width, height)
    places = dict(found)
    for number, line in enumerate(figure.layout.shapes):
        x = ((math.log10(line.x0) if figure.layout.xaxis.type == "log" else line.x0) - low) / (high - low)
        places[f"line {number}"] = (x, x, line.y0, line.y1)
    slack = 2e-3
    return [
        name
        for name, (left, right, under, over) in found.items()
        for other, (start, end, foot, head) in places.items()
        if other != name and left < end - slack and start + slack < right and foot < over - slack and head > under + slack
    ]


@pytest.mark.parametrize("width", [270, 1000])
@pytest.mark.parametrize("rank", [2, 5, 9, 14])
def test_no_dotted_line_runs_through_a_label(width: int, rank: int):
    layer = spectra()[0]
    facts = RunFacts("Trial 7", {layer.shape.name: Choice(0.4, rank, f"rank {rank}")})
    assert crossed(scree_figure(scree_curves(layer, facts)), width, 360) == []
    for source in ("weights", "features"):
        assert crossed(density_figure(density(layer, source)), width, 270) == []
    assert crossed(energy_figure(energy_curves(layer), "kept", rank), width, 300) == []


def test_numbers_of_blocks_leave_room_for_each_other():
    shapes = [replace(matrices()[0], name=f"model.layers.{depth}.self_attn.q_proj", depth=depth) for depth in range(30)]
    view = layer_map(shapes, [0.5] * 30, [""] * 30, "share", percent=True)
    for figure in (map_figure(view), profile_figure(view)):
        assert list(figure.layout.xaxis.tickvals) == [0, 5, 10, 15, 20, 25]


def test_old_spectra_have_no_shuffled_curve_and_nothing_is_said_of_it():
    layer = spectra()[0]
    with_it, without = scree_figure(scree_curves(layer)), scree_figure(scree_curves(replace(layer, shuffled_singular_values=None)))
    assert len(with_it.data) == len(without.data) + 1
    assert "shuffled" in words(with_it)
    assert "shuffled" not in words(without)
    assert "Marchenko-Pastur" in words(without)


def test_lines_of_the_depth_profile_end_in_names_that_do_not_meet():
    view = layer_map(matrices(), [0.5] * len(matrices()), [""] * len(matrices()), "share", percent=True)
    figure = profile_figure(view)
    heights = sorted(note.y for note in figure.layout.annotations)
    assert len(heights) == 7
    low, high = figure.layout.yaxis.range
    assert min(np.diff(heights)) > 0.05 * (high - low)
    assert {trace.line.color for trace in figure.data} == {note.font.color for note in figure.layout.annotations}


def test_a_value_that_is_not_there_is_a_gap_of_the_depth_profile():
    values = [0.5] * len(matrices())
    values[7] = math.nan  # q of block 1
    figure = profile_figure(layer_map(matrices(), values, [""] * len(values), "share"))
    assert math.isnan(figure.data[0].y[1])
    nothing = profile_figure(layer_map(matrices(), [math.nan] * len(values), [""] * len(values), "share"))
    assert not nothing.layout.annotations


def test_a_module_without_energy_can_still_be_drawn():
    layer = spectra()[0]
    dead = replace(layer, feature_eigenvalues=np.zeros(layer.shape.max_rank), feature_eigenvalues_sample=np.zeros(layer.shape.max_rank))
    assert scree_figure(scree_curves(dead)).data
    assert energy_figure(energy_curves(dead), "removed", 1).data
    assert energy_figure(energy_curves(dead), "kept", 1).data
    assert pooling_figure(pooling_curves(dead)).data


def test_the_energy_charts_mark_the_rank():
    curves = energy_curves(spectra()[0])
    for figure in (energy_figure(curves, "kept", 7), energy_figure(curves, "removed", 7)):
        assert figure.layout.shapes[0].x0 == 7
        assert "rank 7" in words(figure)
    assert "100%" in figure.layout.xaxis.ticktext[-1]


def layers(chart: VegaChart, kind: str) -> list[dict]:
    return [layer for layer in chart.spec["layer"] if layer["mark"]["type"] == kind]


def test_states_of_trials_differ_without_colour():
    chart = history_chart(history(read_trials(make_run(state="running")), "kl"), 3)
    shape = layers(chart, "point")[0]["encoding"]["shape"]["scale"]
    assert len(set(shape["range"])) == len(shape["domain"])
    assert set(shape["domain"]) == set(KINDS)
    shown = chart.data.loc[chart.data["row"] == "trial", "kind"]
    assert list(shown) == ["baseline", "baseline", "sampled", "sampled", "failed", "sampled", "running"]
    assert set(shown) <= set(shape["domain"])


def test_a_trial_that_was_stopped_is_hollow_and_stands_at_the_loss_it_showed():
    chart = history_chart(history(read_trials(make_run(state="running", study=write_rich_study)), "kl"))
    fill = layers(chart, "point")[0]["encoding"]["fill"]["scale"]
    hollow = [kind for kind, colour in zip(fill["domain"], fill["range"], strict=True) if colour == "transparent"]
    assert hollow == ["stopped early"]
    rows = chart.data[chart.data["row"] == "trial"].set_index("kind")
    assert rows.loc["stopped early", "value"] == pytest.approx(0.9 * (0.8 + 0.4 * 2.5 / 7))
    assert rows.loc["running", "value"] > rows.loc["stopped early", "value"]


def test_three_baselines_are_named_on_different_sides():
    data = history_chart(history(read_trials(make_run(state="running", study=write_rich_study)), "kl")).data
    assert list(data.loc[data["row"] != "trial", "row"]) == ["below", "below left", "above"]


def test_the_front_is_drawn_in_steps_with_baselines_joined():
    trials = read_trials(make_run(state="running", study=write_front))
    chart = front_chart(front(trials, "kl"), 1)
    rows = chart.data.groupby("row").size()
    assert dict(rows) == {"baseline": 2, "front": 4, "name above": 1, "trial": 5}
    assert list(chart.data.loc[chart.data["chosen"].eq(True), "number"]) == [1]
    assert layers(chart, "line")[1]["mark"]["interpolate"] == "step-before"
    assert front_chart(front(trials[:1], "kl")).spec == chart.spec


def test_a_front_without_trials_can_be_drawn():
    assert front_chart(front([], "kl")).data.empty


def test_windows_stream_into_the_same_chart():
    trials = read_trials(make_run(state="running", study=write_rich_study))
    running, done = (window_chart(window_losses(result, None, "kl")) for result in (trials, trials[:4]))
    assert running.spec == done.spec
    shapes = {layer["mark"]["shape"] for layer in layers(running, "point")}
    assert shapes == {"circle", "stroke"}
    assert running.data["shown"].notna().sum() == 4


def test_of_very_many_trials_the_newest_and_the_best_have_pictures():
    count = 1000
    best = 5
    trials = pd.DataFrame({"number": range(count), "value": [0.0 if n == best else 1.0 + n for n in range(count)]})
    kept = search._affordable(trials, dict.fromkeys(range(count), "x" * 4000))
    assert sum(map(len, kept.values())) <= 400_000
    assert {best, 0, 1, count - 1, count - 30} <= set(kept)
    assert count // 2 not in kept
    assert len(search._affordable(trials, dict.fromkeys(range(count), "x"))) == count


def test_trials_without_a_value_are_drawn_above_all_others():
    data = history_chart(history(read_trials(make_run(state="running")), "kl")).data
    trials = data[data["row"] == "trial"].set_index("number")
    assert trials["value"][4] > 0.52  # failed
    assert trials["value"][6] > 0.52  # running
    assert trials["value"][2] == 0.52


def test_baselines_are_lines_with_names_that_do_not_meet():
    data = history_chart(history(read_trials(make_run()), "kl")).data
    named = data[data["row"] != "trial"].set_index("note")
    assert dict(named["row"]) == {"Uniform 0.41": "below", "LoRD, fixed ratios 0.44": "above"}
    assert list(named["value"]) == [0.41, 0.44]


def test_only_the_chosen_trial_has_a_ring():
    view = history(read_trials(make_run()), "kl")
    data = history_chart(view, 2).data
    assert list(data.loc[data["chosen"].eq(True), "number"]) == [2]
    assert not history_chart(view).data["chosen"].eq(True).any()


def test_more_trials_change_the_data_and_nothing_else():
    trials = read_trials(make_run())
    assert history_chart(history(trials[:1], "kl")).spec == history_chart(history(trials, "kl"), 3).spec


def test_a_history_with_nothing_complete_can_be_drawn():
    last = read_trials(make_run(state="running"))[-1]
    data = history_chart(history([last], "perplexity")).data
    assert list(data["kind"]) == ["running"]
    assert data["value"].notna().all()
