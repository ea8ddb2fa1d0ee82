"""Tiny checkpoints of any architecture, with a tokenizer of their own."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["VOCABULARY", "assert_cache_changes_nothing", "save_checkpoint", "save_tokenizer", "small_llama"]

VOCABULARY = 300


def _tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def _with_spectra(model: PreTrainedModel) -> PreTrainedModel:
    """Give random weights a decaying spectrum and the biases a value, so that ranks and centring matter."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
            left, values, right = torch.linalg.svd(parameter.data, full_matrices=False)
            decay = torch.arange(1, len(values) + 1, dtype=values.dtype) ** -0.7
            parameter.data = (left * (decay * 2.0)) @ right
        elif name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    return model


def save_checkpoint(folder: Path, model: PreTrainedModel, text: str) -> Path:
    """Save ``model`` under ``folder`` with spectra that decay, and a tokenizer trained on ``text``; return the folder."""
    _with_spectra(model).save_pretrained(folder)
    return save_tokenizer(folder, text)


def save_tokenizer(folder: Path, text: str) -> Path:
    """Save a tokenizer trained on ``text``; return the folder."""
    _tokenizer(text).save_pretrained(folder)
    return folder


def assert_cache_changes_nothing(module: PreTrainedModel) -> None:
    """Twelve greedy tokens are the same with a key/value cache as without."""
    prompt = torch.tensor([[5, 9, 200, 31]])
    settings = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
    }
    cached = module.generate(prompt, use_cache=True, **settings)
    assert cached.shape == (1, 16)
    assert torch.equal(cached, module.generate(prompt, use_cache=False, **settings))


def small_llama(**changes: object) -> LlamaConfig:
    """Return a configuration with grouped-query attention: 2 blocks, hidden 32, and what ``changes`` say."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **changes,
    )
