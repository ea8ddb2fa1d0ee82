"""What is timed."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.config import check_min
from lowrank_core.errors import ConfigError
from lowrank_core.models import ModelHandle

__all__ = ["SpeedConfig"]


@dataclass(frozen=True)
class SpeedConfig:
    """Prompts, continuations and rounds.

    Attributes:
        batch_size: prompts that are continued at once.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens that each is continued by; the first comes from reading the prompt, so that it takes two to time writing.
        rounds: timed generations.
        warmup: generations before, not timed.
    """

    batch_size: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 64
    rounds: int = 7
    warmup: int = 1

    def __post_init__(self) -> None:
        check_min(1, batch_size=self.batch_size, prompt_tokens=self.prompt_tokens)
        check_min(2, new_tokens=self.new_tokens)
        check_min(1, rounds=self.rounds, warmup=self.warmup)

    def check_fits(self, handle: ModelHandle) -> None:
        """Raise unless prompt and continuation fit the model.

        Raises:
            ConfigError: they pass the positions that the model was made for.
        """
        wanted = self.prompt_tokens + self.new_tokens
        if handle.max_context is not None and wanted > handle.max_context:
            raise ConfigError(
                f"{self.prompt_tokens} prompt tokens and {self.new_tokens} new ones pass the {handle.max_context} positions of "
                f"{handle.reference}. Lower --prompt-tokens or --new-tokens."
            )
