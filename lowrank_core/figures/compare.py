"""Original against compressed."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from lowrank_core.figures.style import BLUE, GREY, ORANGE, finished
from lowrank_core.views.compare import Comparison

__all__ = ["perplexity_figure"]

_BAR, _FRAME = 44, 70  # pixels


def perplexity_figure(found: Sequence[Comparison]) -> go.Figure:
    """Draw perplexity on test text, the original first; whiskers are 95 % intervals over windows."""
    names = ["Original", *(comparison.name for comparison in found)]
    values = [found[0].dense_perplexity, *(comparison.perplexity for comparison in found)]
    intervals = [found[0].dense_perplexity_interval or None, *(comparison.perplexity_interval or None for comparison in found)]
    figure = go.Figure(
        go.Bar(
            x=values,
            y=names,
            orientation="h",
            marker={"color": [GREY, *[BLUE] * len(found)]},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [ends[1] - value if ends else 0.0 for ends, value in zip(intervals, values, strict=True)],
                "arrayminus": [value - ends[0] if ends else 0.0 for ends, value in zip(intervals, values, strict=True)],
                "thickness": 2,
                "width": 5,
                "color": ORANGE,
            },
            text=[f"<b>{value:.4g}</b>" for value in values],
            textposition="inside",
            insidetextanchor="start",
            textfont={"color": "#FFFFFF"},
            hovertemplate="%{y}: %{x:.4g}<extra></extra>",
        )
    )
    finished(figure, height=_FRAME + _BAR * len(names), x="Perplexity on test text (lower is better)", y="")
    figure.update_yaxes(autorange="reversed", title=None)
    figure.update_xaxes(rangemode="tozero")
    return figure
