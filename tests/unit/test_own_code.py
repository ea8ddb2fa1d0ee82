"""What a model's own code raises is told in a line."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import built

from lowrank_core.errors import ConfigError, ModelError
from lowrank_core.evaluation.generation import continue_prompt
from lowrank_core.models import ModelHandle
from lowrank_core.models.handle import own_code
from lowrank_core.speed.timing import timed_generation


def test_a_model_that_fails_is_named_with_what_it_failed_at(llama: ModelHandle):
    with (
        pytest.raises(ModelError, match=r"LlamaForCausalLM of transformers fails at reading \(KeyError: 'state'\)\. Try another version"),
        own_code(llama, "reading"),
    ):
        raise KeyError("state")


def test_our_own_errors_stay_what_they_are(llama: ModelHandle):
    with pytest.raises(ConfigError, match=r"^ours$"), own_code(llama, "reading"):
        raise ConfigError("ours")


def test_a_prompt_that_the_model_can_t_continue(llama: ModelHandle, monkeypatch: pytest.MonkeyPatch):
    """xLSTM's cache has the wrong shape in transformers 5.24."""

    def broken(*_: object, **__: object) -> None:
        raise ValueError("matC_old has wrong shape\nand so on")

    monkeypatch.setattr(llama.module, "generate", broken)
    with pytest.raises(ModelError, match=r"fails at continuing a prompt \(ValueError: matC_old has wrong shape\)\. Try") as reported:
        continue_prompt(llama, "a", tokens=2)
    assert "\n" not in str(reported.value)


def test_a_recurrent_state_is_handed_on(llama: ModelHandle):
    handle = replace(llama, module=built("rwkv"))
    _, tokens = timed_generation(handle, torch.zeros(2, 6, dtype=torch.long), 5)
    assert tokens.shape == (2, 5)


@pytest.mark.parametrize("name", ["mamba", "openai-gpt", "llama"])
def test_generation_is_timed_whatever_the_cache_is_called(name: str, llama: ModelHandle):
    """GPT-1 has none."""
    handle = replace(llama, module=built(name))
    prompt = torch.randint(0, 300, (2, 6), generator=torch.Generator().manual_seed(0))
    _, tokens = timed_generation(handle, prompt, 5)
    whole = prompt
    for _ in range(5):
        whole = torch.cat([whole, handle.module(input_ids=whole, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(tokens, whole[:, 6:])
