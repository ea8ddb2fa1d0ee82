"""Scores of tokens: divergences and agreements against brute force, by position, and in pieces that fit in memory."""

from __future__ import annotations

import math

import pytest
import torch
from checkpoints import VOCABULARY
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_core.compression.decomposed import decompose
from lowrank_core.config import CalibrationConfig, CompressionConfig
from lowrank_core.evaluation import EvaluationReport, evaluate, scoring
from lowrank_core.evaluation import tokens as tokens_module
from lowrank_core.evaluation.positions import position_rows
from lowrank_core.evaluation.scoring import score_tokens
from lowrank_core.evaluation.tokens import TokenScores, compare_logits
from lowrank_core.models import ModelHandle
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.text import WindowSet


@pytest.fixture(scope="module")
def smaller(llama: ModelHandle, windows: WindowSet) -> ModelHandle:
    decomposed = decompose(llama, collect_statistics(llama, windows, CalibrationConfig()), CompressionConfig(value_dense=False))
    return decomposed.compress(decomposed.allocate("uniform", 0.5), windows).handle


@pytest.fixture(scope="module")
def report(smaller: ModelHandle, llama: ModelHandle, windows: WindowSet) -> EvaluationReport:
    return evaluate(smaller, windows, against=llama)


def _probabilities(handle: ModelHandle, windows: WindowSet) -> torch.Tensor:
    with torch.no_grad():
        return torch.softmax(handle.module(windows.ids, use_cache=False).logits[:, :-1].double(), -1)


def test_the_reverse_divergence_is_the_divergence_with_roles_swapped(
    report: EvaluationReport, smaller: ModelHandle, llama: ModelHandle, windows: WindowSet
) -> None:
    swap_layers = evaluate(llama, windows, against=smaller)
    assert report.reverse_kl == pytest.approx(swap_layers.kl, rel=1e-4)
    assert report.kl == pytest.approx(swap_layers.reverse_kl, rel=1e-4)
    assert report.reverse_kl != pytest.approx(report.kl, rel=1e-4)
    p, q = _probabilities(llama, windows), _probabilities(smaller, windows)
    assert report.reverse_kl == pytest.approx(float((q * (q / p).log()).sum(-1).mean()), rel=1e-4)
    assert report.reverse_kl_interval is not None
    assert report.reverse_kl_interval[0] < report.reverse_kl < report.reverse_kl_interval[1]


def test_top_five_agreement_is_what_two_sets_have_in_common(
    report: EvaluationReport, smaller: ModelHandle, llama: ModelHandle, windows: WindowSet
) -> None:
    p, q = _probabilities(llama, windows).flatten(0, 1).tolist(), _probabilities(smaller, windows).flatten(0, 1).tolist()
    common = 0
    for dense, result in zip(p, q, strict=True):
        a, b = (set(sorted(range(VOCABULARY), key=row.__getitem__)[-5:]) for row in (dense, result))
        common += len(a & b)
    assert report.top5_agreement == pytest.approx(common / 5 / len(p))
    assert 0 < common / 5 / len(p) < 1


