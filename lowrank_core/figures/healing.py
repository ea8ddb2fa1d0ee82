"""The curve of a healing."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from lowrank_core.figures.style import BLUE, ORANGE, finished

__all__ = ["healing_figure"]


def healing_figure(curve: pd.DataFrame, steps: int) -> go.Figure:
    """Draw the validation KL divergence over the steps, from 0 to the last one planned; the best state is marked.

    Args:
        curve: columns step, kl, kept, as ``curve_table`` gives; one row or more.
    """
    best = curve[curve["kept"]].iloc[-1]
    figure = go.Figure(
        [
            go.Scatter(
                x=curve["step"].to_numpy(),
                y=curve["kl"].to_numpy(),
                mode="lines+markers",
                line={"color": BLUE, "width": 2},
                marker={"size": 5},
                hovertemplate="step %{x}: %{y:.4g} nats<extra></extra>",
            ),
            go.Scatter(
                x=[best["step"]],
                y=[best["kl"]],
                mode="markers+text",
                text=["best so far"],
                textposition="top center",
                marker={"size": 13, "symbol": "star", "color": ORANGE, "line": {"width": 1, "color": "#FFFFFF"}},
                hovertemplate="best: step %{x}, %{y:.4g} nats<extra></extra>",
            ),
        ]
    )
    finished(figure, height=280, x="Step of the optimiser", y="KL to the original, nats per token", top=24)
    figure.update_xaxes(range=[-0.02 * steps, 1.02 * steps])
    return figure
