"""A text coloured by the extra loss of each token."""

from __future__ import annotations

import html

from lowrank_core.studio.compare.token_losses import TokenStrip
from lowrank_core.wording import fixed

__all__ = ["strip_html"]

_WORSE, _BETTER = "213, 94, 0", "0, 114, 178"  # Okabe-Ito vermillion and blue, whose lightness tells them apart, too
_DEEPEST = 0.75  # opacity: the text stays readable on light and dark pages
_FAINTEST = 0.04


def strip_html(strip: TokenStrip) -> str:
    """Return the text as HTML: a span with a tooltip per token, below a colour key.

    Nothing of the text is markup: it is escaped, in the spans and in their tooltips.
    """
    spans = [f"<span>{html.escape(strip.beginning)}</span>"] if strip.beginning else []
    columns = (strip.frame[name] for name in ("piece", "extra", "dense_nll", "nll", "kl", "dense_likeliest", "likeliest"))
    for piece, extra, dense, ours, kl, theirs, mine in zip(*columns, strict=True):
        tip = (
            f"{fixed(extra, 3, signed=True)} nats; dense {fixed(dense, 3)}, compressed {fixed(ours, 3)}, KL {fixed(kl, 3)}; "
            f"most likely: dense {theirs!r}, compressed {mine!r}"
        )
        spans.append(f'<span title="{html.escape(tip, quote=True)}"{_style(extra, strip.scale)}>{_shown(piece)}</span>')
    style = "white-space: pre-wrap; overflow-wrap: anywhere; font-family: monospace; font-size: 0.9rem; line-height: 1.7"
    return f'{_key(strip.scale)}<div style="{style}">{"".join(spans)}</div>'


def _shown(piece: str) -> str:
    """Return an escaped piece with a sign for each line break."""
    return html.escape(piece).replace("\n", "⏎\n")


def _style(extra: float, scale: float) -> str:
    depth = _DEEPEST * min(1.0, abs(extra) / scale)
    if depth < _FAINTEST:
        return ""
    return f' style="background-color: rgba({_WORSE if extra > 0 else _BETTER}, {depth:.2f}); border-radius: 2px"'


def _key(scale: float) -> str:
    ends = f"rgba({_BETTER}, {_DEEPEST}), transparent, rgba({_WORSE}, {_DEEPEST})"
    bar = f'<span style="display: inline-block; width: 9rem; height: 0.7rem; background: linear-gradient(to right, {ends})"></span>'
    row = "display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem; font-size: 0.8rem; margin-bottom: 0.6rem"
    return f'<div style="{row}"><span>better by {scale:.2g} nats or more</span>{bar}<span>worse by {scale:.2g} nats or more</span></div>'