def test_a_model_agrees_with_itself(any_handle: ModelHandle, windows: WindowSet) -> None:
    result = evaluate(any_handle, windows, against=any_handle)
    assert result.top1_agreement == result.top5_agreement == 1
    assert result.reverse_kl == pytest.approx(0, abs=1e-7)
    assert result.reverse_kl_interval is None  # no spread: an interval of no width would read as certainty


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), vocabulary=st.integers(2, 40), spread=st.floats(0, 30))
def test_divergences_are_not_negative_and_agreements_are_shares(seed: int, vocabulary: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, dense = (spread * torch.randn(2, 3, vocabulary, generator=generator) for _ in range(2))
    ids = torch.randint(0, vocabulary, (2, 4), generator=generator)
    result = compare_logits(logits, ids, dense)
    assert result.kl is not None
    assert result.reverse_kl is not None
    assert result.top5_agreement is not None
    assert float(torch.minimum(result.kl, result.reverse_kl).min()) > -1e-4
    assert bool((result.top5_agreement >= 0).all())
    assert bool((result.top5_agreement <= 1).all())
    if vocabulary <= 5:
        assert bool((result.top5_agreement == 1).all())  # of fewer than five tokens all are among the likeliest


def test_opposite_models_have_no_likely_token_in_common() -> None:
    logits = torch.arange(10.0).repeat(1, 3, 1)
    result = compare_logits(logits, torch.zeros(1, 4, dtype=torch.int64), -logits)
    assert result.top5_agreement is not None
    assert result.top1_agreement is not None
    assert float(result.top5_agreement.max()) == float(result.top1_agreement.max()) == 0


# --- by position -----------------------------------------------------------------------------------------------------


def test_positions_average_to_the_whole(report: EvaluationReport) -> None:
    rows = report.by_position
    assert rows is not None
    assert [(row.first, row.last) for row in rows] == [(1, 1), (2, 3), (4, 7), (8, 15)]
    assert sum(row.tokens for row in rows) == report.tokens
    for whole, part in (("nll", "nll"), ("dense_nll", "dense_nll"), ("kl", "kl"), ("top1_agreement", "top1_agreement")):
        mean = sum(getattr(row, part) * row.tokens for row in rows) / report.tokens
        assert mean == pytest.approx(getattr(report, whole), rel=1e-12)


def test_a_position_has_the_mean_of_its_tokens(
    report: EvaluationReport, llama: ModelHandle, smaller: ModelHandle, windows: WindowSet
) -> None:
    p, q = _probabilities(llama, windows), _probabilities(smaller, windows)
    kl = (p * (p / q).log()).sum(-1)
    chosen = q.gather(-1, windows.ids[:, 1:, None]).squeeze(-1)
    assert report.by_position is not None
    for row in report.by_position:  # after 4 to 7 tokens the fifth to the eighth are predicted: columns 3 to 6
        assert row.kl == pytest.approx(float(kl[:, row.first - 1 : row.last].mean()), rel=1e-3)
        assert row.nll == pytest.approx(float(-chosen[:, row.first - 1 : row.last].log().mean()), rel=1e-5)


@pytest.mark.parametrize("positions", [1, 2, 3, 4, 7, 8, 20])
def test_ranges_cover_every_position_once(positions: int) -> None:
    rows = position_rows(TokenScores(torch.zeros(2, positions)))
    covered = [position for row in rows for position in range(row.first, row.last + 1)]
    assert covered == list(range(1, positions + 1))


def test_positions_without_scored_tokens_have_no_row() -> None:
    nll = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 10.0]])
    scored = torch.tensor([[False, True, False, False, False], [False, False, True, False, False]])
    (row,) = position_rows(TokenScores(nll), scored)
    assert (row.first, row.last, row.tokens, row.nll) == (2, 3, 2, 5.0)
    assert row.to_mapping() == {"first": 2, "last": 3, "tokens": 2, "nll": 5.0}


def test_without_a_dense_model_nothing_is_said_of_one(llama: ModelHandle, windows: WindowSet) -> None:
    body = evaluate(llama, windows).to_mapping()
    assert not {"dense_nll", "kl", "reverse_kl", "top5_agreement", "stride"} & set(body)
    rows = body["by_position"]
    assert isinstance(rows, list)
    assert all(set(row) == {"first", "last", "tokens", "nll"} for row in rows)


# --- in pieces -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [True, False])
def test_pieces_give_the_whole(
    smaller: ModelHandle, llama: ModelHandle, windows: WindowSet, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No piece is larger than was allowed: the memory that a large vocabulary takes is bounded, at any batch size."""
    alongside = llama if dense else None
    whole = score_tokens(smaller, windows, batch_size=16, dense=alongside)
    sizes, passes = [], []
    compare, forward = tokens_module._compare_chunk, scoring.logits_of
    monkeypatch.setattr(tokens_module, "_compare_chunk", lambda *a: sizes.append(4 * a[0].numel()) or compare(*a))
    monkeypatch.setattr(scoring, "logits_of", lambda module, ids: passes.append(len(ids)) or forward(module, ids))
    monkeypatch.setattr(tokens_module, "_CHUNK_BYTES", 4 * 3 * 2 * VOCABULARY)
    monkeypatch.setattr(scoring, "_PASS_BYTES", 4 * 3 * 16 * VOCABULARY)
    pieces = score_tokens(smaller, windows, batch_size=16, dense=alongside)
    assert max(sizes) == 4 * 3 * 2 * VOCABULARY
    assert max(passes) == 3
    assert set(pieces.columns) == set(whole.columns)
    for name, column in pieces.columns.items():
        torch.testing.assert_close(column, whole.columns[name], rtol=1e-4, atol=1e-6)


def test_a_window_larger_than_the_limit_goes_alone(llama: ModelHandle, windows: WindowSet, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate(llama, windows).perplexity
    monkeypatch.setattr(scoring, "_PASS_BYTES", 1)
    monkeypatch.setattr(tokens_module, "_CHUNK_BYTES", 1)
    assert evaluate(llama, windows).perplexity == pytest.approx(expected, rel=1e-6)


def test_logits_in_bfloat16_are_compared_in_float32() -> None:
    logits = torch.tensor([[[0.0, 1.0, 2.0]]], dtype=torch.bfloat16)
    result = compare_logits(logits, torch.tensor([[0, 2]]), logits)
    assert float(result.nll) == pytest.approx(math.log(1 + math.exp(-1) + math.exp(-2)), rel=1e-6)
    assert result.nll.dtype == torch.float64
