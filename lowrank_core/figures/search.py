"""A rank search as it streams in."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lowrank_core.figures.style import BLUE, GREEN, GREY, ORANGE, VERMILLION, finished
from lowrank_core.views.search import History

__all__ = ["history_figure"]

_BASELINES = ("uniform", "lord_manual")
_WITHOUT_VALUE = {"running": ("hourglass", BLUE), "waiting": ("circle-open", GREY), "failed": ("x", VERMILLION), "pruned": ("triangle-down-open", ORANGE)}
"""State -> symbol and colour; told apart without the colour."""


def history_figure(view: History, chosen: int | None = None) -> go.Figure:
    """Draw value against trial: points by state, the best so far as steps, baselines as dashed lines with their names."""
    figure = go.Figure()
    trials = view.trials
    complete = trials[trials["state"] == "complete"]
    _best_line(figure, trials)
    _points(figure, complete[~complete["label"].isin(_BASELINES)], "sampled trial", "circle", BLUE)
    _points(figure, complete[complete["label"].isin(_BASELINES)], "baseline", "diamond", ORANGE)
    for state, (symbol, colour) in _WITHOUT_VALUE.items():
        _lane(figure, trials[(trials["state"] == state) & trials["value"].isna()], _above(complete["value"]), state, symbol, colour)
    _baselines(figure, view)
    _chosen(figure, complete[complete["number"] == chosen])
    finished(figure, height=400, x="Trial (in the order of asking)", y=f"{view.objective}, log scale", right=150, top=34)
    _axes(figure, len(trials))
    return figure


def _axes(figure: go.Figure, trials: int) -> None:
    figure.update_layout(
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
        dragmode="pan",
        clickmode="event+select",
    )
    figure.update_xaxes(range=[-0.6, max(9.6, trials - 0.4)], dtick=max(1, 5 * round(trials / 60)) if trials > 20 else 1)
    figure.update_yaxes(type="log", tickformat=".3~g", nticks=8)


def _points(figure: go.Figure, rows: pd.DataFrame, name: str, symbol: str, colour: str) -> None:
    figure.add_scatter(
        x=rows["number"].to_numpy(),
        y=rows["value"].to_numpy(),
        name=name,
        mode="markers",
        marker={"symbol": symbol, "size": 10, "color": colour, "line": {"width": 1, "color": "rgba(255,255,255,0.7)"}},
        selected={"marker": {"opacity": 1}},
        unselected={"marker": {"opacity": 1}},
        customdata=rows[["number", "note"]].to_numpy(),
        hovertemplate="%{customdata[1]}<extra></extra>",
    )


def _above(values: pd.Series) -> float:
    """Return a height above all ``values`` on a log axis, where trials without a value are drawn."""
    if values.empty:
        return 1.0
    return float(values.max() * max(1.08, (values.max() / values.min()) ** 0.12))


def _lane(figure: go.Figure, rows: pd.DataFrame, height: float, state: str, symbol: str, colour: str) -> None:
    """Draw trials without a value above the others; nothing if there are none."""
    if rows.empty:
        return
    figure.add_scatter(
        x=rows["number"].to_numpy(),
        y=np.full(len(rows), height),
        name=state,
        mode="markers",
        marker={"symbol": symbol, "size": 11, "color": colour, "line": {"width": 1.5, "color": colour}},
        selected={"marker": {"opacity": 1}},
        unselected={"marker": {"opacity": 1}},
        customdata=rows[["number", "note"]].to_numpy(),
        hovertemplate="%{customdata[1]}<extra></extra>",
    )


def _best_line(figure: go.Figure, trials: pd.DataFrame) -> None:
    figure.add_scatter(
        x=trials["number"].to_numpy(),
        y=trials["best"].to_numpy(),
        name="best so far",
        mode="lines",
        line={"color": GREEN, "width": 2.5, "shape": "hv"},
        hoverinfo="skip",
    )


def _baselines(figure: go.Figure, view: History) -> None:
    """Draw each baseline as a dashed line; labels that would overlap are moved apart."""
    ordered = sorted(view.baselines.items(), key=lambda pair: pair[1])
    for position, (name, value) in enumerate(ordered):
        figure.add_shape(type="line", xref="paper", x0=0, x1=1, y0=value, y1=value, line={"color": ORANGE, "width": 1.5, "dash": "dash"})
        figure.add_annotation(
            text=f"{name}<br>{value:.4g}",
            xref="paper",
            x=1,
            y=np.log10(value),
            xanchor="left",
            xshift=6,
            yanchor="top" if position == 0 else "bottom",
            showarrow=False,
            align="left",
            font={"size": 11, "color": ORANGE},
        )


def _chosen(figure: go.Figure, rows: pd.DataFrame) -> None:
    if rows.empty:
        return
    figure.add_scatter(
        x=rows["number"].to_numpy(),
        y=rows["value"].to_numpy(),
        name="chosen",
        mode="markers",
        marker={"symbol": "circle-open", "size": 18, "color": VERMILLION, "line": {"width": 2.5, "color": VERMILLION}},
        hoverinfo="skip",
    )
