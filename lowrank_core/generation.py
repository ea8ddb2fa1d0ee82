"""Continuing a prompt, the same way for the dense and the compressed model."""

from __future__ import annotations

import torch

from lowrank_core.errors import ConfigError
from lowrank_core.models.handle import ModelHandle

__all__ = ["continue_prompt"]


def continue_prompt(handle: ModelHandle, prompt: str, *, tokens: int = 64, seed: int = 0, temperature: float = 0.0) -> str:
    """Return the text that the model adds to ``prompt``; greedy at temperature 0, else sampled with ``seed``.

    Raises:
        ConfigError: the prompt and its continuation do not fit the model's context.
    """
    if tokens < 1:
        raise ConfigError(f"tokens must be at least 1, got {tokens}.")
    encoded = handle.tokenizer(prompt, return_tensors="pt")
    ids = encoded["input_ids"].to(handle.device)
    if ids.shape[1] == 0:
        raise ConfigError("the prompt is empty. Type a few words to continue.")
    if handle.max_context is not None and ids.shape[1] + tokens > handle.max_context:
        raise ConfigError(
            f"the prompt has {ids.shape[1]} tokens; with {tokens} more it passes the model's {handle.max_context}. "
            "Shorten it, or ask for fewer."
        )
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        output = handle.module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            pad_token_id=handle.tokenizer.pad_token_id if handle.tokenizer.pad_token_id is not None else handle.tokenizer.eos_token_id,
            **sampling,
        )
    text: str = handle.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return text
