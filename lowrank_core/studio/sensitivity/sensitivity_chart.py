"""Charts of measured KL against kept ratio, depth and estimates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lowrank_core.parameters import MatrixShape
from lowrank_core.studio.sensitivity.sensitivity_table import Estimate
from lowrank_core.studio.shared.chart_style import GREY, VERMILLION, axis_note, block_axis, end_labels, finished, type_style
from lowrank_core.studio.shared.formatting import kind_label
from lowrank_core.wording import given_percent

__all__ = ["depth_figure", "scatter_figure", "types_figure"]

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_FADE = 0.55  # of the least of several ratios


def _log_range(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of a log axis for the positive ones of ``values``, as exponents, with a margin."""
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (np.log10(positive.min()), np.log10(positive.max())) if positive.size else (-3.0, 0.0)
    margin = max(0.1, 0.06 * (high - low))
    return float(low - margin), float(high + margin)


def _log_axis(low: float, high: float) -> dict[str, object]:
    """Return a log axis with the powers of ten in short words, and 2 and 5 of each where there are few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    steps = (1, 2, 5) if high - low < 1.5 else (1,)
    ticks = [(step, power) for power in powers for step in steps]
    words = [_power(power) if step == 1 else f"{step}·{_power(power)}" for step, power in ticks]
    return {"type": "log", "range": [low, high], "tickvals": [step * 10.0**power for step, power in ticks], "ticktext": words}


def _power(exponent: int) -> str:
    return f"{10.0**exponent:g}" if -2 <= exponent <= 2 else "10" + str(exponent).translate(_SUPERSCRIPTS)


_HOVER = "%{x:.1%} kept, rank %{customdata[1]}<br>%{y:.3g}%{customdata[2]} nats<extra>%{customdata[0]}</extra>"


def _errors(rows: pd.DataFrame) -> list[str]:
    """Return standard errors in words; empty for a single window."""
    return ["" if pd.isna(error) else f" ± {error:.1g}" for error in rows["kl_stderr"]]


def types_figure(types: pd.DataFrame, module: pd.DataFrame, kinds: Sequence[str]) -> go.Figure:
    """Draw a curve for each type (``type_curves``), and the chosen module's own (``module_curve``) as a thick dashed one."""
    figure = go.Figure()
    ends: list[tuple[str, float, float, str]] = []
    for kind, rows in types.groupby("kind", sort=False):
        look = type_style(kinds, str(kind))
        line = {"color": look["color"], "width": 2, "dash": look["dash"]}
        _curve(figure, rows, f"all {kind_label(str(kind))}", line, "circle", ends)
    if not module.empty:
        name, kind, depth = str(module["name"].iloc[0]), str(module["kind"].iloc[0]), int(module["depth"].iloc[0])
        label = f"{kind_label(kind)} of block {depth}"
        _curve(figure, module, label, {"color": type_style(kinds, kind)["color"], "width": 3.5, "dash": "6px,4px"}, "diamond", ends, name)
    finished(figure, height=420, x="Kept of the parameters of what is compressed", y="KL, nats per token (log scale)", right=48)
    low, high = _log_range(np.concatenate([types["shown"].to_numpy(float), module["shown"].to_numpy(float)]))
    figure.update_yaxes(**_log_axis(low, high))
    figure.update_xaxes(tickformat=".0%", dtick=0.2, range=[0, 1])
    end_labels(figure, ends, low, high)
    return figure


def _curve(
    figure: go.Figure,
    rows: pd.DataFrame,
    label: str,
    line: dict[str, object],
    symbol: str,
    ends: list[tuple[str, float, float, str]],
    name: str = "",
) -> None:
    figure.add_scatter(
        x=rows["kept_share"].to_numpy(),
        y=rows["shown"].to_numpy(),
        name=name or label,
        mode="lines+markers",
        line=line,
        marker={"size": 7, "symbol": symbol},
        customdata=np.column_stack([[name or label] * len(rows), rows["rank"], _errors(rows)]),
        hovertemplate=_HOVER,
    )
    drawn = rows.dropna(subset=["shown"])
    if not drawn.empty:
        ends.append((label, float(drawn["kept_share"].iloc[-1]), math.log10(drawn["shown"].iloc[-1]), str(line["color"])))


