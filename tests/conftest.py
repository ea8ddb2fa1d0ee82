"""Fixtures: tiny checkpoints with tokenizers of their own, a text, and a home that no test shares with the user."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import VOCABULARY, save_checkpoint, small_llama
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lowrank_core.config import ModelSource
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.statistics import precision
from lowrank_core.text import WindowSet

# Tiny matrices: with several threads, and anything else on the machine, they mostly wait for each other. Workers inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leave what was imported to itself: half a million objects would be looked through in every collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders that are not there yet; pytest's own would be numbered by a look at all those before it."""
    parent = tmp_path_factory.mktemp("homes")
    return (parent / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def lowrank_home(homes: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own for each test."""
    folder = next(homes)
    folder.mkdir()
    monkeypatch.setenv("LOWRANK_HOME", str(folder))
    return folder


@pytest.fixture(scope="session", autouse=True)
def exact_products() -> Iterator[None]:
    """Laws are held to the digits of float32, whatever this processor has instructions for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "has_bfloat16", lambda: False)
        yield


@pytest.fixture(scope="session")
def sample_text() -> str:
    """Some pages of text that no model knows: enough for every split at a context of 32."""
    phrase = "the rank of a matrix tells how many directions it has and a budget says which of them we may keep"
    words = phrase.split()
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(words), (6000,), generator=generator).tolist()
    lines = [" ".join(words[i] for i in picks[start : start + 12]) for start in range(0, len(picks), 12)]
    return "\n".join(f"{number} {line}." for number, line in enumerate(lines))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    path = tmp_path_factory.mktemp("text") / "sample.txt"
    path.write_text(sample_text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def llama_checkpoint(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    """Grouped-query attention, tied embeddings, no biases; 2 blocks, hidden 32."""
    torch.manual_seed(0)
    config = small_llama(tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    return save_checkpoint(tmp_path_factory.mktemp("llama"), LlamaForCausalLM(config), sample_text)


@pytest.fixture(scope="session")
def gpt2_checkpoint(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    """Conv1D layers (transposed weights) with biases; 2 blocks, hidden 32."""
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    return save_checkpoint(tmp_path_factory.mktemp("gpt2"), GPT2LMHeadModel(config), sample_text)


@pytest.fixture(scope="session")
def qwen2_checkpoint(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    """Biases on q, k and v, an untied head; 2 blocks, hidden 32."""
    torch.manual_seed(2)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return save_checkpoint(tmp_path_factory.mktemp("qwen2"), Qwen2ForCausalLM(config), sample_text)


@pytest.fixture(scope="session", params=["llama", "gpt2", "qwen2"])
def any_handle(request: pytest.FixtureRequest) -> ModelHandle:
    """Each tiny architecture in turn, loaded; tests must leave it as it was."""
    return load_model(ModelSource(str(request.getfixturevalue(f"{request.param}_checkpoint"))))


@pytest.fixture(scope="session")
def llama(llama_checkpoint: Path) -> ModelHandle:
    """The tiny Llama, loaded; tests must leave it as it was."""
    return load_model(ModelSource(str(llama_checkpoint)))


@pytest.fixture(scope="session")
def windows() -> WindowSet:
    """40 windows of 16 random tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (40, 16), generator=generator)
    return WindowSet("random tokens", "calibration", ids, bos=False, available_tokens=ids.numel())
