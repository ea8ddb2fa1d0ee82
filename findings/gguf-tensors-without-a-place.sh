#!/usr/bin/env bash
# A GGUF file that holds more tensors than the class that it is loaded into.
#
# A good engineer would guess that every tensor without a place is an unexpected key of loading info and warned of, as with a folder
# of safetensors. The header of a Llama has no entry for biases in the attention, so the config that is made of it has none, and the
# reader leaves out their tensors before keys are compared: a model without its biases, and not a word. Compare the number of
# parameters with the file's. Here attention_bias=True, given to from_pretrained, keeps the biases.
#
# Seen:
#   transformers 5.24.0 gguf 0.19.0
#   folder of safetensors: 8 unexpected keys, warned of: True
#   GGUF file: 0 unexpected keys, warned of: False, biases in the model: 0 of 8, its logits those of the original: False
#   GGUF file, attention_bias=True: biases in the model: 8 of 8, its logits those of the original: True
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
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

HEADS, IDS = 4, torch.arange(20)[None]
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": HEADS}


def write(model: PreTrainedModel, path: str) -> None:
    """Write a Llama in float32, under llama.cpp's names and in its order of rows: those of queries and keys go in pairs."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            tensor = tensor.unflatten(0, (HEADS, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def biases(model: PreTrainedModel) -> int:
    return sum(name.endswith(".bias") for name, _ in model.named_parameters())


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    with torch.no_grad():
        return torch.allclose(one(IDS).logits, other(IDS).logits, atol=1e-4)


transformers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_warning()
torch.manual_seed(0)
original = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True)).eval()
with torch.no_grad():
    for name, parameter in original.named_parameters():
        if name.endswith(".bias"):
            parameter.normal_()
original.save_pretrained("folder")
write(original, "tiny.gguf")
total = biases(original)


def told(model: PreTrainedModel) -> str:
    return f"biases in the model: {biases(model)} of {total}, its logits those of the original: {same(model, original)}"


said = io.StringIO()
logging.getLogger("transformers").handlers = [logging.StreamHandler(said)]

_, of_folder = AutoModelForCausalLM.from_pretrained("folder", attention_bias=False, output_loading_info=True)
warned = "UNEXPECTED" in said.getvalue()
said.truncate(said.seek(0))
loaded, info = AutoModelForCausalLM.from_pretrained(".", gguf_file="tiny.gguf", output_loading_info=True)
unexpected, heard = len(info["unexpected_keys"]), bool(said.getvalue())
whole = AutoModelForCausalLM.from_pretrained(".", gguf_file="tiny.gguf", attention_bias=True)

print("transformers", version("transformers"), "gguf", version("gguf"))
print("folder of safetensors:", len(of_folder["unexpected_keys"]), "unexpected keys, warned of:", warned)
print(f"GGUF file: {unexpected} unexpected keys, warned of: {heard}, {told(loaded)}")
print(f"GGUF file, attention_bias=True: {told(whole)}")
lost = biases(loaded) == 0 and not same(loaded, original) and same(whole, original)
sys.exit(0 if len(of_folder["unexpected_keys"]) == total == 8 and warned and not unexpected and not heard and lost else 1)
PYTHON
