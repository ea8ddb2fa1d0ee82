"""What the figures of the Compare page draw."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from synthetic import comparison
from synthetic_answers import detailed, on_other_text, speed_answer, tokens_answer

from lowrank_core.studio.compare.comparison import comparisons, other_texts
from lowrank_core.studio.compare.comparison_chart import difference_figure, ratio_figure, speedup_figure
from lowrank_core.studio.compare.loss_details import difference_table, position_table, window_table
from lowrank_core.studio.compare.loss_details_chart import histogram_figure, position_figure, scatter_figure
from lowrank_core.studio.compare.measured_speed import speeds, speedup_table
from lowrank_core.studio.compare.second_text import other_text
from lowrank_core.studio.compare.token_losses import strip_html, strips


def differences(values: list[float]) -> pd.DataFrame:
    rows = {"name": [f"model {index}" for index in range(len(values))], "kind": "rule", "difference": values}
    return pd.DataFrame(rows | {"low": [0.9 * value for value in values], "high": [1.1 * value for value in values], "removed": 0.4})


def figures():
    result = comparisons([detailed(comparison("trial 3", 3, 3.2)), comparison("uniform", "uniform", 3.4)])
    windows = window_table(result[0])
    view = other_text(result, other_texts([on_other_text("uniform", "uniform", 3.5)])["file:/data/notes.txt"])
    return {
        "differences": difference_figure(difference_table(result), 20.0),
        "ratios": ratio_figure(view.frame, view.own, view.other),
        "speedups": speedup_figure(speedup_table(speeds([speed_answer()]))),
        "scatter": scatter_figure(windows),
        "histogram": histogram_figure(windows),
        "positions": position_figure(position_table(result[0])),
    }


def test_every_figure_names_its_axis_and_keeps_its_zoom():
    for name, figure in figures().items():
        assert figure.layout.xaxis.title.text, name
        assert figure.layout.height, name
        assert figure.layout.uirevision == "constant", name
        assert "NaN" not in figure.to_json(), name


def test_a_chart_of_one_row_has_room_for_its_axis_title():
    one, two = (difference_figure(differences(values), 20.0) for values in ([0.5], [0.5, 2.0]))
    assert one.layout.height == two.layout.height >= 150
    assert figures()["ratios"].layout.height >= 174  # a legend stands above it


def test_differences_of_like_sizes_are_drawn_as_they_are():
    figure = difference_figure(differences([0.5, 2.0]), 20.0)
    (dots,) = figure.data
    assert list(dots.x) == [0.5, 2.0]
    assert list(dots.error_x.array) == pytest.approx([0.05, 0.2])
    assert "logarithmic" not in figure.layout.xaxis.title.text
    assert figure.layout.annotations[0].text == "Dense, 20"


def test_an_axis_that_spans_magnitudes_says_so_and_marks_true_values():
    figure = difference_figure(differences([-0.01, 0.05, 300.0]), 20.0)
    (dots,) = figure.data
    assert list(np.diff(dots.x) > 0) == [True, True]
    assert "logarithmic away from zero" in figure.layout.xaxis.title.text
    ticks = dict(zip(figure.layout.xaxis.ticktext, figure.layout.xaxis.tickvals, strict=True))
    assert ticks["0"] == 0.0
    assert ticks["+100"] == pytest.approx(np.arcsinh(100 / 0.01))
    assert dots.x[2] > ticks["+100"]


def test_a_missing_interval_has_no_width():
    table = differences([1.0]).assign(low=float("nan"), high=float("nan"))
    (dots,) = difference_figure(table, 20.0).data
    assert list(dots.error_x.array) == list(dots.error_x.arrayminus) == [0.0]


def test_a_histogram_counts_every_window():
    (bars,) = figures()["histogram"].data
    assert sum(bars.y) == 4


def test_the_strip_escapes_its_text_and_colours_both_ways():
    hostile = "<script>alert('x')</script>"
    (strip,) = strips([tokens_answer(pieces=["a", hostile, ' "onload=', "&amp;", ":\n"])])
    result = strip_html(strip)
    assert "<script" not in result
    assert "&lt;script&gt;alert(" in result
    assert 'title="' in result
    assert ' "onload=' not in result
    assert "&amp;amp;" in result
    assert "213, 94, 0" in result.split("</div>")[1]  # a token that lost
    assert "0, 114, 178" in result.split("</div>")[1]  # one that won
    assert "⏎\n" in result
