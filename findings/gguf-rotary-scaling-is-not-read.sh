#!/usr/bin/env bash
# A GGUF file whose header scales the rotary positions.
#
# A good engineer would guess that a reader which takes the base of the rotary frequencies from the header also takes their scaling,
# which stands next to it: both decide what the weights compute. Of a Qwen2 that YaRN stretches to four times its context, the longer
# context is taken and the scaling is left out, without a warning. Give rope_parameters, with the base in them, to from_pretrained.
#
# Seen:
#   transformers 5.24.0 gguf 0.19.0
#   in the header: qwen2.rope.freq_base, qwen2.rope.scaling.type, qwen2.rope.scaling.factor, qwen2.rope.scaling.original_context_length
#   in the config: {'rope_theta': 50000.0, 'rope_type': 'default'} | context: 256 | warned of: False
#   largest gap of the logits to the original's, in their deviations: 3.91; with rope_parameters given: 0.00
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
venv/bin/python - <<'PYTHON'
import io
import logging
import sys
from importlib.metadata import version

import gguf
import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

BASE, CONTEXT, FACTOR = 50000.0, 64, 4.0
YARN = {"rope_type": "yarn", "rope_theta": BASE, "factor": FACTOR, "original_max_position_embeddings": CONTEXT}
IDS = torch.arange(60)[None]

transformers.logging.set_verbosity_warning()
transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
config = Qwen2Config(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=int(CONTEXT * FACTOR),
    rope_parameters=YARN,
    initializer_range=0.2,
)
original = Qwen2ForCausalLM(config).eval()

writer = gguf.GGUFWriter("tiny.gguf", "qwen2")
writer.add_block_count(config.num_hidden_layers)
writer.add_context_length(config.max_position_embeddings)
writer.add_embedding_length(config.hidden_size)
writer.add_feed_forward_length(config.intermediate_size)
writer.add_head_count(config.num_attention_heads)
writer.add_head_count_kv(config.num_key_value_heads)
writer.add_layer_norm_rms_eps(config.rms_norm_eps)
writer.add_vocab_size(config.vocab_size)
writer.add_rope_freq_base(BASE)
writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
writer.add_rope_scaling_factor(FACTOR)
writer.add_rope_scaling_orig_ctx_len(CONTEXT)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
for name, tensor in original.state_dict().items():
    writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

said = io.StringIO()
logging.getLogger("transformers").handlers = [logging.StreamHandler(said)]
loaded = AutoModelForCausalLM.from_pretrained(".", gguf_file="tiny.gguf")
silent = not said.getvalue()
given = AutoModelForCausalLM.from_pretrained(".", gguf_file="tiny.gguf", rope_parameters=YARN)
with torch.no_grad():
    expected = original(IDS).logits
    gap, gap_given = ((model(IDS).logits - expected).abs().max().item() / expected.std().item() for model in (loaded, given))

print("transformers", version("transformers"), "gguf", version("gguf"))
print("in the header:", ", ".join(key for key in gguf.GGUFReader("tiny.gguf").fields if ".rope." in key))
read = loaded.config.rope_parameters
print("in the config:", read, "| context:", loaded.config.max_position_embeddings, "| warned of:", not silent)
print(f"largest gap of the logits to the original's, in their deviations: {gap:.2f}; with rope_parameters given: {gap_given:.2f}")
lost = loaded.config.max_position_embeddings == CONTEXT * FACTOR and read == {"rope_type": "default", "rope_theta": BASE}
sys.exit(0 if lost and silent and gap > 0.1 and gap_given < 1e-3 else 1)
PYTHON
