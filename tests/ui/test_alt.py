"""Who can't see a chart is reported what it shows."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from routes import NAMES
from synthetic import make_run, write_answers, write_healing
from walking import charts, views

PAGES = Path(__file__).resolve().parents[2] / "pages"
DRAWING = {"altair_chart", "area_chart", "bar_chart", "line_chart", "plotly_chart", "pyplot", "scatter_chart", "vega_lite_chart"}


@pytest.mark.parametrize("page", NAMES)
def test_every_chart_has_an_alternative_text_of_its_own(app, page):
    run = make_run()
    write_answers(run)
    write_healing(run)
    test = app(page, run=run.id)
    for pressed in views(test):
        texts = [chart.proto.alt for chart in charts(test)]
        assert all(len(text) > 20 for text in texts), pressed
        assert len(set(texts)) == len(texts), pressed


def test_charts_are_drawn_in_one_place_which_asks_for_the_text():
    places = {}
    for path in PAGES.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
        if DRAWING & set(calls):
            places[path.name] = DRAWING & set(calls)
    assert places == {"charts.py": {"plotly_chart", "vega_lite_chart"}}


def test_every_table_says_what_it_holds():
    silent = []
    for path in PAGES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Call) and ast.unparse(node.func) in ("tables.table", "st.dataframe", "st.data_editor")
            if named and not any(keyword.arg == "alt" for keyword in node.keywords):  # type: ignore[union-attr]
                silent.append(f"{path.name}:{node.lineno}")  # type: ignore[attr-defined]
    assert silent == []
