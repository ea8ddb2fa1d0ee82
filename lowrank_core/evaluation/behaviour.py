"""Behaviour of a model that writes freely: repetition, endings and length, which no loss on given text shows.

Prompts are the first tokens of windows of text, as many for the dense model; both continue them greedily, with the key-value cache,
up to the same number of tokens. ``runs.measurements`` defines what is measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_core.config.evaluation import BehaviourConfig, Sampling
from lowrank_core.errors import ConfigError
from lowrank_core.evaluation.generation import continued
from lowrank_core.models.handle import ModelHandle
from lowrank_core.runs.measurements import Behaviour, BehaviourComparison, ContinuationFacts
from lowrank_core.text.windows import WindowSet
from lowrank_core.types import Progress

__all__ = ["behaviour_protocol", "measure_behaviour"]

_BATCH = 8
"""Prompts that are continued at once."""


def measure_behaviour(
    handle: ModelHandle,
    windows: WindowSet,
    config: BehaviourConfig,
    *,
    against: ModelHandle | Behaviour | None = None,
    progress: Progress | None = None,
) -> BehaviourComparison:
    """Measure how ``handle`` continues the first tokens of ``windows``.

    Args:
        against: the dense model, or what was measured of it on the same prompts.
        progress: called with the number of continuations.

    Raises:
        ConfigError: the prompts are longer than a window, or pass a model's positions with their continuations.
        ModelError: a model's own code can't continue them.
    """
    prompts = _prompts(windows, config)
    handles = [each for each in (against, handle) if isinstance(each, ModelHandle)]
    for each in handles:
        config.check_fits(each)
    measured: list[Behaviour] = []
    for each in handles:
        facts: tuple[ContinuationFacts, ...] = ()
        for start in range(0, len(prompts), _BATCH):
            batch = prompts[start : start + _BATCH].to(each.device)
            facts += continued(each, batch, Sampling(config.new_tokens))[1]
            if progress is not None:
                progress(len(measured) * len(prompts) + len(facts), len(handles) * len(prompts))
        measured.append(Behaviour(facts))
    dense = measured[0] if isinstance(against, ModelHandle) else against
    return BehaviourComparison(measured[-1], behaviour_protocol(windows, config), dense)


def behaviour_protocol(windows: WindowSet, config: BehaviourConfig) -> str:
    """Return a line on the prompts and how they are continued."""
    count = min(config.prompts, windows.windows)
    bos = ", BOS first" if windows.bos else ""
    return (
        f"{windows.dataset}, {windows.split} split: {count} prompts, the first {config.prompt_tokens} tokens of a window each{bos}; up to "
        f"{config.new_tokens} new tokens, greedy, with a cache"
    )


def _prompts(windows: WindowSet, config: BehaviourConfig) -> Tensor:
    """Return the first tokens (prompts, T) of windows, spread evenly over all."""
    if config.prompt_tokens > windows.context:
        raise ConfigError(
            f"prompts of {config.prompt_tokens} tokens are longer than a window of the text, {windows.context}. Lower --prompt-tokens, or "
            "raise --context."
        )
    count = min(config.prompts, windows.windows)
    chosen = torch.linspace(0, windows.windows - 1, count).round().long()
    return windows.ids[chosen, : config.prompt_tokens]
