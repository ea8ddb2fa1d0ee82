"""Chart of predicted against measured KL divergence."""

from __future__ import annotations

import html
import math

import pandas as pd
import plotly.graph_objects as go

from lowrank_core.studio.shared.chart_style import GREY, TRIAL_MARKS, dotted, finished, note
from lowrank_core.studio.shared.trial_names import KINDS

__all__ = ["prediction_figure"]

_HEIGHT = 380
_MARGIN = 0.08  # of a decade, around the points


def prediction_figure(predictions: pd.DataFrame, *, now: float | None = None) -> go.Figure:
    """Draw the measured KL divergence of every trial against the predicted one, on log axes with the diagonal.

    Args:
        predictions: as ``trial_predictions``.
        now: the prediction of the draft on screen, a dotted line.
    """
    figure = go.Figure()
    low, high = _ends(predictions, now)
    figure.add_scatter(
        x=[low, high], y=[low, high], mode="lines", line={"color": GREY, "width": 1.5, "dash": "dash"}, hoverinfo="skip", showlegend=False
    )
    for kind in KINDS:
        rows = predictions[predictions["kind"] == kind]
        if len(rows):
            symbol, colour = TRIAL_MARKS[kind]
            figure.add_scatter(
                x=rows["predicted"].to_numpy(),
                y=rows["measured"].to_numpy(),
                mode="markers",
                name=kind,
                marker={"symbol": symbol, "color": colour, "size": 10},
                customdata=[[trial, html.escape(str(name))] for trial, name in zip(rows["trial"], rows["name"], strict=True)],
                hovertemplate="<b>%{customdata[1]}</b><br>predicted %{x:.4g}<br>measured %{y:.4g}<extra></extra>",
            )
    finished(figure, height=_HEIGHT, x="Predicted KL (nats per token), log scale", y="Measured KL (nats per token), log scale", top=34)
    note(figure, "measured = predicted", x=math.log10(high), y=math.log10(high), yref="y", anchor="right", yanchor="bottom", xshift=0)
    if now is not None and now > 0:
        dotted(figure, now)
        note(figure, "this draft, predicted", x=math.log10(now), anchor="center", yanchor="bottom")
    ends = [math.log10(low), math.log10(high)]
    figure.update_xaxes(type="log", range=ends, tickformat="~g", dtick="D2")
    figure.update_yaxes(type="log", range=ends, tickformat="~g", dtick="D2")
    figure.update_layout(showlegend=True, legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 0, "yanchor": "bottom"})
    return figure


def _ends(predictions: pd.DataFrame, now: float | None) -> tuple[float, float]:
    values = [*predictions["predicted"], *predictions["measured"], *([now] if now is not None and now > 0 else [])]
    if not values:
        return 1e-3, 1.0
    return float(min(values)) * 10**-_MARGIN, float(max(values)) * 10**_MARGIN
