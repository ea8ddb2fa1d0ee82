import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import VOCABULARY
from torch.nn import functional

from lowrank_core.compression.decomposed import decompose
from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource
from lowrank_core.errors import ConfigError, ModelError, NumericalError, TextError
from lowrank_core.evaluation import DenseReference, WindowScores, evaluate, score_windows
from lowrank_core.evaluation.generation import continue_prompt
from lowrank_core.evaluation.intervals import bootstrap_interval
from lowrank_core.evaluation.tokens import score_coarse
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.search.objective import objective_value
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.text import WindowSet


@pytest.fixture(scope="module")
def smaller(llama: ModelHandle, windows: WindowSet) -> ModelHandle:
    decomposed = decompose(llama, collect_statistics(llama, windows, CalibrationConfig()), CompressionConfig(value_dense=False))
    return decomposed.compress(decomposed.allocate("uniform", 0.5), windows).handle


def perplexity_by_hand(handle: ModelHandle, windows: WindowSet) -> float:
    """Ten independent lines: one window at a time, the library's own cross entropy, a plain sum."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids in windows.ids:
            logits = handle.module(ids[None], use_cache=False).logits[0]
            total += float(functional.cross_entropy(logits[:-1].double(), ids[1:], reduction="sum"))
            tokens += len(ids) - 1
    return math.exp(total / tokens)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_perplexity_equals_an_independent_implementation(any_handle: ModelHandle, windows: WindowSet, batch_size: int) -> None:
    report = evaluate(any_handle, windows, batch_size=batch_size)
    assert report.perplexity == pytest.approx(perplexity_by_hand(any_handle, windows), rel=1e-5)
    assert report.tokens == 40 * 15
    assert report.perplexity == pytest.approx(math.exp(report.nll))
    assert "no BOS" in report.protocol
    assert "600 tokens predicted" in report.protocol


def test_the_standard_error_is_that_of_window_means(llama: ModelHandle, windows: WindowSet) -> None:
    report = evaluate(llama, windows)
    assert report.nll_stderr == pytest.approx(np.std(report.window_nll, ddof=1) / math.sqrt(40))
    low, high = report.perplexity_interval
    assert low < report.perplexity < high


def test_one_window_has_no_standard_error(llama: ModelHandle, windows: WindowSet) -> None:
    assert evaluate(llama, replace(windows, ids=windows.ids[:1])).nll_stderr is None


def test_a_model_beside_itself_differs_by_nothing(llama: ModelHandle, windows: WindowSet) -> None:
    report = evaluate(llama, windows, against=llama)
    assert report.kl == pytest.approx(0, abs=1e-7)
    assert report.top1_agreement == 1
    assert report.perplexity == report.dense_perplexity
    assert report.perplexity_difference_interval is None  # no spread was seen: (0, 0) would read as certainty
    assert report.compression_ratio == 0


def test_kl_and_agreement_are_those_of_the_distributions(llama: ModelHandle, smaller: ModelHandle, windows: WindowSet) -> None:
    report = evaluate(smaller, windows, against=llama)
    with torch.no_grad():
        p, q = (torch.softmax(m.module(windows.ids, use_cache=False).logits[:, :-1].double(), -1) for m in (llama, smaller))
    assert report.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert report.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    scores, _ = score_windows(smaller, windows, dense=llama)
    assert scores.reverse_kl is not None
    assert float(scores.reverse_kl.mean()) == pytest.approx(float((q * (q / p).log()).sum(-1).mean()), rel=1e-4)


def test_a_cached_reference_gives_the_same_scores(llama: ModelHandle, smaller: ModelHandle, windows: WindowSet) -> None:
    cached = DenseReference.compute(llama, windows, batch_size=8, reverse=True)
    first, _ = score_windows(smaller, windows, batch_size=8, dense=cached)
    second, dense = score_windows(smaller, windows, batch_size=8, dense=llama)
    assert torch.equal(first.nll, second.nll)
    assert first.kl is not None
    assert second.kl is not None
    assert torch.equal(first.kl, second.kl)
    assert dense is not None


def test_a_trial_s_short_way_gives_the_same_nll_and_kl_to_rounding(llama: ModelHandle, smaller: ModelHandle, windows: WindowSet) -> None:
    short = DenseReference.compute(llama, windows, batch_size=8)
    full, _ = score_windows(smaller, windows, batch_size=8, dense=llama)
    result, _ = score_windows(smaller, windows, batch_size=8, dense=short)
    same, _ = score_windows(llama, windows, batch_size=8, dense=short)
    assert result.kl is not None
    assert full.kl is not None
    assert same.kl is not None
    torch.testing.assert_close(result.nll, full.nll, rtol=1e-6, atol=0)
    torch.testing.assert_close(result.kl, full.kl, rtol=1e-4, atol=1e-6)
    assert float(same.kl.abs().max()) < 1e-6


def test_a_trial_s_short_way_is_not_biased_by_rounding(llama: ModelHandle, smaller: ModelHandle, windows: WindowSet) -> None:
    """Logits enter KL times Σ p - 1: what a float32 softmax misses of 1 would show in the fifth digit of a trial's value."""
    dense = DenseReference.compute(llama, windows, batch_size=8)
    missing = torch.cat(dense.batches).double().sum(-1) - 1
    assert float(missing.abs().mean()) < 2e-8
    assert dense.entropies is not None
    with torch.no_grad():
        logits = llama.module(windows.ids, use_cache=False).logits[:, :-1].double()
    expected = -torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(torch.cat(dense.entropies), expected, rtol=1e-6, atol=0)


