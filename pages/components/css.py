"""CSS beyond the theme: margins for widths from 400 to 1280 pixels."""

from __future__ import annotations

import streamlit as st

__all__ = ["apply"]

_CSS = """
<style>
.stMainBlockContainer { padding: 3.4rem 2.4rem 4rem; max-width: 1480px; }
[data-testid="stSidebarUserContent"] { padding-top: 1rem; }
[data-testid="stMetricLabel"] p { font-size: 0.82rem; }
[data-testid="stSidebarUserContent"] [data-testid="stSelectbox"] * { font-size: 0.84rem; }
/* Its running man would blink with every tick of a live run. */
[data-testid="stStatusWidget"] { display: none; }
/* Streamlit writes axes in a grey of 3.6 : 1 on a white page. */
.stPlotlyChart :is([class$="tick"] text, text[class$="title"], .cbaxis text, .cbtitle text),
.stVegaLiteChart :is(.role-axis-label, .role-axis-title, .role-legend-label) text { fill: currentColor !important; fill-opacity: 0.8; }
/* Words in charts keep clear of the lines behind them. */
.stPlotlyChart .annotation-text, .stVegaLiteChart .role-mark text {
  paint-order: stroke; stroke: light-dark(#FCFCFA, #11161B); stroke-width: 4px; stroke-linejoin: round;
}
h1 { padding-bottom: 0.2rem !important; }
@media (max-width: 640px) {
  .stMainBlockContainer { padding: 3.4rem 0.9rem 3rem; }
  [data-testid="stMain"] :is([data-testid="stPageLink-NavLink"], [data-testid="stPopover"]) * { white-space: normal; }
}
</style>
"""


def apply() -> None:
    """Apply the styles."""
    st.html(_CSS)
