#!/usr/bin/env bash
# Saving a model in shards over a folder that already holds it as one file.
#
# A good engineer would guess that the second save_pretrained replaces the first: the shards and their index are written, so they
# are what is loaded. In fact the old model.safetensors is left where it is, and from_pretrained looks for it before it looks for
# the index: the folder loads, without a warning, with the weights of the first save.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.24.0
venv/bin/python - <<'PYTHON'
import sys
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
config = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=64
)
first, second = LlamaForCausalLM(config), LlamaForCausalLM(config)
first.save_pretrained("model")
second.save_pretrained("model", max_shard_size="20KB")
loaded = LlamaForCausalLM.from_pretrained("model")


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


print("transformers", transformers.__version__, "torch", torch.__version__)
print("files:", ", ".join(sorted(path.name for path in Path("model").iterdir())))
print("loaded is the first save:", same(loaded, first), "| the second:", same(loaded, second))
sys.exit(0 if same(loaded, first) and not same(loaded, second) else 1)
PYTHON
