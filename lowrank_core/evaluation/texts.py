"""Two models over one piece of text, token by token."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowrank_core.errors import ConfigError, NumericalError
from lowrank_core.evaluation.passes import logits_of
from lowrank_core.evaluation.tokens import compare_logits
from lowrank_core.models.handle import ModelHandle
from lowrank_core.runs.measurements import TextLosses

__all__ = ["losses_of", "pieces_of", "tokens_of_text"]

_DECIMALS = 4


def tokens_of_text(handle: ModelHandle, text: str, *, bos: bool, maximum: int) -> tuple[Tensor, int]:
    """Return the first ``most`` tokens of a text (T,), with BOS if requested, and the number of tokens left out.

    Raises:
        ConfigError: fewer than two tokens: nothing would be predicted.
    """
    result = list(handle.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    ids = ([handle.tokenizer.bos_token_id] if bos else []) + result
    if len(ids) < 2:
        raise ConfigError("the text has fewer than two tokens, so there is nothing to predict. Give a sentence or more.")
    return torch.tensor(ids[:maximum], dtype=torch.int64), max(0, len(ids) - maximum)


def losses_of(handle: ModelHandle, dense: ModelHandle, ids: Tensor) -> TextLosses:
    """Run both models over the tokens ``ids`` (T,) of one text.

    Raises:
        ModelError: the tokens do not fit the model.
        NumericalError: a token's loss is NaN or Inf.
    """
    row = ids[None]
    handle.check_tokens(row)
    ours, theirs = logits_of(handle.module, row.to(handle.device)), logits_of(dense.module, row.to(dense.device))
    scores = compare_logits(ours, row.to(handle.device), theirs).cpu()
    assert scores.dense_nll is not None
    assert scores.kl is not None
    columns = (scores.nll, scores.dense_nll, scores.kl)
    if not all(bool(torch.isfinite(column).all()) for column in columns):
        raise NumericalError("the loss of a token is not finite: the model diverged. Keep more ranks, or run in float32.")
    nll, dense_nll, kl = (tuple(round(float(value), _DECIMALS) for value in column[0]) for column in columns)
    words = [tuple(_word(handle.tokenizer, int(token)) for token in logits[0].argmax(-1)) for logits in (ours, theirs)]
    return TextLosses(pieces_of(handle.tokenizer, ids.tolist()), nll, dense_nll, kl, words[0], words[1])


def _word(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[str, ...]:
    """Return what each token adds to the text; a character of several tokens stands with the last of them, special tokens are empty.

    Tokens are decoded with all before them: alone, one may lose its leading blank or be part of a character.
    """
    pieces, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))
        unfinished = text.endswith("\ufffd") and end < len(ids)
        pieces.append("" if unfinished else text[len(shown) :])
        shown = shown if unfinished else text
    return tuple(pieces)
