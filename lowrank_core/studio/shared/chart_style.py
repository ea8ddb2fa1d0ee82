"""Shared style of charts: colour-blind-safe colours, margins, axes.

Colours of text, grid and background are left to the page's theme, so that light and dark both work.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go

__all__ = [
    "BLUE",
    "CONFIG",
    "Chart",
    "GREEN",
    "GREY",
    "ORANGE",
    "PURPLE",
    "SEQUENTIAL",
    "SKY",
    "TRIAL_MARKS",
    "VERMILLION",
    "VegaChart",
    "axis_note",
    "block_axis",
    "direct_label",
    "dotted",
    "end_labels",
    "finished",
    "legible",
    "log_rank_axis",
    "log_value_axis",
    "note",
    "type_style",
    "whiskers",
    "word_colour",
]

# Okabe & Ito 2008, less the two that vanish on a white or a black page
BLUE, SKY, GREEN, ORANGE, VERMILLION, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
GREY = "#8A9199"
_WORDS = {SKY: "#2F8AC0", ORANGE: "#A87300", PURPLE: "#B5628F", GREY: "#737B84"}
"""Colours of lines that are too faint for words on a white page -> the same hue, at least 3.7 : 1 on white and on black."""
SEQUENTIAL = "Cividis"
_TYPE_COLOURS = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, GREY)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "x", "cross")
_DASHES = ("solid", "dash", "dot", "dashdot")
TRIAL_MARKS = {
    "sampled": ("circle", BLUE),
    "baseline": ("diamond", ORANGE),
    "manual": ("star", VERMILLION),
    "running": ("hourglass", GREEN),
    "waiting": ("triangle-right", GREY),
    "stopped early": ("triangle-down-open", PURPLE),
    "outside budget": ("square", SKY),
    "failed": ("x", VERMILLION),
}
"""Kind of a trial -> Plotly's symbol, and colour; distinct without the colour."""
_LABEL_GAP = 0.058  # of the height of the axis: between the middles of two labels

CONFIG = {
    "displaylogo": False,
    "displayModeBar": "hover",
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
    "scrollZoom": False,
    "toImageButtonOptions": {"format": "svg", "filename": "lowrank-figure"},
}
"""For Plotly's ``config``; the camera of the mode bar saves what is seen as SVG, in the browser."""