def test_a_window_that_diverged_is_never_skipped(llama_checkpoint: str, windows: WindowSet) -> None:
    handle = load_model(ModelSource(str(llama_checkpoint)))
    handle.module.get_input_embeddings().weight.data[int(windows.ids[3, 2])] = float("nan")
    with pytest.raises(NumericalError, match=r"the loss of window \d+ \(of 40\) is not finite"):
        evaluate(handle, windows)


def test_windows_longer_than_the_context_are_refused(llama: ModelHandle) -> None:
    long = WindowSet("text", "test", torch.zeros(1, 65, dtype=torch.int64), bos=False, available_tokens=65)
    with pytest.raises(ModelError, match=r"65 tokens.*takes 64.*Lower --context"):
        evaluate(llama, long)


def test_models_of_different_vocabularies_are_not_compared(llama: ModelHandle, windows: WindowSet) -> None:
    other = load_model(ModelSource(llama.reference))
    other.tokenizer.add_tokens(["brand-new"])
    with pytest.raises(ModelError, match="different vocabularies"):
        evaluate(llama, windows, against=other)


def test_a_reference_that_would_not_fit_says_what_to_lower(llama: ModelHandle, monkeypatch: pytest.MonkeyPatch, windows: WindowSet) -> None:
    monkeypatch.setattr("lowrank_core.evaluation.reference._CACHE_LIMIT_BYTES", 1000)
    with pytest.raises(TextError, match=r"--top-k 128.*take fewer windows.*lower --context"):
        DenseReference.compute(llama, windows, batch_size=8)
    for options in ({"reverse": True}, {"top_k": 4}):  # what can't be had, or is had already, is not proposed
        named = r"compare with. Take fewer windows \(--validation-windows; as published: --selected-windows\), or lower"
        with pytest.raises(TextError, match=named):
            DenseReference.compute(llama, windows, batch_size=8, **options)  # type: ignore[arg-type]


def _kl(smaller: ModelHandle, llama: ModelHandle, windows: WindowSet, top_k: int, batch_size: int = 8) -> np.ndarray:
    dense = DenseReference.compute(llama, windows, batch_size=batch_size, top_k=top_k)
    scores, _ = score_windows(smaller, windows, batch_size=batch_size, dense=dense)
    assert scores.kl is not None
    assert scores.kl.dtype == scores.nll.dtype == torch.float64
    return scores.kl.numpy()


def test_kl_on_the_likeliest_tokens_is_a_lower_bound_that_rises_to_the_whole(
    smaller: ModelHandle, llama: ModelHandle, windows: WindowSet
) -> None:
    whole = _kl(smaller, llama, windows, 0)
    result = [_kl(smaller, llama, windows, k) for k in (1, 4, 16, 64, VOCABULARY)]
    for lower, higher in itertools.pairwise(result):
        assert (lower <= higher + 1e-7).all()
    assert (result[0] >= -1e-7).all()
    np.testing.assert_allclose(result[-1], whole, atol=1e-6)
    np.testing.assert_array_equal(_kl(smaller, llama, windows, 10 * VOCABULARY), result[-1])
    assert result[0].mean() < 0.9 * whole.mean()


def test_kl_on_the_likeliest_tokens_is_that_of_k_and_the_rest(smaller: ModelHandle, llama: ModelHandle, windows: WindowSet) -> None:
    with torch.no_grad():
        p, q = (torch.softmax(m.module(windows.ids, use_cache=False).logits[:, :-1].double(), -1) for m in (llama, smaller))
    kept = p.topk(5, -1).indices
    p, q = p.gather(-1, kept), q.gather(-1, kept)
    others, theirs = 1 - p.sum(-1), 1 - q.sum(-1)
    manual = (p * (p / q).log()).sum(-1) + others * (others / theirs).log()
    np.testing.assert_allclose(_kl(smaller, llama, windows, 5), manual.mean(1), rtol=1e-4, atol=1e-7)


