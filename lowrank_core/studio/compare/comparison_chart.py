"""Charts of all models against the dense model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lowrank_core.studio.compare.comparison import Comparison
from lowrank_core.studio.compare.loss_details import difference_table
from lowrank_core.studio.compare.measured_speed import Speed, speed_numbers, speedup_table
from lowrank_core.studio.compare.second_text import OtherText
from lowrank_core.studio.shared.chart_style import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILLION, Chart, dotted, finished, note, whiskers

__all__ = ["difference_chart", "difference_figure", "ratio_chart", "ratio_figure", "speedup_chart", "speedup_figure"]

_ROW, _FRAME = 36, 84  # pixels; a row holds a name in two lines
_MARKS = {"searched": (BLUE, "circle"), "healed": (GREEN, "star"), "rule": (ORANGE, "square")}
_WIDE = 30.0  # times the smallest: above, a linear axis would put most dots on top of each other


def _height(rows: int) -> int:
    """Return the pixels of a chart of so many rows: below two, its axis title would stand on the tick labels."""
    return _FRAME + _ROW * max(2, rows)


def difference_chart(result: Sequence[Comparison], protocol: str) -> Chart:
    frame = difference_table(result)
    return Chart(
        difference_figure(frame, result[0].dense_perplexity),
        frame,
        name=f"perplexity-{result[0].dataset}-{result[0].split}",
        title="Perplexity above the dense model's, on the same test windows",
        how="further right is worse; whiskers are 95 % intervals of the difference, paired by window. "
        "Circles were searched for, squares are rules and presets, stars were healed.",
        alt="Dots with intervals: test perplexity of each measured model less that of the dense model; the table below has the numbers",
        protocol=f"{protocol}.",
    )


def difference_figure(table: pd.DataFrame, dense_perplexity: float) -> go.Figure:
    """Draw perplexity above dense (columns of ``difference_table``) as dots with 95 % intervals; zero is the dense model.

    Where differences are of very different sizes the axis is linear around zero and logarithmic beyond, and says so.
    """
    values = table["difference"].to_numpy(dtype=float)
    sizes = np.abs(values[values != 0])
    unit = float(sizes.min()) if len(sizes) and sizes.max() > _WIDE * sizes.min() else None
    figure = go.Figure([_dots(table, "difference", unit)])
    finished(figure, height=_height(len(table)), x="", y="", top=28)
    scale = ", logarithmic away from zero" if unit is not None else ""
    _zero(figure, 0.0, f"Dense, {dense_perplexity:.4g}")
    figure.update_xaxes(title={"text": f"Perplexity above the dense model{scale}"})
    if unit is not None:
        _signed_log_axis(figure, table, unit)
    return figure


def _dots(table: pd.DataFrame, column: str, unit: float | None) -> go.Scatter:
    value, low, high = _with_ends(table, column, "low", "high")
    words = [f"{v:+z.4g}" + (f" ({a:+z.3g} to {b:+z.3g})" if b > a else "") for v, a, b in zip(value, low, high, strict=True)]
    at, minimum, maximum = (_placed(array, unit) for array in (value, low, high))
    marks = [_MARKS[kind] for kind in table["kind"]]
    return go.Scatter(
        x=at,
        y=table["name"].to_list(),
        mode="markers",
        marker={"size": 11, "color": [colour for colour, _ in marks], "symbol": [symbol for _, symbol in marks]},
        error_x=whiskers(at, minimum, maximum),
        customdata=words,
        hovertemplate="<b>%{y}</b><br>%{customdata}<extra></extra>",
    )


def _with_ends(table: pd.DataFrame, value: str, low: str, high: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return values and interval ends; a missing interval has zero width."""
    middle = table[value].to_numpy(dtype=float)
    minimum, maximum = (table[name].fillna(table[value]).to_numpy(dtype=float) for name in (low, high))
    return middle, minimum, maximum


def _placed(values: np.ndarray, unit: float | None) -> np.ndarray:
    return values if unit is None else np.arcsinh(values / unit)


def _zero(figure: go.Figure, x: float, words: str, *, log: bool = False) -> None:
    """Mark the dense model; annotations on a log axis are placed at the logarithm, lines are not."""
    place = float(np.log10(x)) if log else x
    dotted(figure, x)
    note(figure, words, x=place, anchor="center", yanchor="bottom")
    figure.update_yaxes(autorange="reversed", title=None, type="category")


