"""Embedding of charts in an HTML page: their JSON and one script."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from lowrank_core.studio.shared.chart_style import CONFIG

__all__ = ["EMBED_CONFIG", "figure_json", "plotly_script"]

EMBED_CONFIG = {**CONFIG, "responsive": True, "displayModeBar": "hover"}
"""For Plotly's ``config`` where no Streamlit resizes a figure."""


def figure_json(figure: go.Figure) -> str:
    """Return ``figure`` as JSON that may stand inside a script element: no ``<``, and null instead of NaN.

    Plotly's own template is left out: background, text and grid take their colours from the page.
    """
    return str(go.Figure(figure).update_layout(template="none").to_json()).replace("<", "\\u003c")


def plotly_script() -> str:
    """Return the text of plotly.js, 4.8 MB."""
    return str(get_plotlyjs())
