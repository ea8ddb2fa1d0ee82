"""Chart of a layer x module map with hover and selection."""

from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go

from lowrank_core.studio.shared.chart_style import SEQUENTIAL, VERMILLION, Chart, block_axis, finished
from lowrank_core.studio.shared.formatting import DASH, kind_label, number, percent
from lowrank_core.studio.shared.layer_map import LayerMap

__all__ = ["allocation_chart", "map_figure"]

_ROW, _FRAME = 40, 74  # pixels: a row of cells; axis and margins
_MAX_LABELLED = 16  # blocks: beyond, numbers no longer fit into the cells
_INVISIBLE = 0.01


def map_figure(view: LayerMap, chosen: str | None = None) -> go.Figure:
    """Draw ``view`` with the module ``chosen`` outlined.

    The colours are a heatmap, which can't be picked from in Streamlit; square markers on top of it can, and carry the module's name.
    """
    figure = go.Figure([_cells(view), _targets(view)])
    if chosen is not None:
        _outline(figure, view, chosen)
    finished(figure, height=_FRAME + _ROW * len(view.kinds), x="Block (depth, from the embedding to the head)", y="", right=8)
    block_axis(figure, view.depths, -0.5, len(view.depths) - 0.5)
    figure.update_xaxes(showgrid=False, ticks="")
    labels = [kind_label(kind) for kind in view.kinds]
    figure.update_yaxes(tickvals=list(range(len(labels))), ticktext=labels, range=[len(labels) - 0.5, -0.5], showgrid=False, title=None)
    figure.update_layout(hoverdistance=60, dragmode=False, clickmode="event+select")
    return figure


def allocation_chart(view: LayerMap, who: str, removed: float, chosen: str | None = None, *, name: str = "", protocol: str = "") -> Chart:
    """Return an ``allocation_map`` of ``who``, which removes the fraction ``removed`` of the compressible linears' parameters."""
    return Chart(
        map_figure(view, chosen),
        view.frame,
        name=name,
        title=f"Where {who} keeps its parameters (%)",
        how=f"bright cells keep most of their parameters, 100 is dense; {percent(removed)} of the linears' parameters are removed in all. "
        "Modules that share a rank show that of their unit.",
        alt=f"Kept fraction of parameters by block and module type for {who}",
        protocol=protocol,
    )


def _grid(view: LayerMap) -> np.ndarray:
    """Return values by (module type, depth), NaN where a block has no such module."""
    cells = view.cells.pivot_table(index="kind", columns="depth", values="value", dropna=False)
    return cells.reindex(index=view.kinds, columns=view.depths).to_numpy(dtype=float)


def _word(value: float, view: LayerMap) -> str:
    """Return the text of a cell: percent without its sign, which is on the colour bar."""
    if not math.isfinite(value):
        return DASH
    if view.log:
        return f"{value:.1e}".replace("e", "<br>e").replace("e-0", "e-").replace("e+0", "e")  # two lines: cells may be narrow
    return f"{100 * value:.0f}" if view.percent else number(value)


def _colours(view: LayerMap, values: np.ndarray) -> dict[str, object]:
    """Return the coloured values and the ends of the scale."""
    if not view.log:
        return {"z": values, "zmin": view.low, "zmax": view.high}
    low, high = math.log10(view.low), math.log10(view.high)
    exponents = np.log10(values, out=np.full_like(values, np.nan), where=values > 0)
    return {"z": exponents, "zmin": low, "zmax": max(high, low + 1e-3)}


def _log_ticks(view: LayerMap) -> dict[str, object]:
    """Return ticks of the colour bar at 1, 2 and 5 of each power of ten, at the powers alone where there are many."""
    powers = range(math.floor(math.log10(view.low)), math.ceil(math.log10(view.high)) + 1)
    steps = (1, 2, 5) if len(powers) < 4 else (1,)
    values = [step * 10.0**power for power in powers for step in steps]
    return {"tickvals": [math.log10(value) for value in values], "ticktext": [f"{value:.0e}".replace("e-0", "e-") for value in values]}


def _cells(view: LayerMap) -> go.Heatmap:
    values = _grid(view)
    words = [[_word(value, view) for value in row] for row in values]
    gap = 3 if len(view.depths) <= _MAX_LABELLED else 1
    return go.Heatmap(
        **_colours(view, values),
        x=view.depths,
        y=list(range(len(view.kinds))),
        colorscale=SEQUENTIAL,
        xgap=gap,
        ygap=gap,
        hoverinfo="skip",
        hoverongaps=False,
        text=words if len(view.depths) <= _MAX_LABELLED else None,
        texttemplate="%{text}",
        textfont={"size": 11},
        colorbar={
            "title": {"text": view.title, "side": "right"},
            "thickness": 10,
            "outlinewidth": 0,
            "tickformat": ".0%" if view.percent else "",
            "len": 1.0,
            "y": 0.5,
            **(_log_ticks(view) if view.log else {}),
        },
    )


def _targets(view: LayerMap) -> go.Scatter:
    row_of = {kind: row for row, kind in enumerate(view.kinds)}
    marker = {"symbol": "square", "size": 26, "opacity": _INVISIBLE, "color": "#888888"}
    return go.Scatter(
        x=view.cells["depth"].to_numpy(),
        y=[row_of[kind] for kind in view.cells["kind"]],
        mode="markers",
        marker=marker,
        selected={"marker": {"opacity": _INVISIBLE}},
        unselected={"marker": {"opacity": _INVISIBLE}},
        customdata=view.cells[["module", "label"]].to_numpy(),
        hovertemplate="<b>%{customdata[0]}</b><br>%{customdata[1]}<extra></extra>",
    )


def _outline(figure: go.Figure, view: LayerMap, chosen: str) -> None:
    rows = view.frame[view.frame["module"] == chosen]
    if rows.empty:
        return
    x, y = int(rows["depth"].iloc[0]), view.kinds.index(rows["kind"].iloc[0])
    figure.add_shape(type="rect", x0=x - 0.48, x1=x + 0.48, y0=y - 0.46, y1=y + 0.46, line={"color": VERMILLION, "width": 3})
