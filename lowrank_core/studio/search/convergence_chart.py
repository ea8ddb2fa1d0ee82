"""Chart of search convergence: best value over trials, thin per seed, thick for the median."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lowrank_core.studio.shared.chart_style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, finished

__all__ = ["convergence_figure"]

_PANEL = 420  # pixels
_COLOURS = (GREY, ORANGE, SKY, VERMILLION, PURPLE, BLUE, GREEN)
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid", "dash")

Row = Mapping[str, object]


def convergence_figure(rows: Sequence[Row], protocol: str = "") -> go.Figure:
    """Draw every curve (as ``Curve.to_mapping`` gives it), a panel for each ratio; schemes differ in colour and in dash."""
    ratios = sorted({float(str(row["compression_ratio"])) for row in rows})
    titles = [f"{ratio:.0%} removed" for ratio in ratios]
    figure = make_subplots(rows=len(ratios), cols=1, subplot_titles=titles, vertical_spacing=0.25 / max(1, len(ratios)))
    labels = list(dict.fromkeys(str(row["label"]) for row in rows))
    for panel, ratio in enumerate(ratios, start=1):
        for index, label in enumerate(labels):
            curves = [row["best"] for row in rows if row["label"] == label and row["compression_ratio"] == ratio]
            look = {"color": _COLOURS[index % len(_COLOURS)], "dash": _DASHES[index % len(_DASHES)]}
            for curve in curves:
                figure.add_trace(_line(curve, label, {**look, "width": 0.8}, faint=True), row=panel, col=1)
            if curves:
                figure.add_trace(_line(_median(curves), label, {**look, "width": 2.5}, legend=panel == 1), row=panel, col=1)
        figure.update_yaxes(type="log", automargin=True, title="KL of the best so far, nats per token", row=panel, col=1)
    figure.update_xaxes(title="trials", row=len(ratios), col=1)
    finished(figure, height=_PANEL * len(ratios) + 160, x="", y="", top=40)
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.2, "yanchor": "top"}, template="plotly_white")
    figure.update_yaxes(title="KL of the best so far, nats per token")
    figure.update_xaxes(title={"text": f"trials<br><sub>{protocol}</sub>"}, row=len(ratios), col=1)
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
