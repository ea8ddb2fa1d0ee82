"""Tokens per second and memory: what is counted, who goes when, and that what is timed is what `generate` does."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from itertools import accumulate, chain, repeat
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from lowrank_core.cli import main
from lowrank_core.config import ModelSource
from lowrank_core.errors import ConfigError, ModelError
from lowrank_core.models import ModelHandle
from lowrank_core.speed import MemoryReport, SpeedComparison, SpeedConfig, Spread, compare_speed, in_turns, measure_memory, measure_speed
from lowrank_core.speed import memory as memory_module
from lowrank_core.speed.timing import Clock, Timing, prompt_for, report_of, timed_generation

SMALL = SpeedConfig(batch_size=2, prompt_tokens=7, new_tokens=5, rounds=3)


def _clock(*generations: tuple[float, float, float]) -> Clock:
    """Tells, generation by generation, that reading, choosing the first token and writing the others took so long."""
    steps = chain.from_iterable((0.0, *generation) for generation in generations)
    moments: Iterator[float] = accumulate(steps, initial=100.0)
    next(moments)
    return lambda: next(moments)


def test_a_spread_is_the_median_with_the_extremes():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of(iter([4.0, 1.0])) == Spread(2.5, 1.0, 4.0)


def test_turns_change_who_goes_first_and_keep_the_order_of_results():
    calls: list[str] = []
    actions = [lambda name=name: calls.append(name) or name for name in "abc"]
    assert in_turns(actions, 3) == [("a", "b", "c")] * 3
    assert "".join(calls) == "abccbaabc"


def test_the_tokens_are_those_that_generate_chooses(any_handle: ModelHandle):
    prompt = prompt_for(any_handle, SMALL)
    _, tokens = timed_generation(any_handle, prompt, 12)
    greedy = GenerationConfig(max_new_tokens=12, do_sample=False, use_cache=True, pad_token_id=0)
    expected = any_handle.module.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy)
    assert torch.equal(tokens, expected[:, 7:])


def test_the_first_token_is_that_of_a_plain_forward(any_handle: ModelHandle):
    prompt = prompt_for(any_handle, SMALL)
    _, tokens = timed_generation(any_handle, prompt, 2)
    logits = any_handle.module(input_ids=prompt, use_cache=False).logits
    assert torch.equal(tokens[:, 0], logits[:, -1].argmax(-1))
    longer = torch.cat([prompt, tokens[:, :1]], dim=1)
    assert torch.equal(tokens[:, 1], any_handle.module(input_ids=longer, use_cache=False).logits[:, -1].argmax(-1))


def test_prompts_are_the_same_each_time_and_in_the_vocabulary(llama: ModelHandle):
    prompt = prompt_for(llama, SMALL)
    assert prompt.shape == (2, 7)
    assert torch.equal(prompt, prompt_for(llama, SMALL))
    assert 0 <= int(prompt.min()) <= int(prompt.max()) < llama.module.config.vocab_size


def test_rates_are_tokens_of_all_prompts_over_the_seconds_of_each_round(llama: ModelHandle):
    warm, rounds = (9.0, 9.0, 9.0), ((0.5, 0.25, 2.0), (0.7, 0.05, 1.0), (1.0, 0.5, 4.0))
    report = measure_speed(llama, SMALL, clock=_clock(warm, *rounds))
    assert report.prefill_tokens_per_second == Spread(pytest.approx(20.0), pytest.approx(14.0), pytest.approx(28.0))  # 2 prompts of 7
    assert report.decode_tokens_per_second == Spread(
        pytest.approx(4.0), pytest.approx(2.0), pytest.approx(8.0)
    )  # 2 times 4 after the first
    assert report.first_token_seconds == Spread(pytest.approx(0.75), pytest.approx(0.75), pytest.approx(1.5))
    assert (report.parameters, report.bytes, report.memory) == (llama.parameters, llama.bytes, None)


def test_the_protocol_says_what_was_done(llama: ModelHandle):
    protocol = measure_speed(llama, SMALL).protocol
    words = ("batch 2", "7 random tokens", "5 new tokens", "3 rounds", "1 to warm up", "float32", "cpu, 1 thread,", torch.__version__)
    for word in words:
        assert word in protocol


def test_a_comparison_pairs_rounds_and_alternates(llama: ModelHandle, monkeypatch: pytest.MonkeyPatch):
    order: list[ModelHandle] = []
    real = timed_generation

    def noted(handle: ModelHandle, *arguments: object):
        order.append(handle)
        return real(handle, *arguments)

    monkeypatch.setattr("lowrank_core.speed.timing.timed_generation", noted)
    twin = ModelHandle("twin", llama.module, llama.tokenizer, llama.layers, llama.stored_dtype)
    fast, slow = (0.5, 0.5, 1.0), (1.0, 0.5, 4.0)
    # Who goes first: dense to warm up, then dense, compressed, dense; the last round is disturbed, for both alike.
    result = compare_speed(llama, twin, SMALL, clock=_clock(slow, fast, slow, fast, fast, slow, (10.0, 5.0, 40.0), (5.0, 5.0, 10.0)))
    assert [handle.reference == "twin" for handle in order] == [False, True, False, True, True, False, False, True]
    assert result.prefill_speedup == Spread(2.0, pytest.approx(2.0), pytest.approx(2.0))
    assert result.decode_speedup == Spread(4.0, pytest.approx(4.0), pytest.approx(4.0))
    assert result.first_token_speedup == Spread(1.5, pytest.approx(1.5), pytest.approx(1.5))
    assert result.dense.decode_tokens_per_second.low == pytest.approx(0.2)
    assert (result.dense.model, result.compressed.model) == (llama.reference, "twin")


def test_a_model_is_as_fast_as_itself_under_a_steady_clock(llama: ModelHandle):
    result = compare_speed(llama, llama, SMALL, clock=_clock(*repeat((1.0, 1.0, 1.0), 8)))
    assert result.decode_speedup == result.prefill_speedup == Spread(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("field", "value", "minimum"), [("batch_size", 0, 1), ("prompt_tokens", 0, 1), ("new_tokens", 1, 2), ("rounds", 0, 1), ("warmup", 0, 1)]
)
def test_numbers_out_of_range_are_told(field: str, value: int, minimum: int):
    with pytest.raises(ConfigError, match=f"{field.replace('_', ' ')} must be at least {minimum}, got {value}"):
        SpeedConfig(**{field: value})


def test_what_passes_the_context_is_told(any_handle: ModelHandle):
    SpeedConfig(prompt_tokens=60, new_tokens=4).check_fits(any_handle)
    with pytest.raises(ConfigError, match=r"61 prompt tokens and 4 new ones pass the 64 positions of .*--prompt-tokens"):
        measure_speed(any_handle, SpeedConfig(prompt_tokens=61, new_tokens=4))


# --- memory ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def meter() -> memory_module.Meter:
    result = memory_module.Meter(torch.device("cpu"))
    if not result.available:
        pytest.skip(result.measured)
    return result


def test_a_peak_holds_what_was_held_and_let_go_until_the_meter_restarts(meter: memory_module.Meter):
    gc.collect()  # what earlier tests left would otherwise be let go in between
    meter.restart()
    before = meter.peak()
    torch.ones(256 * 2**20, dtype=torch.uint8)
    during = meter.peak()
    assert before is not None
    assert during is not None
    assert during - before > 192 * 2**20
    meter.restart()
    after = meter.peak()
    assert after is not None
    assert after < during - 192 * 2**20


def test_a_system_that_tells_no_peaks_is_told_not_guessed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(memory_module, "_RESET", tmp_path / "clear_refs")
    result = memory_module.Meter(torch.device("cpu"))
    assert result.peak() is None
    assert "not available" in result.measured


@pytest.mark.usefixtures("meter")
def test_a_fresh_process_measures_at_least_the_weights(demo_source: ModelSource):
    result = measure_memory(demo_source, SpeedConfig(new_tokens=2, prompt_tokens=8))
    weights = 4 * 6_852_864  # float32 on a CPU
    assert result.running is not None
    assert result.loading is not None
    assert weights < result.running < 3 * weights
    assert weights < result.loading < 3 * weights


@pytest.fixture
def demo_source() -> ModelSource:
    return ModelSource("demo")


def test_a_process_that_ends_early_is_told(tmp_path: Path):
    with pytest.raises(ModelError, match=r"ended early \(status 1: model: there is no folder .*--no-peak-memory"):
        measure_memory(ModelSource(str(tmp_path / "nowhere")), SMALL)


def test_the_memory_ratio_is_missing_where_memory_is(llama: ModelHandle):
    report = measure_speed(llama, SMALL)

    def compared(ours: MemoryReport | None, theirs: MemoryReport | None) -> float | None:
        config = SpeedConfig(rounds=1)
        reports = [
            report_of(llama, config, [timing], memory)
            for timing, memory in zip(repeat(Timing(1.0, 1.0, 1.0)), (theirs, ours), strict=False)
        ]
        spread = report.first_token_seconds
        return SpeedComparison(reports[0], reports[1], spread, spread, spread).memory_ratio

    some, none = MemoryReport(10, 30, ""), MemoryReport(None, None, "not available")
    assert compared(some, MemoryReport(10, 60, "")) == 0.5
    assert compared(none, some) is None
    assert compared(some, none) is None
    assert compared(None, some) is None


# --- the command -------------------------------------------------------------------------------------------------------


def _finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return not isinstance(value, float) or math.isfinite(value)


def test_the_command_compares_two_models(llama_checkpoint: Path, gpt2_checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["speed", "--model", str(llama_checkpoint), "--against", str(gpt2_checkpoint), "--no-peak-memory"]
    short = ["--prompt-tokens", "4", "--new-tokens", "3", "--rounds", "2"]
    assert main([*arguments, *short, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert _finite(result)
    assert result["dense"]["model"] == str(gpt2_checkpoint)
    assert result["prefill_speedup"]["low"] <= result["prefill_speedup"]["median"] <= result["prefill_speedup"]["high"]
    assert result["memory_ratio"] is None
    assert main([*arguments, *short]) == 0
    text = capsys.readouterr().out
    for word in ("dense", "compressed", "decode, tokens/s", "above 1 the compressed model is faster", "4 random tokens"):
        assert word in text


def test_the_command_measures_one_model(llama_checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    short = ["--prompt-tokens", "4", "--new-tokens", "3", "--rounds", "1", "--no-peak-memory"]
    assert main(["speed", "--model", str(llama_checkpoint), *short]) == 0
    assert "TTFT, ms" in capsys.readouterr().out


def test_a_bad_number_costs_no_loading(capsys: pytest.CaptureFixture[str]):
    assert main(["speed", "--model", "/nowhere/at/all", "--rounds", "0"]) == 2
    assert "rounds must be at least 1, got 0" in capsys.readouterr().err
