"""The spectra of a module."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from lowrank_core.figures.style import BLUE, VERMILLION, axis_note, direct_label, finished
from lowrank_core.views.spectrum import ScreeCurves, Vector

__all__ = ["scree_figure"]


def scree_figure(curves: ScreeCurves) -> go.Figure:
    """Draw singular values of W and √ feature eigenvalues, both over their first, with the break-even rank."""
    figure = go.Figure()
    for name, values, colour, dash in (
        ("weights: σ of W", curves.weights, BLUE, "solid"),
        ("features: √λ of the outputs", curves.features, VERMILLION, "solid"),
    ):
        figure.add_scatter(
            x=curves.ranks,
            y=values,
            name=name,
            mode="lines",
            line={"color": colour, "width": 2.5, "dash": dash},
            hovertemplate="rank %{x}<br>%{y:.3g} of the first<extra>" + name + "</extra>",
        )
        _label_curve(figure, curves, values, name, colour)
    if curves.shape.break_even_rank:
        axis_note(figure, f"break-even<br>rank {curves.shape.break_even_rank}", x=curves.shape.break_even_rank, position=np.log10(curves.shape.break_even_rank), anchor="right")
    finished(figure, height=380, x="Rank (log scale)", y="Value relative to the first (log scale)")
    figure.update_xaxes(type="log", range=[0, np.log10(curves.shape.max_rank) + 0.02], dtick="D2" if curves.shape.max_rank <= 64 else 1, minor={"ticks": "outside", "ticklen": 2})
    figure.update_yaxes(type="log", tickformat="~g", dtick=1)
    return figure


def _label_curve(figure: go.Figure, curves: ScreeCurves, values: Vector, name: str, colour: str) -> None:
    """Write the name where the two curves are furthest apart, on the outer side."""
    gap = np.abs(np.log10(curves.weights) - np.log10(curves.features))
    if not np.isfinite(gap).any():
        return
    usable = np.where((curves.ranks <= curves.shape.max_rank**0.6), gap, -np.inf)
    at = int(np.nanargmax(np.where(np.isfinite(usable), usable, -np.inf)))
    if not values[at] > 0:
        return
    above = np.nan_to_num(values[at]) >= np.nanmax([curves.weights[at], curves.features[at]])
    direct_label(figure, name, x=float(np.log10(curves.ranks[at])), y=float(np.log10(values[at])), colour=colour, xanchor="left" if above else "right", yanchor="bottom" if above else "top")
