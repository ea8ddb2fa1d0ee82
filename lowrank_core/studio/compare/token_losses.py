"""Token-level losses of the compressed against the dense model, as a table and as a coloured text."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lowrank_core.errors import RunError
from lowrank_core.runs import JsonMapping
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studies.requests import TokensAnswer, answers_in
from lowrank_core.studio.shared.formatting import number
from lowrank_core.studio.shared.table import Column, Table
from lowrank_core.studio.shared.trial_names import model_name
from lowrank_core.wording import fixed

__all__ = ["TokenStrip", "strip_html", "strips", "worst_spec", "worst_tokens"]

_MIN_SCALE = 0.1  # nats: below, differences are noise of rounding, and would be painted as losses
_QUANTILE = 0.98
_BEFORE = 32  # characters of context in the table


@dataclass(frozen=True)
class TokenStrip:
    """A text evaluated by both models.

    Attributes:
        name: of the compressed model; protocol: which text, and how many tokens.
        beginning: characters of the first token, which nobody predicts (empty where BOS goes first).
        frame: a row for each predicted token: position, piece (its characters), nll, dense_nll, extra (nll - dense_nll), kl,
            likeliest and dense_likeliest (the token that each model held likeliest); nats.
        scale: nats at which colours end, on both sides.
    """

    name: str
    protocol: str
    beginning: str
    frame: pd.DataFrame
    scale: float

    @property
    def title(self) -> str:
        """Name and beginning of the text: stable and distinct."""
        text = " ".join((self.beginning + "".join(self.frame["piece"])).split())
        return f"{self.name}: {text[:48]}{'…' if len(text) > 48 else ''}"

    @property
    def words(self) -> str:
        extra = self.frame["extra"]
        return (
            f"Mean extra loss {extra.mean():+z.3g} nats per token; half of the extra loss lies in {_few(extra)} of {len(extra)} tokens; "
            f"dense {number(self.frame['dense_nll'].mean(), 4)}, compressed {number(self.frame['nll'].mean(), 4)} nats per token."
        )


def _few(extra: pd.Series) -> int:
    """Return the number of tokens that carry half of the positive extra loss."""
    losses = np.sort(np.clip(extra.to_numpy(dtype=float), 0.0, None))[::-1]
    total = losses.sum()
    return int(np.searchsorted(np.cumsum(losses), total / 2) + 1) if total > 0 else 0


def strips(bodies: Sequence[JsonMapping], trials: Sequence[TrialRecord] = ()) -> list[TokenStrip]:
    """Return the evaluated texts, the newest first; each text and model once.

    Raises:
        RunError: an answer is damaged.
    """
    result: dict[tuple[str, tuple[object, ...]], TokenStrip] = {}
    for answer in answers_in(bodies, TokensAnswer):
        key = answer.filed_as, answer.losses.pieces
        result.pop(key, None)
        result[key] = _strip(answer, model_name(key[0], trials))
    return list(reversed(result.values()))


def _strip(answer: TokensAnswer, name: str) -> TokenStrip:
    losses = answer.losses
    columns = (losses.nll, losses.dense_nll, losses.kl, losses.likeliest, losses.dense_likeliest)
    if not losses.nll or any(len(column) != len(losses.pieces) - 1 for column in columns):
        raise RunError("a token strip does not have one value for each token. Measure it again.")
    beginning, *pieces = map(str, losses.pieces)
    frame = pd.DataFrame({"position": range(1, len(pieces) + 1), "piece": pieces, "nll": losses.nll, "dense_nll": losses.dense_nll})
    frame = frame.astype({"nll": float, "dense_nll": float})
    frame["extra"] = frame["nll"] - frame["dense_nll"]
    frame["kl"] = losses.kl
    frame["likeliest"], frame["dense_likeliest"] = (list(map(str, words)) for words in (losses.likeliest, losses.dense_likeliest))
    scale = max(_MIN_SCALE, float(frame["extra"].abs().quantile(_QUANTILE)))
    return TokenStrip(name, answer.protocol, beginning, frame, scale)


def worst_tokens(strip: TokenStrip, count: int = 15) -> pd.DataFrame:
    """Return the ``count`` tokens of largest extra loss, in order; ``before`` is the preceding text with visible white space."""
    text, before = strip.beginning, []
    for piece in strip.frame["piece"]:
        before.append(_visible(text[-_BEFORE:]))
        text += piece
    frame = strip.frame.assign(before=before)
    for name in ("piece", "likeliest", "dense_likeliest"):
        frame[name] = frame[name].map(_visible)
    return frame.nlargest(count, "extra").reset_index(drop=True)


def worst_spec(strip: TokenStrip, count: int = 15, number: int = 1) -> Table:
    """Return ``worst_tokens`` as it is shown; ``number`` tells several in one report apart."""
    columns = (
        Column.whole("position", "Position"),
        Column.text("before", "After", "The text before it; ␣ is a space, ⏎ a line break.", width="medium"),
        Column.short("piece", "Token"),
        Column.number("extra", "Extra loss (nats)", 3, "Compressed minus dense.", 3),
        Column.number("dense_nll", "Dense (nats)", 3, "-log p.", 3),
        Column.number("nll", "Compressed (nats)", 3, "-log q.", 3),
        Column.number("kl", "KL (nats)", 3, "KL(dense ‖ compressed).", 3),
        Column.short("dense_likeliest", "Dense expects"),
        Column.short("likeliest", "Compressed expects"),
    )
    caption = f"Tokens with the largest extra loss of {strip.name}; the file has all tokens. {strip.protocol}"
    return Table(worst_tokens(strip, count), columns, caption, f"tokens-{number}", strip.frame)


def _visible(text: str) -> str:
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "(part of a character)"


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
