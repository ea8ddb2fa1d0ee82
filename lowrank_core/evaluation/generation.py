"""Continuing prompts, the same way for the dense and the compressed model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_core.config.evaluation import Sampling
from lowrank_core.errors import ConfigError
from lowrank_core.models.handle import ModelHandle, own_code
from lowrank_core.runs.measurements import ContinuationFacts

__all__ = ["Continuation", "continue_prompt", "continued", "side_by_side"]

_LIKELIEST = 50
"""Tokens that a sampled one is drawn from."""


@dataclass(frozen=True)
class Continuation:
    """A generated continuation.

    Attributes:
        model: what the user called it.
        text: without the prompt.
        facts: its length, repetition and end.
    """

    model: str
    text: str
    facts: ContinuationFacts


def side_by_side(handles: Sequence[ModelHandle], prompt: str, sampling: Sampling) -> tuple[Continuation, ...]:
    """Return what each model adds to the same prompt, with the same seed.

    Raises:
        ConfigError: as ``continue_prompt``.
    """
    return tuple(_continue(handle, prompt, sampling) for handle in handles)


def continue_prompt(handle: ModelHandle, prompt: str, *, tokens: int = 64, seed: int = 0, temperature: float = 0.0) -> str:
    """Return the text that the model adds to ``prompt``; greedy at temperature 0, else sampled with ``seed``.

    What a checkpoint's ``generation_config.json`` says about sampling is not followed: two models are continued by the same rule.

    Raises:
        ConfigError: a number out of range (see ``Sampling``), or the prompt and its continuation do not fit the model's context.
        ModelError: the model's own code can't continue it.
    """
    return _continue(handle, prompt, Sampling(tokens, temperature, seed)).text


def _continue(handle: ModelHandle, prompt: str, sampling: Sampling) -> Continuation:
    encoded = handle.tokenizer(prompt, return_tensors="pt")
    ids = encoded["input_ids"].to(handle.device)
    if ids.shape[1] == 0:
        raise ConfigError("the prompt is empty. Type a few words to continue.")
    if handle.max_context is not None and ids.shape[1] + sampling.tokens > handle.max_context:
        raise ConfigError(
            f"the prompt has {ids.shape[1]} tokens; with {sampling.tokens} more it passes the model's {handle.max_context}. "
            "Shorten it, or ask for fewer."
        )
    new, (facts,) = continued(handle, ids, sampling)
    text: str = handle.tokenizer.decode(new[0], skip_special_tokens=True)
    return Continuation(handle.reference, text, facts)


def continued(handle: ModelHandle, ids: Tensor, sampling: Sampling) -> tuple[Tensor, tuple[ContinuationFacts, ...]]:
    """Return the new tokens (B, new) of prompts ``ids`` (B, T) on the model's device, and the facts of each continuation.

    Raises:
        ModelError: the model's own code can't continue them.
    """
    ends = _end_tokens(handle)
    pad = handle.tokenizer.pad_token_id if handle.tokenizer.pad_token_id is not None else next(iter(ends), None)
    with torch.random.fork_rng(), torch.no_grad(), own_code(handle, "continuing a prompt"):
        torch.manual_seed(sampling.seed)
        output = handle.module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.tokens,
            eos_token_id=list(ends) or None,
            pad_token_id=pad,
            **_rule(sampling),
        )
    new: Tensor = output[:, ids.shape[1] :]
    return new, tuple(ContinuationFacts.of(row, ends) for row in new.tolist())


def _end_tokens(handle: ModelHandle) -> tuple[int, ...]:
    """Return the tokens that end a text: those of the model's generation, else the tokenizer's; none where there is none."""
    own = getattr(getattr(handle.module, "generation_config", None), "eos_token_id", None)
    ends = handle.tokenizer.eos_token_id if own is None else own
    return () if ends is None else tuple(ends) if isinstance(ends, list | tuple) else (int(ends),)


def _rule(sampling: Sampling) -> dict[str, object]:
    """Return the options of ``generate``; those left out would be the checkpoint's own."""
    rule: dict[str, object] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}
    if sampling.temperature == 0:
        return {**rule, "do_sample": False}
    return {**rule, "do_sample": True, "temperature": sampling.temperature, "top_k": _LIKELIEST, "top_p": 1.0}
