"""Continuing a prompt, the same way for the dense and the compressed model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowrank_core.config.evaluation import Sampling
from lowrank_core.errors import ConfigError
from lowrank_core.models.handle import ModelHandle, own_code

__all__ = ["Continuation", "continue_prompt", "side_by_side"]

_LIKELIEST = 50
"""Tokens that a sampled one is drawn from."""


@dataclass(frozen=True)
class Continuation:
    """A generated continuation.

    Attributes:
        model: what the user called it.
        text: without the prompt.
    """

    model: str
    text: str


def side_by_side(handles: Sequence[ModelHandle], prompt: str, sampling: Sampling) -> tuple[Continuation, ...]:
    """Return what each model adds to the same prompt, with the same seed.

    Raises:
        ConfigError: as ``continue_prompt``.
    """
    return tuple(Continuation(handle.reference, _continue(handle, prompt, sampling)) for handle in handles)


def continue_prompt(handle: ModelHandle, prompt: str, *, tokens: int = 64, seed: int = 0, temperature: float = 0.0) -> str:
    """Return the text that the model adds to ``prompt``; greedy at temperature 0, else sampled with ``seed``.

    What a checkpoint's ``generation_config.json`` says about sampling is not followed: two models are continued by the same rule.

    Raises:
        ConfigError: a number out of range (see ``Sampling``), or the prompt and its continuation do not fit the model's context.
        ModelError: the model's own code can't continue it.
    """
    return _continue(handle, prompt, Sampling(tokens, temperature, seed))


def _continue(handle: ModelHandle, prompt: str, sampling: Sampling) -> str:
    encoded = handle.tokenizer(prompt, return_tensors="pt")
    ids = encoded["input_ids"].to(handle.device)
    if ids.shape[1] == 0:
        raise ConfigError("the prompt is empty. Type a few words to continue.")
    if handle.max_context is not None and ids.shape[1] + sampling.tokens > handle.max_context:
        raise ConfigError(
            f"the prompt has {ids.shape[1]} tokens; with {sampling.tokens} more it passes the model's {handle.max_context}. "
            "Shorten it, or ask for fewer."
        )
    with torch.random.fork_rng(), torch.no_grad(), own_code(handle, "continuing a prompt"):
        torch.manual_seed(sampling.seed)
        output = handle.module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.tokens,
            pad_token_id=handle.tokenizer.pad_token_id if handle.tokenizer.pad_token_id is not None else handle.tokenizer.eos_token_id,
            **_rule(sampling),
        )
    text: str = handle.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def _rule(sampling: Sampling) -> dict[str, object]:
    """Return the options of ``generate``; those left out would be the checkpoint's own."""
    rule: dict[str, object] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}
    if sampling.temperature == 0:
        return {**rule, "do_sample": False}
    return {**rule, "do_sample": True, "temperature": sampling.temperature, "top_k": _LIKELIEST, "top_p": 1.0}