def depth_figure(curves: pd.DataFrame, kinds: Sequence[str], chosen: MatrixShape, blocks: int) -> go.Figure:
    """Draw a curve over ``blocks`` for each kept ratio (``depth_curves`` of the chosen module's type), paler where more is kept."""
    figure = go.Figure()
    colour = type_style(kinds, chosen.kind)["color"]
    ratios = sorted(curves["kept"].unique())
    ends: list[tuple[str, float, float, str]] = []
    for index, ratio in enumerate(ratios):
        rows = curves[curves["kept"] == ratio]
        figure.add_scatter(
            x=rows["depth"].to_numpy(),
            y=rows["shown"].to_numpy(),
            name=f"{given_percent(ratio)} kept",
            mode="lines+markers",
            opacity=1 - _FADE * index / max(1, len(ratios) - 1),
            line={"color": colour, "width": 2},
            marker={"size": 6},
            customdata=rows[["name", "rank"]].assign(error=_errors(rows)).to_numpy(),
            hovertemplate="%{customdata[0]}, rank %{customdata[1]}<br>%{y:.3g}%{customdata[2]} nats<extra>"
            + f"{given_percent(ratio)} kept</extra>",
        )
        drawn = rows.dropna(subset=["shown"])
        if not drawn.empty:
            ends.append((f"{given_percent(ratio)} kept", float(drawn["depth"].iloc[-1]), math.log10(drawn["shown"].iloc[-1]), GREY))
    finished(figure, height=420, x="Block (depth, from the embedding to the head)", y="KL, nats per token (log scale)", right=84)
    low, high = _log_range(curves["shown"].to_numpy(float))
    figure.update_yaxes(**_log_axis(low, high))
    block_axis(figure, range(blocks), -0.3, blocks - 0.7)
    depth = chosen.depth
    axis_note(figure, f"block {depth}", x=depth, position=depth, anchor="left" if depth < blocks / 2 else "right", bottom=True)
    end_labels(figure, ends, low, high)
    return figure


def scatter_figure(cells: pd.DataFrame, estimate: Estimate, kinds: Sequence[str], chosen: str | None) -> go.Figure:
    """Draw measured KL against an estimate, a point for each module; the one ``chosen`` is ringed, and a prediction has its diagonal."""
    figure = go.Figure()
    drawn = cells[(cells["shown"] > 0) & (cells[estimate.name] > 0)]
    for kind, rows in drawn.groupby("kind", sort=False):
        rings = [3 if name == chosen else 0.5 for name in rows["name"]]
        colours = [VERMILLION if name == chosen else GREY for name in rows["name"]]
        figure.add_scatter(
            x=rows[estimate.name].to_numpy(),
            y=rows["shown"].to_numpy(),
            name=kind_label(str(kind)),
            mode="markers",
            marker={
                "size": [14 if name == chosen else 9 for name in rows["name"]],
                "color": type_style(kinds, str(kind))["color"],
                "symbol": type_style(kinds, str(kind))["symbol"],
                "line": {"width": rings, "color": colours},
            },
            customdata=rows[["name", "rank"]].to_numpy(),
            hovertemplate="%{customdata[0]}, rank %{customdata[1]}<br>estimate %{x:.3g}<br>measured %{y:.3g} nats<extra></extra>",
        )
    if estimate.predicts and not drawn.empty:
        ends = [drawn[[estimate.name, "shown"]].to_numpy().min(), drawn[[estimate.name, "shown"]].to_numpy().max()]
        figure.add_scatter(x=ends, y=ends, mode="lines", line={"color": GREY, "dash": "dot", "width": 1.5}, hoverinfo="skip", name="equal")
    finished(figure, height=420, x=f"{estimate.axis} (log scale)", y="Measured KL, nats per token (log scale)")
    figure.update_yaxes(**_log_axis(*_log_range(drawn["shown"].to_numpy(float))))
    figure.update_xaxes(**_log_axis(*_log_range(drawn[estimate.name].to_numpy(float))))
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, clickmode="event+select")
    return figure
