"""Chart of the experts of a mixture."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from lowrank_core.studio.shared.chart_style import BLUE, SEQUENTIAL, VERMILLION, finished

__all__ = ["expert_figure"]


def expert_figure(table: pd.DataFrame, chosen: int) -> go.Figure:
    """Draw the tokens of each expert, coloured by the effective rank of its features; without tokens, the effective ranks alone."""
    counted = bool(table["tokens"].notna().any())
    line = [2 if expert == chosen else 0 for expert in table["expert"]]
    figure = go.Figure(
        go.Bar(
            x=table["expert"].to_numpy(),
            y=(table["tokens"].astype(float) if counted else table["effective_rank"]).to_numpy(),
            marker={
                "color": table["effective_rank"].to_numpy() if counted else BLUE,
                "colorscale": SEQUENTIAL,
                "colorbar": {"title": {"text": "Effective rank, features", "side": "right"}, "thickness": 10, "outlinewidth": 0},
                "showscale": counted,
                "line": {"width": line, "color": VERMILLION},
            },
            customdata=table[["module", "effective_rank"]].to_numpy(),
            hovertemplate="expert %{x}: %{y:,.0f} tokens<br>effective rank %{customdata[1]:.1f}<extra></extra>",
        )
    )
    finished(figure, height=260, x="Expert", y="Tokens routed to it" if counted else "Effective rank, features", right=8)
    figure.update_xaxes(dtick=1 if len(table) <= 32 else None, showgrid=False)
    figure.update_layout(bargap=0.15, clickmode="event+select", dragmode=False)
    return figure
