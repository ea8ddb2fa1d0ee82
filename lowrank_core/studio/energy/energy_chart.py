"""Charts of retained and discarded energy, and of the effect of pooling."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

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

__all__ = ["band_figure", "energy_figure", "groups_figure", "pooling_figure"]

_COLOURS = {"features": VERMILLION, "weights": BLUE}
_BANDS = {"features": "rgba(213,94,0,0.22)", "weights": "rgba(0,114,178,0.22)"}
_FLOOR = 1e-9  # energies below are rounding of the stored float32
_NAMED_AT = {"kept": (0.4, 0.75, 0.3), "removed": (0.55, 0.25, 0.8)}
"""Places where curves are named, as shares of full rank: the first that is far enough from the marked rank for its line to pass by."""
_NAME_ROOM = 0.25
_TOP = 1.12  # of the axis of retained energy, with the upper name


def energy_figure(curves: pd.DataFrame, what: str, rank: int) -> go.Figure:
    """Draw the energy of features and weights at each rank (``energy_curves``); ``what`` is ``kept`` or ``removed``."""
    figure, full = go.Figure(), int(curves["rank"].iloc[-1])
    at = int(np.searchsorted(curves["rank"], full * _named_at(what, rank / full)))
    names = {}
    for source, colour in _COLOURS.items():
        values = _drawn(curves[f"{source}_{what}"].to_numpy(), what)
        names[source] = (float(values[at]), float(curves["rank"].iloc[at]))
        hover = f"rank %{{x}} (%{{customdata:.0%}} of full rank)<br>%{{y:{'.2%' if what == 'kept' else '.3g'}}}<extra>{source}</extra>"
        line, shares = {"color": colour, "width": 2.5}, curves["rank"] / full
        figure.add_scatter(x=curves["rank"], y=values, name=source, mode="lines", line=line, customdata=shares, hovertemplate=hover)
    _names(figure, names, what)
    ticks = [round(full * share) for share in (0, 0.25, 0.5, 0.75, 1)]
    _axes(figure, what, "Rank, and its share of full rank")
    figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick}<br>{tick / full:.0%}" for tick in ticks], range=[0, full * 1.01])
    _mark(figure, what, rank, f"rank {rank}", left=rank < full * 0.8)
    return figure


def band_figure(band: pd.DataFrame, what: str, rank_share: float) -> go.Figure:
    """Draw median and quartiles of the energy over a module type (``energy_band``); ``what`` is ``kept`` or ``removed``."""
    figure, names = go.Figure(), {}
    for source, colour in _COLOURS.items():
        rows = band[band["source"] == source]
        _band(figure, rows, what, source, colour)
        at = rows.iloc[round((len(rows) - 1) * _named_at(what, rank_share))]
        names[source] = (max(float(at[f"{what}_median"]), _FLOOR), float(at["rank_share"]))
    _names(figure, names, what)
    _axes(figure, what, "Rank, as a share of full rank")
    figure.update_xaxes(range=[0, 1.01], tickformat=".0%")
    _mark(figure, what, rank_share, f"{rank_share:.0%} of full rank", left=rank_share < 0.8)
    return figure


def _named_at(what: str, marked: float) -> float:
    places = _NAMED_AT[what]
    return next((place for place in places if abs(place - marked) >= _NAME_ROOM), max(places, key=lambda place: abs(place - marked)))


def _drawn(values: Vector, what: str) -> Vector:
    """Return energies for a linear axis, or a log one, on which rounding is a gap."""
    return values if what == "kept" else np.where(values > _FLOOR, values, np.nan)


def _names(figure: go.Figure, places: dict[str, tuple[float, float]], what: str) -> None:
    """Write each source's name at its (value, rank), on the outer side of its curve; not at a gap."""
    upper = max(places, key=lambda source: places[source])
    for source, (value, at) in places.items():
        if what == "removed" and not value > 0:
            continue
        xanchor = "right" if (source == upper) == (what == "kept") else "left"
        y = value if what == "kept" else float(np.log10(value))
        direct_label(figure, source, x=at, y=y, colour=_COLOURS[source], xanchor=xanchor, yanchor="bottom" if source == upper else "top")


def _axes(figure: go.Figure, what: str, x: str) -> None:
    finished(figure, height=360, x=x, y="Retained energy" if what == "kept" else "Discarded energy (log scale)")
    if what == "kept":
        figure.update_yaxes(tickformat=".0%", range=[0, _TOP], tickvals=[0, 0.2, 0.4, 0.6, 0.8, 1])
    else:
        log_value_axis(figure)


def _mark(figure: go.Figure, what: str, x: float, words: str, *, left: bool) -> None:
    """Mark the chosen rank."""
    end = 1 / _TOP if what == "kept" else 1.0
    axis_note(figure, words, x=x, position=x, colour=GREEN, anchor="left" if left else "right", bottom=what == "kept", end=end)


def _band(figure: go.Figure, rows: pd.DataFrame, what: str, source: str, colour: str) -> None:
    """Draw quartiles as a band with the median; energies at rounding level are gaps."""
    low, median, high = (_drawn(rows[f"{what}_{part}"].to_numpy(), what) for part in ("low", "median", "high"))
    x = rows["rank_share"].to_numpy()
    figure.add_scatter(x=x, y=low, mode="lines", line={"width": 0}, hoverinfo="skip")
    figure.add_scatter(x=x, y=high, mode="lines", line={"width": 0}, fill="tonexty", fillcolor=_BANDS[source], hoverinfo="skip")
    hover = "%{x:.0%} of full rank<br>median %{y:.3g}, quartiles %{customdata[0]:.3g} to %{customdata[1]:.3g}<extra>" + source + "</extra>"
    line = {"color": colour, "width": 2.5}
    figure.add_scatter(x=x, y=median, mode="lines", line=line, customdata=np.column_stack([low, high]), hovertemplate=hover)


def pooling_figure(curves: pd.DataFrame) -> go.Figure:
    """Draw √ eigenvalues of the pooled and of the sample covariance on one scale (``pooling_curves``)."""
    figure = go.Figure()
    for column, colour, width in (("sample", SKY, 7), ("pooled", VERMILLION, 2)):
        name, line = f"{column} covariance", {"color": colour, "width": width}
        hover = f"rank %{{x}}<br>%{{y:.3g}}<extra>{name}</extra>"
        figure.add_scatter(x=curves["rank"], y=curves[column], name=name, mode="lines", line=line, hovertemplate=hover)
    finished(figure, height=320, x="Rank (log scale)", y="√ eigenvalue (log scale)")
    figure.update_layout(showlegend=True, legend={"x": 0.02, "y": 0.04, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"})
    log_rank_axis(figure, int(curves["rank"].iloc[-1]))
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
