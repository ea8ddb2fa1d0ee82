"""Chart of recipes by KL to the dense model, a panel per ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lowrank_core.studio.shared.chart_style import BLUE, GREY, ORANGE, finished

__all__ = ["quality_figure"]

_ROW, _FRAME = 24, 130  # pixels
_OURS = "studio"

Row = Mapping[str, object]


def quality_figure(rows: Sequence[Row]) -> go.Figure:
    """Draw the KL divergence of each row (``QualityRow.to_mapping``) with 95 % intervals, the best at the top.

    Rows that could not be measured are listed under their panel.
    """
    ratios = sorted({float(str(row["compression_ratio"])) for row in rows})
    panels = [[row for row in rows if row["compression_ratio"] == ratio] for ratio in ratios]
    titles = [f"{ratio:.0%} removed" for ratio in ratios]
    figure = make_subplots(rows=len(ratios), cols=1, subplot_titles=titles, vertical_spacing=0.25 / max(1, len(ratios)))
    for index, panel in enumerate(panels, start=1):
        measured = sorted((row for row in panel if row["kl"] is not None), key=lambda row: float(str(row["kl"])))
        figure.add_trace(_dots(measured), row=index, col=1)
        figure.update_yaxes(autorange="reversed", automargin=True, row=index, col=1)
        figure.update_xaxes(type="log", dtick="D2", tickformat="~g", row=index, col=1)
    height = _FRAME + _ROW * len(rows) + 60 * len(ratios)
    finished(figure, height=height, x="", y="", right=48, top=40)
    figure.update_yaxes(title=None)
    figure.update_xaxes(
        title={"text": "KL to the dense model on test text, nats per token; next to each point its perplexity"}, row=len(ratios), col=1
    )
    protocol = next((str(row["protocol"]) for row in rows if row["protocol"]), "")
    missing = [f"{row['label']} at {row['compression_ratio']:.0%}" for row in rows if row["kl"] is None]
    note = protocol + (f"<br>Not measured: {', '.join(missing)}." if missing else "")
    place = {"x": 0, "y": 0, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "top", "yshift": -56}
    figure.add_annotation(text=note, showarrow=False, align="left", font={"color": GREY}, **place)
    figure.update_layout(margin={"b": 120}, template="plotly_white")
    return figure


def _dots(rows: Sequence[Row]) -> go.Scatter:
    values = [float(str(row["kl"])) for row in rows]
    ends = [_ends(row["kl_interval"], value) for row, value in zip(rows, values, strict=True)]
    return go.Scatter(
        x=values,
        y=[str(row["label"]) for row in rows],
        mode="markers+text",
        text=[f"&nbsp;&nbsp;&nbsp;{float(str(row['perplexity'])):.2f}" for row in rows],
        textposition="middle right",
        cliponaxis=False,
        marker={"size": 9, "color": [BLUE if row["recipe"] == _OURS else ORANGE for row in rows]},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [high - value for (_, high), value in zip(ends, values, strict=True)],
            "arrayminus": [value - low for (low, _), value in zip(ends, values, strict=True)],
            "thickness": 1.2,
            "width": 3,
        },
        hovertemplate="%{y}<br>KL %{x:.4g}<br>perplexity %{text}<extra></extra>",
    )


def _ends(interval: object, value: float) -> tuple[float, float]:
    """Return whisker ends; a missing interval has zero length."""
    if interval is None:
        return value, value
    assert isinstance(interval, list | tuple)
    low, high = interval
    return float(low), float(high)