def test_a_rest_too_small_for_a_float_keeps_its_logarithm() -> None:
    """The rest has e^-200 of the dense mass and e^-150 of the other's: 1 - Σ would be 0, and its logarithm no number."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    dense = torch.tensor([[[0.0, -200.0]]])
    indices = torch.zeros(1, 1, 1, dtype=torch.int32)
    scores = score_coarse(torch.tensor([[[0.0, -150.0, -160.0]]]), ids, dense, indices)
    assert scores.kl is not None
    assert float(scores.kl) == pytest.approx(0, abs=1e-12)
    swap_layers = score_coarse(torch.tensor([[[-150.0, 0.0, -1.0]]]), ids, dense, indices)
    assert swap_layers.kl is not None
    assert float(swap_layers.kl) == pytest.approx(150 + math.log1p(math.exp(-1)))
    assert float(swap_layers.nll) == float(swap_layers.kl)


def test_a_model_beside_its_own_likeliest_tokens_differs_by_nothing(any_handle: ModelHandle, windows: WindowSet) -> None:
    assert abs(_kl(any_handle, any_handle, windows, 16)).max() < 1e-6


@pytest.mark.parametrize("top_k", [0, 16])
def test_scores_do_not_depend_on_the_batches(smaller: ModelHandle, llama: ModelHandle, windows: WindowSet, top_k: int) -> None:
    expected = _kl(smaller, llama, windows, top_k, 64)
    for size in (1, 7):
        np.testing.assert_allclose(_kl(smaller, llama, windows, top_k, size), expected, rtol=1e-4, atol=1e-6)


def test_a_reference_of_other_batches_is_refused(smaller: ModelHandle, llama: ModelHandle, windows: WindowSet) -> None:
    dense = DenseReference.compute(llama, windows, batch_size=8, top_k=4)
    with pytest.raises(ConfigError, match=r"holds 40 windows, 8 in a batch; asked for were 40 in batches of 1\."):
        score_windows(smaller, windows, batch_size=1, dense=dense)
    with pytest.raises(ConfigError, match="asked for were 8 in batches of 8"):
        score_windows(smaller, windows.first(8), batch_size=8, dense=dense)


def test_the_likeliest_tokens_take_the_memory_of_so_many(llama: ModelHandle, windows: WindowSet, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = DenseReference.compute(llama, windows, batch_size=8, top_k=4)
    assert {batch.shape[-1] for batch in dense.batches} == {5}
    assert {(batch.shape[-1], batch.dtype) for batch in dense.indices} == {(4, torch.int32)}
    np.testing.assert_allclose(torch.cat(dense.batches).double().exp().sum(-1), 1, atol=1e-5)
    monkeypatch.setattr("lowrank_core.evaluation.reference._CACHE_LIMIT_BYTES", windows.predicted_tokens * 4 * VOCABULARY - 1)
    DenseReference.compute(llama, windows, batch_size=8, top_k=4)
    with pytest.raises(TextError):
        DenseReference.compute(llama, windows, batch_size=8)


def test_the_reverse_divergence_takes_every_token(llama: ModelHandle, windows: WindowSet) -> None:
    with pytest.raises(ConfigError, match="leave top-k at 0, or choose the objective kl"):
        DenseReference.compute(llama, windows, batch_size=8, top_k=4, reverse=True)
    with pytest.raises(ConfigError, match="at least 0, got -1"):
        DenseReference.compute(llama, windows, batch_size=8, top_k=-1)


@pytest.mark.parametrize("top_k", [0, 16])
def test_nll_does_not_depend_on_the_reference_nor_on_the_batches(
    smaller: ModelHandle, llama: ModelHandle, windows: WindowSet, top_k: int
) -> None:
    plain, _ = score_windows(smaller, windows, batch_size=8)
    for size in (3, 8):
        dense = DenseReference.compute(llama, windows, batch_size=size, top_k=top_k)
        scores, _ = score_windows(smaller, windows, batch_size=size, dense=dense)
        np.testing.assert_allclose(scores.nll, plain.nll, rtol=1e-5)


@pytest.mark.parametrize("top_k", [0, 16])
def test_every_batch_is_told_in_order(smaller: ModelHandle, llama: ModelHandle, windows: WindowSet, top_k: int) -> None:
    dense = DenseReference.compute(llama, windows, batch_size=16, top_k=top_k)
    reported: list[WindowScores] = []
    scores, _ = score_windows(smaller, windows, batch_size=16, dense=dense, on_batch=reported.append)
    assert [len(batch.nll) for batch in reported] == [16, 16, 8]
    assert scores.kl is not None
    assert torch.equal(torch.cat([batch.kl for batch in reported if batch.kl is not None]), scores.kl)
    assert torch.equal(torch.cat([batch.nll for batch in reported]), scores.nll)


def test_who_is_told_may_end_the_pass(smaller: ModelHandle, windows: WindowSet) -> None:
    reported: list[WindowScores] = []

    def stop(scores: WindowScores) -> None:
        reported.append(scores)
        if len(reported) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        score_windows(smaller, windows, batch_size=8, on_batch=stop)
    assert len(reported) == 2


class _Poisoned(torch.nn.Module):
    """Logits of ``module``, of which one is not finite from a given window on."""

    def __init__(self, module: torch.nn.Module, window: int, value: float) -> None:
        super().__init__()
        self.module, self._left, self._value = module, window, value

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        result = self.module(input_ids=input_ids, use_cache=use_cache)
        result.logits[max(self._left, 0) :, 2, 5] = self._value
        self._left -= len(input_ids)
        return result


@pytest.mark.parametrize(("top_k", "value"), [(0, math.nan), (16, math.nan), (0, math.inf), (16, math.inf), (VOCABULARY, -math.inf)])
def test_a_window_that_diverged_is_named_and_never_told(llama: ModelHandle, windows: WindowSet, top_k: int, value: float) -> None:
    dense = DenseReference.compute(llama, windows, batch_size=4, top_k=top_k)
    broken = replace(llama, module=_Poisoned(llama.module, 22, value))  # type: ignore[arg-type]
    reported: list[WindowScores] = []
    with pytest.raises(NumericalError, match=r"the loss of window 22 \(of 40\) is not finite"):
        score_windows(broken, windows, batch_size=4, dense=dense, on_batch=reported.append)
    assert len(reported) == 5


@pytest.mark.parametrize("top_k", [0, 16])
def test_in_bfloat16_scores_are_near_and_the_model_is_left_alone(
    smaller: ModelHandle, llama: ModelHandle, windows: WindowSet, top_k: int
) -> None:
    dense = DenseReference.compute(llama, windows, batch_size=8, top_k=top_k)
    before = {name: value.clone() for name, value in smaller.module.state_dict().items()}
    whole, _ = score_windows(smaller, windows, batch_size=8, dense=dense)
    cheap, _ = score_windows(smaller, windows, batch_size=8, dense=dense, autocast=True)
    assert whole.kl is not None
    assert cheap.kl is not None
    assert not torch.equal(cheap.nll, whole.nll)
    np.testing.assert_allclose(cheap.nll, whole.nll, rtol=2**-7)
    np.testing.assert_allclose(cheap.kl, whole.kl, rtol=0.1, atol=1e-4)
    assert cheap.nll.dtype == cheap.kl.dtype == torch.float64
    assert all(
        torch.equal(before[name], value) and before[name].dtype == value.dtype for name, value in smaller.module.state_dict().items()
    )


def test_bfloat16_is_for_the_model_and_not_for_the_one_beside_it(smaller: ModelHandle, llama: ModelHandle, windows: WindowSet) -> None:
    whole, first = score_windows(smaller, windows, dense=llama)
    cheap, second = score_windows(smaller, windows, dense=llama, autocast=True)
    assert first is not None
    assert second is not None
    assert torch.equal(first.nll, second.nll)
    assert not torch.equal(whole.nll, cheap.nll)


def test_bootstrap_intervals_cover() -> None:
    """Over 200 draws of 60 windows, the 95 % interval holds the true mean in at least 88 % of them."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval(lambda mean: mean, generator.normal(2.0, 1.0, size=60))
        hits += low <= 2.0 <= high
    assert 176 <= hits < 200


