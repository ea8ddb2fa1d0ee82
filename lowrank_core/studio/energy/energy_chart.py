"""Charts of retained and discarded energy, and of the effect of pooling."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lowrank_core.studio.energy.energy_table import EnergyCurves, PoolingCurves
from lowrank_core.studio.shared.chart_style import (
    BLUE,
    GREEN,
    GREY,
    SKY,
    VERMILLION,
    axis_note,
    direct_label,
    finished,
    log_rank_axis,
    log_value_axis,
)
from lowrank_core.types import Vector

__all__ = ["band_figure", "groups_figure", "left_figure", "pooling_figure", "retained_figure"]

_COLOURS = {"features": VERMILLION, "weights": BLUE}
_BANDS = {"features": "rgba(213,94,0,0.22)", "weights": "rgba(0,114,178,0.22)"}
_FLOOR = 1e-9  # energies below are rounding of the stored float32


def _both(figure: go.Figure, curves: EnergyCurves, features: Vector, weights: Vector, digits: str) -> None:
    for name, values, colour in (("features", features, VERMILLION), ("weights", weights, BLUE)):
        figure.add_scatter(
            x=curves.ranks,
            y=values,
            name=name,
            mode="lines",
            line={"color": colour, "width": 2.5},
            customdata=curves.ranks / curves.shape.max_rank,
            hovertemplate=f"rank %{{x}} (%{{customdata:.0%}} of full rank)<br>%{{y:{digits}}}<extra>{name}</extra>",
        )


def _rank_axes(figure: go.Figure, curves: EnergyCurves, rank: int, *, bottom: bool = False) -> None:
    """Mark the chosen and the break-even rank; put the share of full rank on the ticks."""
    full = curves.shape.max_rank
    ticks = [round(full * share) for share in (0, 0.25, 0.5, 0.75, 1)]
    figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick}<br>{tick / full:.0%}" for tick in ticks], range=[0, full * 1.01])
    axis_note(figure, f"rank {rank}", x=rank, position=rank, colour=GREEN, anchor="left" if rank < full * 0.8 else "right", bottom=bottom)


def retained_figure(curves: EnergyCurves, rank: int) -> go.Figure:
    """Draw the cumulative energy retained at each rank."""
    figure = go.Figure()
    _both(figure, curves, curves.features, curves.weights, ".2%")
    at = int(np.searchsorted(curves.ranks, curves.shape.max_rank * 0.4))
    upper, lower = ("features", "weights") if curves.features[at] >= curves.weights[at] else ("weights", "features")
    values, colours = {"features": curves.features, "weights": curves.weights}, {"features": VERMILLION, "weights": BLUE}
    x = float(curves.ranks[at])
    direct_label(figure, upper, x=x, y=float(values[upper][at]), colour=colours[upper], xanchor="left", yanchor="bottom")
    direct_label(figure, lower, x=x, y=float(values[lower][at]), colour=colours[lower], xanchor="left", yanchor="top")
    finished(figure, height=360, x="Rank, and its share of full rank", y="Retained energy")
    figure.update_yaxes(tickformat=".0%", range=[0, 1.12], tickvals=[0, 0.2, 0.4, 0.6, 0.8, 1])
    _rank_axes(figure, curves, rank, bottom=True)
    return figure


def left_figure(curves: EnergyCurves, rank: int) -> go.Figure:
    """Draw the energy discarded at each rank, on a log scale."""
    figure = go.Figure()

    def visible(values: Vector) -> Vector:
        return np.where(values > _FLOOR, values, np.nan)

    features, weights = visible(curves.features_left), visible(curves.weights_left)
    _both(figure, curves, features, weights, ".3g")
    at = int(np.searchsorted(curves.ranks, curves.shape.max_rank * 0.55))
    for name, values, other, colour in (("features", features, weights, VERMILLION), ("weights", weights, features, BLUE)):
        if values[at] > 0:
            upper = not values[at] < other[at]
            direct_label(
                figure,
                name,
                x=float(curves.ranks[at]),
                y=float(np.log10(values[at])),
                colour=colour,
                xanchor="left" if upper else "right",
                yanchor="bottom" if upper else "top",
            )
    finished(figure, height=360, x="Rank, and its share of full rank", y="Discarded energy (log scale)")
    log_value_axis(figure)
    _rank_axes(figure, curves, rank)
    return figure


def band_figure(band: pd.DataFrame, what: str, rank_share: float) -> go.Figure:
    """Draw median and quartiles of the energy over a module type (``energy_band``); ``what`` is ``kept`` or ``removed``."""
    figure, removed = go.Figure(), what == "removed"
    middles = {}
    for source, colour in _COLOURS.items():
        rows = band[band["source"] == source]
        _band(figure, rows, what, source, colour)
        middles[source] = (float(rows[f"{what}_median"].iloc[len(rows) * 2 // 5]), float(rows["rank_share"].iloc[len(rows) * 2 // 5]))
    upper = max(middles, key=lambda source: middles[source])
    for source, (value, at) in middles.items():
        left = (source == upper) != removed
        xanchor, yanchor = "right" if left else "left", "bottom" if source == upper else "top"
        y = float(np.log10(max(value, _FLOOR))) if removed else value
        direct_label(figure, source, x=at, y=y, colour=_COLOURS[source], xanchor=xanchor, yanchor=yanchor)
    axis = "Discarded energy (log scale)" if removed else "Retained energy"
    finished(figure, height=360, x="Rank, as a share of full rank", y=axis)
    figure.update_xaxes(range=[0, 1.01], tickformat=".0%")
    if removed:
        log_value_axis(figure)
    else:
        figure.update_yaxes(tickformat=".0%", range=[0, 1.12], tickvals=[0, 0.2, 0.4, 0.6, 0.8, 1])
    anchor = "left" if rank_share < 0.8 else "right"
    note = f"{rank_share:.0%} of full rank"
    axis_note(figure, note, x=rank_share, position=rank_share, colour=GREEN, anchor=anchor, bottom=not removed)
    return figure


def _band(figure: go.Figure, rows: pd.DataFrame, what: str, source: str, colour: str) -> None:
    """Draw quartiles as a band with the median; energies at rounding level are gaps."""
    parts = [rows[f"{what}_{part}"].to_numpy() for part in ("low", "median", "high")]
    low, median, high = (np.where(values > _FLOOR, values, np.nan) for values in parts)
    x = rows["rank_share"].to_numpy()
    figure.add_scatter(x=x, y=low, mode="lines", line={"width": 0}, hoverinfo="skip")
    figure.add_scatter(x=x, y=high, mode="lines", line={"width": 0}, fill="tonexty", fillcolor=_BANDS[source], hoverinfo="skip")
    hover = "%{x:.0%} of full rank<br>median %{y:.3g}, quartiles %{customdata[0]:.3g} to %{customdata[1]:.3g}<extra>" + source + "</extra>"
    line = {"color": colour, "width": 2.5}
    figure.add_scatter(x=x, y=median, mode="lines", line=line, customdata=np.column_stack([low, high]), hovertemplate=hover)


def pooling_figure(curves: PoolingCurves) -> go.Figure:
    """Draw √ eigenvalues of the pooled and of the sample covariance on one scale."""
    figure = go.Figure()
    for name, values, colour, width in (("sample covariance", curves.sample, SKY, 7), ("pooled covariance", curves.pooled, VERMILLION, 2)):
        figure.add_scatter(
            x=curves.ranks,
            y=values,
            name=name,
            mode="lines",
            line={"color": colour, "width": width},
            hovertemplate="rank %{x}<br>%{y:.3g}<extra>" + name + "</extra>",
        )
    finished(figure, height=320, x="Rank (log scale)", y="√ eigenvalue (log scale)")
    figure.update_layout(showlegend=True, legend={"x": 0.02, "y": 0.04, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"})
    log_rank_axis(figure, int(curves.ranks[-1]))
    log_value_axis(figure)
    return figure


def groups_figure(groups: pd.DataFrame) -> go.Figure:
    """Draw the trace of each group's covariance relative to the mean of groups (``group_table``)."""
    deviation = (groups["relative"] - 1).to_numpy()
    figure = go.Figure(
        go.Bar(
            x=groups["group"],
            y=deviation,
            marker={"color": GREEN},
            customdata=groups[["tokens"]].to_numpy(),
            hovertemplate="group %{x}, %{customdata[0]:,} tokens<br>%{y:+.2%} from the mean trace<extra></extra>",
        )
    )
    figure.add_hline(y=0, line={"color": GREY, "width": 1.5})
    finished(figure, height=320, x="Group of calibration windows", y="Variance, from the mean of groups")
    figure.update_xaxes(dtick=max(1, len(groups) // 12), ticks="")
    largest = max(0.01, float(np.abs(deviation).max()) if len(groups) else 0.0)
    figure.update_yaxes(tickformat="+.1~%", range=[-1.15 * largest, 1.15 * largest])
    return figure
