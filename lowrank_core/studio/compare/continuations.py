"""Continuations of a prompt by the dense and the compressed models, with one seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowrank_core.runs import JsonMapping
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studies.requests import GenerateAnswer, answers_in
from lowrank_core.studio.shared.trial_names import model_name

__all__ = ["Prompt", "prompts"]


@dataclass(frozen=True)
class Prompt:
    """A prompt with its sampling settings.

    Attributes:
        tokens: at most; temperature, seed: of the draws, which all models share.
        original: what the dense model added; texts: (name, what it added) of each compressed model, in trial order.
    """

    prompt: str
    tokens: int
    temperature: float
    seed: int
    original: str
    texts: tuple[tuple[str, str], ...]

    @property
    def title(self) -> str:
        lines = self.prompt.strip().splitlines()
        head = lines[0] if lines else self.prompt
        return f"{head[:60]}  ({self.tokens} tokens, temperature {self.temperature:g}, seed {self.seed})"


def prompts(bodies: Sequence[JsonMapping], trials: Sequence[TrialRecord] = ()) -> list[Prompt]:
    """Return the prompts with their continuations, the newest first.

    Raises:
        RunError: an answer is damaged.
    """
    result: dict[tuple[object, ...], dict[str, GenerateAnswer]] = {}
    for answer in answers_in(bodies, GenerateAnswer):
        key = answer.prompt, answer.sampling
        result[key] = {**result.pop(key, {}), model_name(answer.filed_as, trials): answer}
    return [_prompt(alike) for alike in reversed(result.values())]


def _prompt(alike: Mapping[str, GenerateAnswer]) -> Prompt:
    last = list(alike.values())[-1]
    drawn = last.sampling
    texts = tuple((name, answer.compressed_text) for name, answer in alike.items())
    return Prompt(last.prompt, drawn.tokens, drawn.temperature, drawn.seed, last.dense_text, texts)
