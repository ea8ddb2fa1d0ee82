"""Continuations of a prompt by the dense and the compressed models, with one seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
        facts: name -> length, repetition and end of a continuation, in words; that of the dense model under ``Dense``. None of an earlier
            version.
    """

    prompt: str
    tokens: int
    temperature: float
    seed: int
    original: str
    texts: tuple[tuple[str, str], ...]
    facts: Mapping[str, str] = field(default_factory=dict)

    def label(self, name: str) -> str:
        """Return ``name`` with the facts of its continuation, as far as they are known."""
        return f"{name}: {self.facts[name]}" if name in self.facts else name

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
    facts = {name: answer.compressed_facts.words(answer.dense_facts) for name, answer in alike.items() if answer.compressed_facts}
    dense = {} if last.dense_facts is None else {"Dense": last.dense_facts.words()}
    return Prompt(last.prompt, drawn.tokens, drawn.temperature, drawn.seed, last.dense_text, texts, dense | facts)
