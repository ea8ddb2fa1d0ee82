#!/usr/bin/env bash
# isinstance(module, nn.Linear) as the test for "this computes x Wᵀ + b by one fused call".
#
# A good engineer would guess that a subclass of nn.Linear in a model is there for its initialisation or its name. FalconLinear
# overrides forward: it multiplies first and adds the bias afterwards, so in bfloat16 its outputs differ from nn.Linear's with the same weights.
# What counts is whether type(module).forward is nn.Linear.forward.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.24.0
venv/bin/python - <<'PYTHON'
import sys

import torch
import transformers
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear

torch.manual_seed(0)
theirs = FalconLinear(256, 256).to(torch.bfloat16)
plain = nn.Linear(256, 256).to(torch.bfloat16)
plain.load_state_dict(theirs.state_dict())
x = torch.randn(64, 256, dtype=torch.bfloat16)
differ = (theirs(x) != plain(x)).float().mean().item()
print("transformers", transformers.__version__, "torch", torch.__version__)
print("is an nn.Linear:", isinstance(theirs, nn.Linear), "| has its forward:", FalconLinear.forward is nn.Linear.forward)
print(f"share of outputs that differ in bfloat16, same weights: {differ:.3f}")
sys.exit(0 if isinstance(theirs, nn.Linear) and FalconLinear.forward is not nn.Linear.forward and differ > 0 else 1)
PYTHON
