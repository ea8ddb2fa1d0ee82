"""Settings of timing."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.config.checks import Continued
from lowrank_core.config.options import check_options, option

__all__ = ["SpeedConfig"]


@dataclass(frozen=True)
class SpeedConfig(Continued):
    """Prompts, continuations and rounds."""

    batch_size: int = option(1, "prompts that are continued at once", label="Batch", minimum=1)
    prompt_tokens: int = option(128, "tokens of each prompt", minimum=1)
    new_tokens: int = option(
        64, "tokens that each is continued by; the first comes from prefill, so that it takes two to time decode", minimum=2
    )
    rounds: int = option(7, "timed generations", minimum=1)
    warmup: int = option(1, "generations before, not timed", minimum=1)

    def __post_init__(self) -> None:
        check_options(self)
