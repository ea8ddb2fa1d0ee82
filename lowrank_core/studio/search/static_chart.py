"""Charts of a search: declared once for page and report, and drawn with Plotly for pages without Streamlit."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from lowrank_core.studio.search.history import History, above
from lowrank_core.studio.search.pareto_chart import Front
from lowrank_core.studio.shared.chart_style import GREEN, ORANGE, TRIAL_MARKS, Chart, VegaChart, finished
from lowrank_core.studio.shared.trial_names import KINDS
from lowrank_core.studio.shared.vega import name_side

__all__ = ["front_declared", "front_figure", "history_declared", "history_figure"]

_HEIGHT = 400


def history_declared(view: History, live: VegaChart | None = None, protocol: str = "") -> Chart:
    """Return the objective of every trial, ``live`` where it moves."""
    return Chart(
        live or history_figure(view),
        view.trials,
        name="history",
        title="Every trial on search-validation text",
        how="lower is better; green steps are the best so far, dashed lines the baselines. Triangles that point down were stopped early "
        "and stand at the loss of the windows they saw; crosses failed, and stand above all others.",
        alt="Objective of each trial in trial order, with baselines and the best so far; the table of trials has the same",
        protocol=protocol,
    )


def front_declared(view: Front, live: VegaChart | None = None, protocol: str = "") -> Chart:
    """Return loss against compression ratio, ``live`` where it moves."""
    return Chart(
        live or front_figure(view),
        view.trials,
        name="front",
        title="Loss against compression ratio, on search-validation text",
        how="lower and further right is better. The green steps are the Pareto front. Dashed lines join the points of a baseline.",
        alt="Objective of each trial against the fraction of parameters it removes, with the Pareto front; the table below has the front",
        protocol=protocol,
    )


def history_figure(view: History) -> go.Figure:
    """Draw value against trial on a log scale: points by kind, the best so far as steps, baselines as dashed lines.

    A trial that was stopped early stands at the loss of the windows it saw; those without any (failed, running) above all others.
    """
    heights = view.trials["value"].fillna(view.trials["partial"])
    figure = go.Figure(_steps(view.trials["number"], view.trials["best"], "best so far", "hv"))
    _points(figure, view.trials.assign(across=view.trials["number"], height=heights.fillna(above(heights.dropna()))))
    _finish(figure, x="Trial (in trial order)", y=f"{view.objective}, log scale")
    _baselines(figure, view.baselines)
    figure.update_xaxes(rangemode="tozero", tickformat="d", showgrid=False)
    return figure


def front_figure(view: Front) -> go.Figure:
    """Draw value against the fraction removed: trials by kind, the Pareto front as steps, baselines joined by dashed lines."""
    figure = go.Figure(_steps(view.best["removed"], view.best["value"], "Pareto front", "vh"))
    for label, rows in view.baselines.groupby("label"):
        line = {"color": ORANGE, "width": 1.5, "dash": "dash"}
        figure.add_scatter(x=rows["removed"], y=rows["value"], mode="lines", line=line, name=html.escape(str(label)), hoverinfo="skip")
    _points(figure, view.trials.assign(across=view.trials["removed"], height=view.trials["value"]))
    _finish(figure, x="Fraction of parameters removed", y=f"{view.objective}, log scale")
    figure.update_xaxes(tickformat=".0%", showgrid=False)
    return figure


def _steps(x: pd.Series, y: pd.Series, name: str, shape: str) -> go.Scatter:
    return go.Scatter(x=x, y=y, mode="lines", line={"color": GREEN, "width": 2.5, "shape": shape}, name=name, hoverinfo="skip")


def _points(figure: go.Figure, rows: pd.DataFrame) -> None:
    """Add a trace for each kind present; ``rows`` has columns across, height, kind and note."""
    for kind in KINDS:
        alike = rows[rows["kind"] == kind]
        if len(alike):
            symbol, colour = TRIAL_MARKS[kind]
            figure.add_scatter(
                x=alike["across"],
                y=alike["height"],
                mode="markers",
                name=kind,
                marker={"symbol": symbol, "color": colour, "size": 10, "line": {"color": colour, "width": 1.2}},
                customdata=[[html.escape(str(note))] for note in alike["note"]],
                hovertemplate="%{customdata[0]}<extra></extra>",
            )


def _baselines(figure: go.Figure, values: Mapping[str, float]) -> None:
    """Draw a dashed line for each baseline; neighbouring labels alternate sides."""
    ordered = sorted(values.items(), key=lambda pair: pair[1])
    for position, (name, value) in enumerate(ordered):
        side = name_side(position, len(ordered))
        middle, above = side.endswith("left"), side == "above"  # baselines are the first trials: the left is taken
        figure.add_hline(y=value, line={"color": ORANGE, "width": 1.5, "dash": "dash"})
        figure.add_annotation(
            text=f"<b>{html.escape(str(name))} {value:.4g}</b>",
            x=0.5 if middle else 1,
            xref="x domain",
            y=math.log10(value) if value > 0 else 0.0,
            showarrow=False,
            xanchor="center" if middle else "right",
            yanchor="bottom" if above else "top",
            font={"color": ORANGE, "size": 11},
        )


def _finish(figure: go.Figure, *, x: str, y: str) -> None:
    finished(figure, height=_HEIGHT, x=x, y=y)
    figure.update_yaxes(type="log", exponentformat="power", nticks=8, tickformat="~g")
    figure.update_layout(showlegend=True, legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"})
