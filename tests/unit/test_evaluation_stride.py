"""Perplexity with overlapping windows, against the loop that everyone writes manually."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lowrank_core.config import TextConfig
from lowrank_core.errors import ConfigError, NumericalError
from lowrank_core.evaluation import DenseReference, evaluate, score_windows
from lowrank_core.models import ModelHandle
from lowrank_core.text import WindowSet, load_windows, open_text

CONTEXT = 16


@pytest.fixture(scope="module")
def text(text_file: Path) -> TextConfig:
    return TextConfig(f"file:{text_file}", context=CONTEXT, bos="none")


@pytest.fixture(scope="module")
def tokenizer(llama: ModelHandle) -> PreTrainedTokenizerBase:
    return llama.tokenizer


def _tokens(text: TextConfig, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    return torch.tensor(tokenizer(open_text(text.reference).text("test"), add_special_tokens=False)["input_ids"])


def perplexity_by_hand(handle: ModelHandle, tokens: torch.Tensor, stride: int, bos: bool) -> tuple[float, int]:
    """The usual loop: a window ahead, -100 over what was scored before, the library's own loss times what it averaged over."""
    body, total, count, end = CONTEXT - bos, 0.0, 0, 0
    for begin in range(0, len(tokens) - body + 1, stride):
        ids = tokens[begin : begin + body]
        labels = ids.clone()
        labels[: len(ids) - (begin + body - end)] = -100
        end = begin + body
        if bos:
            ids, labels = (torch.cat([torch.tensor([first]), row]) for first, row in ((0, ids), (-100, labels)))
        with torch.no_grad():
            loss = handle.module(ids[None], labels=labels[None], use_cache=False).loss
        counted = int((labels[1:] != -100).sum())
        total, count = total + float(loss) * counted, count + counted
    return math.exp(total / count), count


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stride", [1, 5, 8, 15])
def test_perplexity_equals_the_usual_loop(llama: ModelHandle, text: TextConfig, bos: bool, stride: int) -> None:
    text = replace(text, bos="window" if bos else "none")
    tokens = _tokens(text, llama.tokenizer)[: None if stride == 15 else 200]  # few windows are all windows
    windows = load_windows(text, llama.tokenizer, "test", count=None, stride=stride)
    if stride != 15:
        windows = windows.first((len(tokens) - (CONTEXT - bos)) // stride + 1)
    expected, count = perplexity_by_hand(llama, tokens, stride, bos)
    report = evaluate(llama, windows, batch_size=32)
    assert report.tokens == count
    assert report.perplexity == pytest.approx(expected, rel=1e-5)
    assert report.stride == stride


@pytest.mark.parametrize("bos", ["none", "window"])
@pytest.mark.parametrize("stride", [1, 3, 7, 15])
def test_every_token_is_predicted_exactly_once(text: TextConfig, tokenizer: PreTrainedTokenizerBase, bos: str, stride: int) -> None:
    windows = load_windows(replace(text, bos=bos), tokenizer, "test", stride=stride)
    tokens = _tokens(text, tokenizer)
    assert windows.scored is not None
    predicted = windows.ids[:, 1:][windows.scored]
    first = 0 if bos == "window" else 1  # without BOS nothing comes before the very first token
    assert torch.equal(predicted, tokens[first : first + len(predicted)])
    assert 0 <= len(tokens) - first - len(predicted) < stride
    assert windows.predicted_tokens == len(predicted)


@pytest.mark.parametrize(("bos", "stride"), [("none", CONTEXT), ("window", CONTEXT - 1)])
def test_the_longest_stride_is_the_protocol_without_overlap(llama: ModelHandle, text: TextConfig, bos: str, stride: int) -> None:
    text = replace(text, bos=bos)
    strided, plain = (load_windows(text, llama.tokenizer, "test", count=30, stride=chosen) for chosen in (stride, None))
    assert torch.equal(strided.ids, plain.ids)
    result, expected = evaluate(llama, strided, against=llama), evaluate(llama, plain, against=llama)
    assert result.tokens == expected.tokens
    assert result.perplexity == pytest.approx(expected.perplexity, rel=1e-12)
    assert result.perplexity_interval == pytest.approx(expected.perplexity_interval, rel=1e-12)
    assert result.nll_stderr == pytest.approx(expected.nll_stderr)
    assert result.window_nll == pytest.approx(expected.window_nll)


def test_without_a_stride_perplexity_equals_the_library_s_own_loss(any_handle: ModelHandle, text: TextConfig) -> None:
    windows = load_windows(text, any_handle.tokenizer, "test", count=20)
    with torch.no_grad():
        losses = [float(any_handle.module(ids[None], labels=ids[None], use_cache=False).loss) for ids in windows.ids]
    assert evaluate(any_handle, windows).perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_more_context_helps_a_model_that_reads_it(text: TextConfig, llama: ModelHandle) -> None:
    """What a stride is for: no token of the text is predicted from little, but those of its first window."""
    windows = load_windows(text, llama.tokenizer, "test", stride=4)
    rows = evaluate(llama, windows).by_position
    assert rows is not None
    assert [(row.first, row.last) for row in rows] == [(1, 1), (2, 3), (4, 7), (8, 15)]
    assert [row.tokens for row in rows] == [1, 2, 4, 8 + 4 * (windows.windows - 1)]
    assert sum(row.nll * row.tokens for row in rows) / windows.predicted_tokens == pytest.approx(evaluate(llama, windows).nll, rel=1e-12)


def test_the_protocol_names_the_stride(text: TextConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    windows = load_windows(text, tokenizer, "test", count=3, stride=4)
    assert windows.protocol == (
        "file:sample.txt, test split: 3 overlapping windows of 16 tokens, stride 4, 23 tokens predicted once, no BOS"
    )
    assert windows.first(1).predicted_tokens == 15


def test_fewer_windows_begin_with_the_first_and_score_what_all_would(text: TextConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    few, every = (load_windows(text, tokenizer, "test", count=count, stride=4) for count in (5, None))
    assert few.scored is not None
    assert few.scored.sum(1).tolist() == [15, 4, 4, 4, 4]
    rows = {tuple(row.tolist()) for row in every.ids}
    assert all(tuple(row.tolist()) in rows for row in few.ids)


@pytest.mark.parametrize(("stride", "bos", "maximum"), [(0, "none", 16), (-1, "none", 16), (17, "none", 16), (16, "window", 15)])
def test_a_stride_out_of_range_says_the_range(
    text: TextConfig, tokenizer: PreTrainedTokenizerBase, stride: int, bos: str, maximum: int
) -> None:
    with pytest.raises(ConfigError, match=rf"at least 1 and at most {maximum}.*got {stride}\. Try --stride 8"):
        load_windows(replace(text, bos=bos), tokenizer, "test", stride=stride)


def test_a_reference_scores_the_same_positions(llama: ModelHandle, text: TextConfig) -> None:
    windows = load_windows(text, llama.tokenizer, "test", count=12, stride=4)
    dense = DenseReference.compute(llama, windows, batch_size=8)
    result, _ = score_windows(llama, windows, batch_size=8, dense=dense)
    expected, _ = score_windows(llama, windows, batch_size=8)
    torch.testing.assert_close(result.nll, expected.nll, rtol=1e-5, atol=0)


class _Poisoned(nn.Module):
    """The logits of ``module``, those at one position of one window not finite."""

    def __init__(self, module: nn.Module, window: int, position: int, value: float) -> None:
        super().__init__()
        self.module, self.config = module, module.config
        self._left, self._position, self._value = window, position, value

    def get_input_embeddings(self) -> nn.Module:
        return self.module.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        result = self.module(input_ids=input_ids, use_cache=use_cache)
        if 0 <= self._left < len(input_ids):
            result.logits[self._left, self._position] = self._value
        self._left -= len(input_ids)
        return result


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 14])
@pytest.mark.parametrize("alongside", [False, True])
@pytest.mark.parametrize("stride", [None, 4])
def test_a_window_that_diverged_is_named_scored_there_or_not(
    llama: ModelHandle, text: TextConfig, stride: int | None, alongside: bool, position: int, value: float
) -> None:
    windows: WindowSet = load_windows(text, llama.tokenizer, "test", count=30, stride=stride)
    broken = replace(llama, module=_Poisoned(llama.module, 19, position, value))  # type: ignore[arg-type]
    with pytest.raises(NumericalError, match=r"the loss of window 19 \(of 30\) is not finite"):
        evaluate(broken, windows, against=llama if alongside else None)
