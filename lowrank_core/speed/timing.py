"""Prefill and decode speed, greedy, with the key-value cache where the model has one, as ``generate`` does."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowrank_core.config import ModelSource
from lowrank_core.config.speed import SpeedConfig
from lowrank_core.models import ModelHandle
from lowrank_core.models.handle import own_code
from lowrank_core.models.unrolled import natively
from lowrank_core.runs.measurements import MemoryReport, SpeedReport, Spread
from lowrank_core.speed.memory import measure_memory
from lowrank_core.speed.turns import in_turns
from lowrank_core.types import Progress

__all__ = [
    "Clock",
    "Counted",
    "Timing",
    "measure_speed",
    "prompt_for",
    "random_prompts",
    "rates_of",
    "report_of",
    "timed_generation",
    "timed_in_turns",
]

Clock = Callable[[], float]
"""Returns seconds since some moment."""

_PROMPT_SEED = 0

_CACHES = ("cache", "past_key_values", "cache_params", "state")
"""Names of the cache in transformers' outputs: of attention, changed within version 5, and of recurrent models."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one generation.

    Attributes:
        prefill: reading the prompts, up to the logits of their last token.
        first_token: the same, up to the token that they choose.
        decode: the tokens after the first.
    """

    prefill: float
    first_token: float
    decode: float


def measure_speed(
    handle: ModelHandle, config: SpeedConfig, *, source: ModelSource | None = None, clock: Clock = time.perf_counter
) -> SpeedReport:
    """Measure one model.

    Args:
        source: where a fresh process can load the same model, to measure its memory; None leaves that out.

    Raises:
        ConfigError: prompt and continuation pass the model's positions.
        ModelError: the process that measures memory ended early, or the model's own code fails.
    """
    config.check_fits(handle)
    memory = None if source is None else measure_memory(source, config)
    (timings,) = timed_in_turns([handle], config, clock)
    return report_of(handle, config, timings, memory)


def timed_in_turns(
    handles: Sequence[ModelHandle], config: SpeedConfig, clock: Clock, progress: Progress | None = None
) -> list[tuple[Timing, ...]]:
    """Return the timings of each model, round by round, after the rounds to warm up; ``progress`` counts generations of all models."""
    prompts = [prompt_for(handle, config) for handle in handles]
    done, total = 0, len(handles) * (config.warmup + config.rounds)

    def timed(handle: ModelHandle, prompt: Tensor) -> tuple[Timing, Tensor]:
        nonlocal done
        with own_code(handle, "continuing a prompt"):
            result = timed_generation(handle, prompt, config.new_tokens, clock)
        done += 1
        if progress is not None:
            progress(done, total)
        return result

    actions = [partial(timed, handle, prompt) for handle, prompt in zip(handles, prompts, strict=True)]
    with natively(*(handle.module for handle in handles)):
        in_turns(actions, config.warmup)
        rounds = in_turns(actions, config.rounds)
    return [tuple(result[index][0] for result in rounds) for index in range(len(handles))]


def report_of(handle: ModelHandle, config: SpeedConfig, timings: Sequence[Timing], memory: MemoryReport | None) -> SpeedReport:
    """Return the rates that ``timings`` say of a model that runs here."""
    return rates_of(Counted(handle.reference, handle.parameters, handle.bytes), config, timings, memory, _place(handle))


@dataclass(frozen=True)
class Counted:
    """A model that is timed, by name, with its stored parameters and bytes."""

    reference: str
    parameters: int
    bytes: int


def rates_of(model: Counted, config: SpeedConfig, timings: Sequence[Timing], memory: MemoryReport | None, place: str) -> SpeedReport:
    """Return the rates that ``timings`` say; ``place`` says where and in what the model ran."""
    read, written = config.batch_size * config.prompt_tokens, config.batch_size * (config.new_tokens - 1)
    return SpeedReport(
        model=model.reference,
        prefill_tokens_per_second=Spread.of(read / timing.prefill for timing in timings),
        decode_tokens_per_second=Spread.of(written / timing.decode for timing in timings),
        first_token_seconds=Spread.of(timing.first_token for timing in timings),
        memory=memory,
        parameters=model.parameters,
        bytes=model.bytes,
        protocol=f"{_rounds(config)}; {place}",
    )


def prompt_for(handle: ModelHandle, config: SpeedConfig) -> Tensor:
    """Return the prompts (batch, tokens) of a model."""
    return random_prompts(handle.vocabulary, config).to(handle.device)


def random_prompts(vocabulary: int, config: SpeedConfig) -> Tensor:
    """Return prompts (batch, tokens) drawn uniformly from a vocabulary, always the same."""
    generator = torch.Generator().manual_seed(_PROMPT_SEED)
    return torch.randint(0, vocabulary, (config.batch_size, config.prompt_tokens), generator=generator)


@torch.no_grad()
def timed_generation(handle: ModelHandle, prompt: Tensor, new_tokens: int, clock: Clock = time.perf_counter) -> tuple[Timing, Tensor]:
    """Continue ``prompt`` (batch, tokens) greedily; return the times and the new tokens (batch, new_tokens).

    No token ends it early. Of the prompt only the last logits are computed, where the model can, as ``generate`` does.
    """
    module, device = handle.module, handle.device
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(module.forward).parameters else {}
    began = _now(device, clock)
    output = module(input_ids=prompt, use_cache=True, **last)
    read = _now(device, clock)
    tokens = [output.logits[:, -1].argmax(-1, keepdim=True)]
    first = _now(device, clock)
    cache = next((name for name in _CACHES if output.get(name) is not None), None)
    for _ in range(new_tokens - 1):
        if cache is None:  # GPT-1 has none: it reads everything again
            output = module(input_ids=torch.cat([prompt, *tokens], dim=1), **last)
        else:
            output = module(input_ids=tokens[-1], use_cache=True, **{cache: output[cache]})
        tokens.append(output.logits[:, -1].argmax(-1, keepdim=True))
    ended = _now(device, clock)
    return Timing(read - began, first - began, ended - first), torch.cat(tokens, dim=1)


def _now(device: torch.device, clock: Clock) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def _rounds(config: SpeedConfig) -> str:
    """Return in words how the rates were measured."""
    return (
        f"batch {config.batch_size}, prompts of {config.prompt_tokens} random tokens (seed {_PROMPT_SEED}), "
        f"{config.new_tokens} new tokens, greedy with a key-value cache; "
        f"median of {config.rounds} rounds after {config.warmup} to warm up (smallest to largest)"
    )


def _place(handle: ModelHandle) -> str:
    device = handle.device
    place = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"
    )
    return f"{handle.dtype}, {place}, torch {torch.__version__}"
