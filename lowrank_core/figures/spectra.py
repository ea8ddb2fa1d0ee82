"""The spectra of a module."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from lowrank_core.figures.style import BLUE, VERMILLION, axis_note, direct_label, finished, log_rank_axis, log_value_axis
from lowrank_core.views.spectrum import ScreeCurves, Vector

__all__ = ["scree_figure"]

_LABELLED = 0.6
"""Names are written at ranks up to full rank to this power: further right the curves fall too steeply."""


def scree_figure(curves: ScreeCurves) -> go.Figure:
    """Draw singular values of W and √ feature eigenvalues, both over their first, with the break-even rank."""
    figure = go.Figure()
    for name, colour, values in _curves(curves):
        hover = f"rank %{{x}}<br>%{{y:.3g}} of the first<extra>{name}</extra>"
        figure.add_scatter(x=curves.ranks, y=values, name=name, mode="lines", line={"color": colour, "width": 2.5}, hovertemplate=hover)
    _label_curves(figure, curves)
    even = curves.shape.break_even_rank
    if even:
        axis_note(figure, f"break-even rank {even}", x=even, position=float(np.log10(even)), anchor="right", bottom=True)
    finished(figure, height=380, x="Rank (log scale)", y="Value relative to the first (log scale)")
    log_rank_axis(figure, curves.shape.max_rank)
    log_value_axis(figure)
    return figure


def _curves(curves: ScreeCurves) -> tuple[tuple[str, str, Vector], ...]:
    return ("weights: σ of W", BLUE, curves.weights), ("features: √λ of the outputs", VERMILLION, curves.features)


def _label_curves(figure: go.Figure, curves: ScreeCurves) -> None:
    """Write each name where the two curves are far apart, on the outer side; nothing where one of them is all gaps."""
    gap = np.abs(np.log10(curves.weights) - np.log10(curves.features))
    gap[curves.ranks > curves.shape.max_rank**_LABELLED] = np.nan
    if np.isnan(gap).all():
        return
    at = int(np.nanargmax(gap))
    x = float(np.log10(curves.ranks[at]))
    for name, colour, values in _curves(curves):
        above = bool(values[at] == max(curves.weights[at], curves.features[at]))
        xanchor, yanchor = ("left", "bottom") if above else ("right", "top")
        direct_label(figure, name, x=x, y=float(np.log10(values[at])), colour=colour, xanchor=xanchor, yanchor=yanchor)
