"""Validation curve of a healing."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lowrank_core.studio.compare.healing_runs import Healing, curve_table
from lowrank_core.studio.shared.chart_style import BLUE, ORANGE, Chart, finished

__all__ = ["healing_chart", "healing_figure"]

_FIGURES = {"kl": "KL to the dense model,<br>nats per token", "perplexity": "Perplexity"}


def healing_chart(healing: Healing) -> Chart:
    """Return the validations of a healing, of which there is one or more."""
    curve = curve_table(healing.history)
    return Chart(
        healing_figure(curve, healing.steps),
        curve,
        name=f"healing-{healing.folder}",
        title=f"Healing {healing.name}",
        how="each point is a validation on held-out text; lower is better in both. The starred state is kept, however the curve goes on.",
        alt="KL divergence and perplexity on validation text over the steps of a healing",
        protocol="" if healing.report is None else f"Trained on {healing.report.training}. Validated on {healing.report.validation}.",
    )


def healing_figure(curve: pd.DataFrame, steps: int) -> go.Figure:
    """Draw KL divergence and perplexity on validation text over the planned steps; the best state is marked.

    Args:
        curve: columns step, kl, perplexity, kept, as ``curve_table`` gives; one row or more.
    """
    best = curve[curve["kept"]].iloc[-1]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for row, name in enumerate(_FIGURES, start=1):
        line = go.Scatter(
            x=curve["step"].to_numpy(),
            y=curve[name].to_numpy(),
            mode="lines+markers",
            line={"color": BLUE, "width": 2},
            marker={"size": 5},
            hovertemplate="step %{x}: %{y:.4g}<extra></extra>",
        )
        star = go.Scatter(
            x=[best["step"]],
            y=[best[name]],
            mode="markers+text",
            text=["best so far"] if row == 1 else None,
            textposition="top left" if best["step"] > steps / 2 else "top right",
            marker={"size": 13, "symbol": "star", "color": ORANGE, "line": {"width": 1, "color": "#FFFFFF"}},
            hovertemplate="best: step %{x}, %{y:.4g}<extra></extra>",
        )
        figure.add_traces([line, star], rows=row, cols=1)
    finished(figure, height=400, x="", y="", top=24)
    for row, name in enumerate(_FIGURES.values(), start=1):
        figure.update_yaxes(title=name, row=row, col=1)
    figure.update_xaxes(range=[-0.02 * steps, 1.04 * steps], title=None)
    figure.update_xaxes(title="Step of the optimiser", row=2, col=1)
    return figure
