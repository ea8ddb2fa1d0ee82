"""Charts of benchmarks: recipes by KL to the dense model, and convergence of searches; a panel per ratio."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lowrank_core.studio.shared.chart_style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, finished, whiskers

__all__ = ["convergence_figure", "quality_figure"]

_ROW, _FRAME, _PANEL = 24, 130, 420  # pixels: a recipe, axes, a panel of curves
_OURS = "studio"
_COLOURS = (GREY, ORANGE, SKY, VERMILLION, PURPLE, BLUE, GREEN)
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid", "dash")

Row = Mapping[str, object]


def _panels(rows: Sequence[Row]) -> tuple[go.Figure, list[list[Row]]]:
    """Return an empty chart with a panel for each ratio, and the rows of each."""
    ratios = sorted({float(str(row["compression_ratio"])) for row in rows})
    titles = [f"{ratio:.0%} removed" for ratio in ratios]
    figure = make_subplots(rows=len(ratios), cols=1, subplot_titles=titles, vertical_spacing=0.25 / max(1, len(ratios)))
    return figure, [[row for row in rows if row["compression_ratio"] == ratio] for ratio in ratios]


def quality_figure(rows: Sequence[Row]) -> go.Figure:
    """Draw the KL divergence of each row (``QualityRow.to_mapping``) with 95 % intervals, the best at the top.

    Rows that could not be measured are listed under their panel.
    """
    figure, panels = _panels(rows)
    for index, panel in enumerate(panels, start=1):
        measured = sorted((row for row in panel if row["kl"] is not None), key=lambda row: float(str(row["kl"])))
        figure.add_trace(_dots(measured), row=index, col=1)
        figure.update_yaxes(autorange="reversed", automargin=True, row=index, col=1)
        figure.update_xaxes(type="log", dtick="D2", tickformat="~g", row=index, col=1)
    height = _FRAME + _ROW * len(rows) + 60 * len(panels)
    finished(figure, height=height, x="", y="", right=48, top=40)
    figure.update_yaxes(title=None)
    figure.update_xaxes(
        title={"text": "KL to the dense model on test text, nats per token; next to each point its perplexity"}, row=len(panels), col=1
    )
    protocol = next((str(row["protocol"]) for row in rows if row["protocol"]), "")
    missing = [f"{row['label']} at {row['compression_ratio']:.0%}" for row in rows if row["kl"] is None]
    note = protocol + (f"<br>Not measured: {', '.join(missing)}." if missing else "")
    place = {"x": 0, "y": 0, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "top", "yshift": -56}
    figure.add_annotation(text=note, showarrow=False, align="left", font={"color": GREY}, **place)
    figure.update_layout(margin={"b": 120}, template="plotly_white")
    return figure


def _dots(rows: Sequence[Row]) -> go.Scatter:
    values = np.array([float(str(row["kl"])) for row in rows])
    low, high = (np.array([_end(row["kl_interval"], end, value) for row, value in zip(rows, values, strict=True)]) for end in (0, 1))
    return go.Scatter(
        x=values,
        y=[str(row["label"]) for row in rows],
        mode="markers+text",
        text=[f"&nbsp;&nbsp;&nbsp;{float(str(row['perplexity'])):.2f}" for row in rows],
        textposition="middle right",
        cliponaxis=False,
        marker={"size": 9, "color": [BLUE if row["recipe"] == _OURS else ORANGE for row in rows]},
        error_x=whiskers(values, low, high),
        hovertemplate="%{y}<br>KL %{x:.4g}<br>perplexity %{text}<extra></extra>",
    )


def _end(interval: object, which: int, value: float) -> float:
    """Return an end of an interval; a missing one has zero length."""
    return float(interval[which]) if isinstance(interval, list | tuple) else value


def convergence_figure(rows: Sequence[Row], protocol: str = "") -> go.Figure:
    """Draw every curve (as ``Curve.to_mapping`` gives it), a panel for each ratio; schemes differ in colour and in dash."""
    figure, panels = _panels(rows)
    labels = list(dict.fromkeys(str(row["label"]) for row in rows))
    for index, panel in enumerate(panels, start=1):
        for place, label in enumerate(labels):
            curves = [row["best"] for row in panel if row["label"] == label]
            look = {"color": _COLOURS[place % len(_COLOURS)], "dash": _DASHES[place % len(_DASHES)]}
            for curve in curves:
                figure.add_trace(_line(curve, label, {**look, "width": 0.8}, faint=True), row=index, col=1)
            if curves:
                figure.add_trace(_line(_median(curves), label, {**look, "width": 2.5}, legend=index == 1), row=index, col=1)
    finished(figure, height=_PANEL * len(panels) + 160, x="", y="", top=40)
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.2, "yanchor": "top"}, template="plotly_white")
    figure.update_yaxes(type="log", title="KL of the best so far, nats per token")
    figure.update_xaxes(title={"text": f"trials<br><sub>{protocol}</sub>"}, row=len(panels), col=1)
    return figure


def _median(curves: Sequence[object]) -> list[float | None]:
    columns = zip(*(list(curve) for curve in curves if isinstance(curve, list | tuple)), strict=True)
    return [None if any(value is None for value in column) else statistics.median(column) for column in columns]


def _line(curve: object, label: str, look: Mapping[str, object], *, faint: bool = False, legend: bool = False) -> go.Scatter:
    assert isinstance(curve, list | tuple)
    return go.Scatter(
        x=list(range(1, len(curve) + 1)),
        y=list(curve),
        mode="lines",
        line={**look, "shape": "hv"},
        name=label,
        legendgroup=label,
        showlegend=legend,
        opacity=0.35 if faint else 1.0,
        hoverinfo="skip" if faint else None,
        hovertemplate=None if faint else "%{fullData.name}<br>after %{x} trials: KL %{y:.4g}<extra></extra>",
    )