@dataclass(frozen=True)
class VegaChart:
    """A table with its Vega-Lite specification."""

    data: pd.DataFrame
    spec: dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A chart as it is declared, once: a page shows it with Streamlit, a report as HTML, and both offer its numbers as CSV.

    Attributes:
        figure: of a live chart a Vega-Lite one; a report has Plotly's.
        data: what the figure was drawn from.
        name: of its CSV file, unique in a report.
        how: how to read it; alt: what the picture shows, for those who do not see it.
        protocol: model, text, tokens and dtype behind it, for a report.
    """

    block: ClassVar[str] = "figure"
    figure: go.Figure | VegaChart
    data: pd.DataFrame
    name: str
    title: str
    how: str
    alt: str
    protocol: str = ""


def finished(figure: go.Figure, *, height: int, x: str, y: str, right: int = 16, top: int = 12) -> go.Figure:
    """Return ``figure`` with axis titles, a fixed height, and zoom that survives new data."""
    figure.update_layout(
        height=height,
        margin={"l": 8, "r": right, "t": top, "b": 8},
        showlegend=False,
        uirevision="constant",
        selectionrevision="constant",
        hovermode="closest",
        hoverlabel={"align": "left"},
    )
    figure.update_xaxes(title={"text": x, "standoff": 8}, automargin=True, zeroline=False, ticks="outside", ticklen=4)
    figure.update_yaxes(title={"text": y, "standoff": 8}, automargin=True, zeroline=False)
    return figure


_TITLE, _NAME, _BLOCKS = 46, 24, 12
"""Letters of an axis title, letters of a name next to the axis, and numbers of blocks, that fit next to each other at 400 pixels."""


def word_colour(colour: str) -> str:
    """Return the colour of words that belong to a line of ``colour``."""
    return _WORDS.get(colour, colour)


def legible(figure: go.Figure) -> go.Figure:
    """Return ``figure`` ready for a page: notes readable in light and dark, long labels wrapped for 400 pixels."""
    figure.for_each_annotation(lambda note: note.update(font={"color": word_colour(note.font.color)}) if note.font.color else None)
    figure.for_each_xaxis(lambda axis: axis.update(title={"text": _in_lines(axis.title.text, _TITLE)}) if axis.title.text else None)
    if figure.layout.yaxis.type == "category":
        names = list(dict.fromkeys(name for trace in figure.data for name in trace.y))
        figure.update_yaxes(tickvals=names, ticktext=[_in_lines(name, _NAME) for name in names])
    return figure


def _in_lines(words: str, maximum: int) -> str:
    """Return ``words`` in balanced lines of about ``most`` characters."""
    lines = -(-len(words) // maximum)
    return words if lines == 1 or "<br>" in words else "<br>".join(textwrap.wrap(words, len(words) // lines + 4))


def block_axis(figure: go.Figure, depths: Sequence[int], low: float, high: float) -> None:
    """Number as many blocks on an axis from ``low`` to ``high`` as stand next to each other at 400 pixels."""
    step = next(step * 10**power for power in range(6) for step in (1, 2, 5) if len(depths) <= _BLOCKS * step * 10**power)
    figure.update_xaxes(tickvals=list(depths[::step]), range=[low, high])


def log_rank_axis(figure: go.Figure, full: int) -> None:
    """Put ranks 1, 2, 5, 10, … up to ``full`` on a log axis."""
    ticks = [step * 10**power for power in range(7) for step in (1, 2, 5) if step * 10**power <= full]
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:,}" for tick in ticks], range=[-0.02, math.log10(full) + 0.03])


def log_value_axis(figure: go.Figure) -> None:
    """Mark the powers of ten of values up to 1 on a log axis, in short words."""
    superscript = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
    words = ["1", "0.1", "0.01", *(f"10⁻{str(power).translate(superscript)}" for power in range(3, 21))]
    figure.update_yaxes(type="log", tickvals=[10.0**-power for power in range(21)], ticktext=words)


def direct_label(figure: go.Figure, text: str, *, x: float, y: float, colour: str, xanchor: str = "left", yanchor: str = "middle") -> None:
    """Write ``text`` next to its curve, in its colour; ``x`` and ``y`` in axis coordinates (log10 on a log axis)."""
    figure.add_annotation(
        text=f"<b>{text}</b>",
        x=x,
        y=y,
        showarrow=False,
        xanchor=xanchor,
        yanchor=yanchor,
        xshift=4 if xanchor == "left" else -4,
        font={"color": colour, "size": 12},
    )


def dotted(figure: go.Figure, x: float, colour: str = GREY, *, start: float = 0.0, end: float = 1.0) -> None:
    """Draw a dotted line at ``x``, in data units, over the height from ``start`` to ``end``, so that it leaves out labels of others."""
    figure.add_shape(type="line", x0=x, x1=x, y0=start, y1=end, yref="paper", line={"color": colour, "width": 1.5, "dash": "dot"})


def note(figure: go.Figure, text: str, *, x: float, y: float = 1, colour: str = GREY, anchor: str = "left", **about: object) -> None:
    """Write ``text`` on the side of ``x`` (axis coordinates) opposite to its ``anchor``, at ``y`` of the height."""
    shift = {"left": 4, "right": -4}.get(anchor, 0)
    place = {"x": x, "y": y, "yref": "paper", "xanchor": anchor, "yanchor": "top", "xshift": shift, **about}
    figure.add_annotation(text=text, showarrow=False, font={"size": 11, "color": colour}, **place)


def axis_note(
    figure: go.Figure,
    text: str,
    *,
    x: float,
    position: float,
    colour: str = GREY,
    anchor: str = "left",
    bottom: bool = False,
    end: float = 1.0,
) -> None:
    """Draw a dotted line at ``x`` (data units) with ``text`` at its top or bottom; ``position`` is ``x`` in axis coordinates."""
    dotted(figure, x, colour, end=end)
    note(figure, text, x=position, y=0 if bottom else 1, colour=colour, anchor=anchor, yanchor="bottom" if bottom else "top")


def type_style(kinds: Sequence[str], kind: str) -> dict[str, str]:
    """Return the look of one of the module types ``kinds``: colour, symbol, and a dash that differs where colours come again."""
    turn, index = divmod(kinds.index(kind), len(_TYPE_COLOURS))
    return {"color": _TYPE_COLOURS[index], "symbol": _SYMBOLS[index % len(_SYMBOLS)], "dash": _DASHES[turn % len(_DASHES)]}


def end_labels(figure: go.Figure, ends: Sequence[tuple[str, float, float, str]], low: float, high: float) -> None:
    """Write (name, x, y, colour), in axis coordinates, next to the ends of lines; those at one x apart, on an axis from low to high."""
    for x in sorted({round(x, 1) for _, x, _, _ in ends}):
        here = [end for end in ends if round(end[1], 1) == x]
        for (name, at, _, colour), y in zip(here, _spread([y for _, _, y, _ in here], _LABEL_GAP * (high - low)), strict=True):
            direct_label(figure, name, x=at, y=y, colour=colour)


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Return label positions near ``places`` that are at least ``gap`` apart, in the same order; crowds stay where they were on average."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    crowds: list[list[float]] = []
    for index in order:
        crowds.append([places[index]])
        while len(crowds) > 1 and _ends(crowds[-1], gap)[0] - _ends(crowds[-2], gap)[1] < gap:
            crowds[-2:] = [crowds[-2] + crowds[-1]]
    spread = [_ends(crowd, gap)[0] + gap * step for crowd in crowds for step in range(len(crowd))]
    result = list(places)
    for index, place in zip(order, spread, strict=True):
        result[index] = place
    return result


def _ends(crowd: Sequence[float], gap: float) -> tuple[float, float]:
    """Return the first and the last position of a crowd that stands ``gap`` apart around its mean."""
    middle, half = sum(crowd) / len(crowd), gap * (len(crowd) - 1) / 2
    return middle - half, middle + half


def whiskers(value: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str = GREY) -> dict[str, object]:
    """Return Plotly's error bars from ``low`` to ``high``."""
    ends = {"array": high - value, "arrayminus": value - low}
    return {"type": "data", "symmetric": False, **ends, "thickness": 1.5, "width": 5, "color": colour}