def test_objectives_are_what_they_say() -> None:
    scores = WindowScores(torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.6]), torch.tensor([1.0, 1.0]))
    assert objective_value("kl", scores, 100) == pytest.approx(0.2)
    assert objective_value("perplexity", scores, 100) == pytest.approx(math.exp(2))
    assert objective_value("bolaco", scores, 100) == pytest.approx(math.exp(2) + 1e-3 * 0.4 * 100)


def test_an_objective_that_overflows_is_a_failure() -> None:
    with pytest.raises(NumericalError, match="diverged"):
        objective_value("perplexity", WindowScores(torch.tensor([2000.0])), 10)


def test_greedy_continuations_repeat_and_seeds_matter_only_for_sampling(llama: ModelHandle) -> None:
    first = continue_prompt(llama, "the rank", tokens=8)
    assert first == continue_prompt(llama, "the rank", tokens=8, seed=5)
    sampled = {continue_prompt(llama, "the rank", tokens=8, seed=seed, temperature=1.0) for seed in range(4)}
    assert len(sampled) > 1
    assert continue_prompt(llama, "the rank", tokens=8, seed=1, temperature=1.0) in sampled


def test_a_prompt_beyond_the_context_is_refused(llama: ModelHandle) -> None:
    from lowrank_core.errors import ConfigError

    with pytest.raises(ConfigError, match="passes the model's 64"):
        continue_prompt(llama, "rank " * 60, tokens=30)
