#!/usr/bin/env bash
# A mixture whose own code subclasses the base model of transformers, and changes nothing.
#
# A good engineer would guess that a class which only inherits from MixtralModel reads what MixtralForCausalLM.save_pretrained wrote.
# transformers 5 stores Mixtral's experts one by one, as version 4 had them, and joins them by a conversion while it loads. Remote code
# gets no conversions, unless its base model is transformers' own class: a head of its own above the native base model loads right, the
# same head above an empty subclass of the base model has random experts and routers. Nothing is raised; the load report warns of the
# keys. Registering the architecture's conversion for the new class mends it.
#
# Seen:
#   transformers 5.24.0 torch 2.13.0+cpu
#   own head, native base model: 0 keys missing, 0 of 21 parameters differ
#   own head, own base model: 6 keys missing, 6 of 21 parameters differ
#   the same, conversion registered: 0 keys missing, 0 of 21 parameters differ
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.24.0
HF_MODULES_CACHE="$work/modules" venv/bin/python - <<'PYTHON'
import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

HEAD = """
from transformers import MixtralForCausalLM, MixtralModel


class OwnForCausalLM(MixtralForCausalLM):
    pass
"""
BASE = """
from transformers import MixtralForCausalLM, MixtralModel


class OwnModel(MixtralModel):
    pass


class OwnForCausalLM(MixtralForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.post_init()
"""


def saved(native: MixtralForCausalLM, folder: Path, code: str) -> Path:
    """Save a native model, and name a class in a module of the folder for it."""
    native.save_pretrained(folder)
    (folder / "modeling_own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    named = {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(config | named))
    return folder


def compared(native: MixtralForCausalLM, folder: Path, words: str) -> tuple[int, int]:
    """Return how many keys are missing, and how many parameters are not those that were saved."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    parameters, missing = dict(native.named_parameters()), len(info["missing_keys"])
    differ = sum(not torch.equal(parameters[name], parameter) for name, parameter in model.named_parameters())
    print(f"{words}: {missing} keys missing, {differ} of {len(parameters)} parameters differ")
    return missing, differ


logging.getLogger("transformers").setLevel(logging.ERROR)
transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
native = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))
print("transformers", transformers.__version__, "torch", torch.__version__)
right = compared(native, saved(native, Path("head"), HEAD), "own head, native base model")
wrong = compared(native, saved(native, Path("base"), BASE), "own head, own base model")
register_checkpoint_conversion_mapping("OwnModel", get_checkpoint_conversion_mapping("mixtral"))
mended = compared(native, Path("base"), "the same, conversion registered")
sys.exit(0 if right == mended == (0, 0) and wrong == (6, 6) else 1)
PYTHON
