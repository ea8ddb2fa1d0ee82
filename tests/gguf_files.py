"""Tiny GGUF files in the form of llama.cpp, written from a checkpoint of ours with the ``gguf`` package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

__all__ = ["write_gguf"]

_NAMES = {
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _name(name: str) -> str:
    for plain, short in (("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")):
        name = name.replace(plain, short)
    for plain, short in _NAMES.items():
        name = name.replace(plain, short)
    return name.replace("model.layers.", "blk.")


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of a query or key projection in the order of llama.cpp: the two halves of each head's rotation interleaved."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    checkpoint: Path,
    path: Path,
    *,
    quantization: str = "Q8_0",
    architecture: str = "llama",
    metadata: Mapping[str, object] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a Llama checkpoint as a GGUF file: matrices of rows that fill whole blocks in ``quantization``, the rest in float32.

    Args:
        metadata: more entries, strings or whole numbers. tensors: more tensors, in float32.
    """
    gguf = pytest.importorskip("gguf")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config, kind = model.config, gguf.GGMLQuantizationType[quantization]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for key, value in (metadata or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    _add_tokenizer(writer, checkpoint)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            values = _permuted(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        whole = values.ndim == 2 and values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        if whole and kind.name != "F32":
            writer.add_tensor(_name(name), gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
        else:
            writer.add_tensor(_name(name), np.ascontiguousarray(values))
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: object, checkpoint: Path) -> None:
    body = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = [token for token, _ in sorted(body["vocab"].items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([" ".join(pair) for pair in body["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