def _signed_log_axis(figure: go.Figure, table: pd.DataFrame, unit: float) -> None:
    ends = table[["difference", "low", "high"]].to_numpy(dtype=float)
    maximum = float(np.nanmax(np.abs(ends)))
    # Below the unit the axis is linear, and a power of ten would stand on zero.
    powers = [10.0**power for power in range(int(np.ceil(np.log10(unit))), int(np.ceil(np.log10(maximum))) + 1)]
    ticks = np.array([*(-power for power in reversed(powers)), 0.0, *powers])
    ticks = ticks[(ticks >= min(0.0, 2 * float(np.nanmin(ends)))) & (ticks <= 2 * maximum)]
    figure.update_xaxes(tickvals=_placed(ticks, unit), ticktext=[f"{tick:+g}" if tick else "0" for tick in ticks], tickangle=0)


def ratio_chart(view: OtherText, number: int = 1) -> Chart:
    """Return the models on two texts; ``number`` tells several in one report apart."""
    return Chart(
        ratio_figure(view.frame, view.own_name, view.other),
        view.frame,
        name=f"second-text-{number}",
        title=f"Perplexity over the dense model's: {view.own_name} and {view.other}",
        how="two dots a model, one for each text; the longer the line between them, the more the compression overfits its text. "
        "Whiskers are 95 % intervals, paired by window.",
        alt="Two dots for each model: its perplexity over the dense model's on both texts; the table below has the numbers",
        protocol=view.protocol,
    )


def ratio_figure(table: pd.DataFrame, own: str, other: str) -> go.Figure:
    """Draw the perplexity ratio to the dense model on two texts (columns of ``OtherText.frame``), two dots per model."""
    pairs = table[["own_ratio", "other_ratio"]].to_numpy(dtype=float)
    gaps = np.concatenate([pairs, np.full((len(pairs), 1), np.nan)], axis=1).ravel()
    names = [name for name in table["name"] for _ in range(3)]
    figure = go.Figure(go.Scatter(x=gaps, y=names, mode="lines", line={"color": GREY, "width": 2}, hoverinfo="skip", showlegend=False))
    for prefix, text, colour, symbol in (("own", own, BLUE, "circle"), ("other", other, VERMILLION, "diamond")):
        ratio, low, high = _with_ends(table, f"{prefix}_ratio", f"{prefix}_low", f"{prefix}_high")
        figure.add_trace(
            go.Scatter(
                x=ratio,
                y=table["name"].to_list(),
                name=text,
                mode="markers",
                marker={"size": 11, "color": colour, "symbol": symbol},
                error_x=whiskers(ratio, low, high, colour),
                hovertemplate=f"<b>%{{y}}</b><br>{text}: %{{x:.4g}} times the dense model's<extra></extra>",
            )
        )
    title = "Perplexity, times the dense model's on the same text (log scale)"
    finished(figure, height=_height(len(table)) + 24, x=title, y="", top=52)
    _zero(figure, 1.0, "Dense", log=True)
    figure.update_xaxes(type="log", tickformat="~g", nticks=8)
    figure.update_layout(showlegend=True, legend={"orientation": "h", "x": 0, "y": 1.0, "yref": "container", "yanchor": "top"})
    return figure


def speedup_chart(result: Sequence[Speed]) -> Chart:
    return Chart(
        speedup_figure(speedup_table(result)),
        speed_numbers(result),
        name="speedups",
        title="Speed-up over the dense model, in the same rounds",
        how="right of the dotted line the compressed model is faster; whiskers span the slowest to the fastest round.",
        alt="Dots with ranges: speed-up of each model in prefill, decode and TTFT; the tables below have the numbers",
        protocol=" ".join(f"{protocol}." for protocol in dict.fromkeys(speed.protocol for speed in result)),
    )


def speedup_figure(table: pd.DataFrame) -> go.Figure:
    """Draw the speed-up of each model (columns of ``speedup_table``): medians with the range over rounds."""
    median, low, high = _with_ends(table, "median", "low", "high")
    colours = dict(zip(table["measure"].unique(), (BLUE, ORANGE, PURPLE), strict=False))
    labels = [f"{name}, {measure.lower()}" for name, measure in zip(table["name"], table["measure"], strict=True)]
    dots = go.Scatter(
        x=median,
        y=labels,
        mode="markers+text",
        text=[f"{value:.2f}x" for value in median],
        textposition="top center",
        cliponaxis=False,
        marker={"size": 10, "color": [colours[measure] for measure in table["measure"]]},
        error_x=whiskers(median, low, high),
        hovertemplate="<b>%{y}</b><br>%{x:.3g}x<extra></extra>",
    )
    figure = go.Figure(dots)
    finished(figure, height=_height(len(table)), x="Speed-up over the dense model (above 1 is faster)", y="", top=40)
    _zero(figure, 1.0, "Dense")
    figure.layout.annotations[0].update(yshift=12)
    return figure
