#!/usr/bin/env bash
# Saving a model that was loaded from a GGUF file.
#
# A good engineer would guess that a model whose weights are plain float32 after loading can be saved like any other. It keeps the
# quantizer that dequantised it, and save_pretrained refuses: "not serializable". Build the class anew from its config without
# quantization_config, and load the state dict into it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
venv/bin/python - <<'PYTHON'
import sys
from pathlib import Path

import gguf
import numpy as np
import transformers
from transformers import AutoModelForCausalLM

HIDDEN, INNER, VOCABULARY, BLOCKS = 64, 128, 64, 2


def write(path: Path) -> None:
    """Write a tiny Llama with random weights, in 8 bits."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    shapes = {"token_embd": (VOCABULARY, HIDDEN), "output": (VOCABULARY, HIDDEN)}
    for block in range(BLOCKS):
        shapes |= {f"blk.{block}.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{block}.ffn_{name}": (INNER, HIDDEN) for name in ("gate", "up")} | {f"blk.{block}.ffn_down": (HIDDEN, INNER)}
    generator = np.random.default_rng(0)
    eight = gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        values = generator.standard_normal(shape).astype(np.float32) * 0.05
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, eight), raw_dtype=eight)
    norms = ["output_norm", *(f"blk.{block}.{name}_norm" for block in range(BLOCKS) for name in ("attn", "ffn"))]
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


transformers.logging.set_verbosity_error()
write(Path("tiny.gguf"))
model = AutoModelForCausalLM.from_pretrained(".", gguf_file="tiny.gguf")
print("transformers", transformers.__version__)
print("dtype of a weight after loading:", model.model.layers[0].mlp.up_proj.weight.dtype)
try:
    model.save_pretrained("saved")
except ValueError as error:
    print("refused:", error)
    sys.exit(0)
print("saved")
sys.exit(1)
PYTHON
