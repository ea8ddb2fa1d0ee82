"""Charts of one compressed model against the dense model, by window and by position."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lowrank_core.studio.compare.comparison import Comparison
from lowrank_core.studio.compare.loss_details import WindowTable, position_table, window_table
from lowrank_core.studio.shared.chart_style import BLUE, GREY, ORANGE, VERMILLION, Chart, dotted, finished, note
from lowrank_core.studio.shared.summary import protocol_of

__all__ = ["histogram_figure", "position_chart", "position_figure", "scatter_figure", "window_charts"]

_BINS = 30


def window_charts(shown: Comparison) -> tuple[Chart, Chart] | None:
    """Return the loss of both models on each window, and how the differences are spread; None where windows were not recorded."""
    view, protocol = window_table(shown), f"{protocol_of(shown)}."
    if view is None:
        return None
    scatter = Chart(
        scatter_figure(view),
        view.frame,
        name="window-scatter",
        title=f"Each window: the dense model against {shown.name}",
        how="above the diagonal the compressed model predicts worse (orange), below it better (blue).",
        alt=f"Loss of {shown.name} over that of the dense model, a dot for each test window",
        protocol=protocol,
    )
    histogram = Chart(
        histogram_figure(view),
        view.frame[["window", "difference"]],
        name="window-histogram",
        title="Distribution of the differences",
        how="a narrow heap next to zero is a small loss everywhere; a long tail is text that the compression broke.",
        alt=f"Histogram of the loss of {shown.name} less that of the dense model over test windows",
        protocol=protocol,
    )
    return scatter, histogram


def position_chart(shown: Comparison) -> Chart | None:
    """Return what is lost after how many tokens of context; None where positions were not recorded."""
    table = position_table(shown)
    if table.empty:
        return None
    return Chart(
        position_figure(table),
        table,
        name="positions",
        title=f"{shown.name}: loss by tokens of context",
        how="a rising line means that the compressed model uses a long context less well; the first positions are few, so noisy.",
        alt=f"KL divergence and extra loss of {shown.name} by position in the context",
        protocol=f"{protocol_of(shown)}.",
    )


def scatter_figure(view: WindowTable) -> go.Figure:
    """Draw each window's loss of the compressed model over that of the dense model; on the diagonal both are equal."""
    frame = view.frame
    ends = [float(frame[["dense", "compressed"]].min().min()), float(frame[["dense", "compressed"]].max().max())]
    room = 0.05 * (ends[1] - ends[0]) or 0.1
    ends = [ends[0] - room, ends[1] + room]
    diagonal = go.Scatter(x=ends, y=ends, mode="lines", line={"color": GREY, "width": 1.5, "dash": "dot"}, hoverinfo="skip")
    dots = go.Scatter(
        x=frame["dense"].to_numpy(),
        y=frame["compressed"].to_numpy(),
        mode="markers",
        marker={"size": 8, "color": [VERMILLION if value > 0 else BLUE for value in frame["difference"]], "opacity": 0.8},
        customdata=frame[["window", "difference"]].to_numpy(),
        hovertemplate="window %{customdata[0]}: %{x:.4g} → %{y:.4g} (%{customdata[1]:+.3g})<extra></extra>",
    )
    figure = go.Figure([diagonal, dots])
    finished(figure, height=380, x="Dense, nats per token", y="Compressed, nats per token")
    figure.update_xaxes(range=ends)
    figure.update_yaxes(range=ends)
    note(figure, "equal", x=ends[1], y=ends[1], yref="y", anchor="right", xshift=-10, yshift=-22)
    return figure


def histogram_figure(view: WindowTable) -> go.Figure:
    """Draw the histogram of window differences, with the mean and zero (the dense model) marked."""
    values = view.frame["difference"].to_numpy(dtype=float)
    counts, edges = np.histogram(values, bins=min(_BINS, max(5, len(values) // 4)))
    centres, widths = (edges[:-1] + edges[1:]) / 2, np.diff(edges)
    bars = go.Bar(
        x=centres,
        y=counts,
        width=widths * 0.94,
        marker={"color": [VERMILLION if centre > 0 else BLUE for centre in centres]},
        customdata=np.stack([edges[:-1], edges[1:]], axis=-1),
        hovertemplate="%{customdata[0]:+.3g} to %{customdata[1]:+.3g}: %{y} windows<extra></extra>",
    )
    figure = go.Figure([bars])
    finished(figure, height=300, x="Compressed minus dense, nats per token", y="Windows", top=28)
    for x, words, colour in ((0.0, "dense", GREY), (view.mean, "mean", ORANGE)):
        dotted(figure, x, colour)
        anchor = "right" if (words == "dense") == (view.mean >= 0) else "left"
        note(figure, words, x=x, colour=colour, anchor=anchor, yanchor="bottom", xshift=0)
    return figure


def position_figure(table: pd.DataFrame) -> go.Figure:
    """Draw the KL divergence, and the loss above the dense model's, by tokens of context (columns of ``position_table``)."""
    figure = go.Figure()
    for column, words, colour, dash in (
        ("kl", "KL to the dense model", BLUE, "solid"),
        ("extra", "NLL above the dense model", VERMILLION, "dot"),
    ):
        values = table[column].to_numpy(dtype=float)
        figure.add_trace(
            go.Scatter(
                x=table["context"].to_list(),
                y=values,
                name=words,
                mode="lines+markers",
                line={"color": colour, "width": 2, "dash": dash},
                marker={"size": 8},
                hovertemplate=f"%{{x}} tokens of context: {words} %{{y:.3g}}<extra></extra>",
            )
        )
    finished(figure, height=340, x="Tokens of context before the predicted one", y="nats per token", top=36)
    figure.add_hline(y=0.0, line={"color": GREY, "width": 1})
    figure.update_xaxes(type="category")
    figure.update_layout(showlegend=True, legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"})
    return figure
