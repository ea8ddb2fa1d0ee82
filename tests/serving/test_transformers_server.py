"""transformers' own server, started by ``lowrank serve``, writes the tokens that the model writes here.

It needs the extra ``serve``: ``python -m pytest -m serving tests/serving/test_transformers_server.py``.
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from exported import all_forms
from served import served

from lowrank_core.config import ExportConfig, ModelSource
from lowrank_core.export import export
from lowrank_core.models import load_model

pytestmark = pytest.mark.serving
pytest.importorskip("fastapi")
pytest.importorskip("openai")

CONFIGS = {"factors": ExportConfig(), "int8": ExportConfig(quantization="int8"), "plain": ExportConfig(form="plain")}
PROMPT = "the rank of a matrix tells"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize("form", CONFIGS)
def test_it_answers_as_the_model_does_here(form: str, llama_checkpoint: Path, tmp_path: Path):
    model = all_forms(load_model(ModelSource(str(llama_checkpoint))))
    model.handle.tokenizer.chat_template = TEMPLATE
    export(model, tmp_path / form, config=CONFIGS[form])
    handle = load_model(ModelSource(str(tmp_path / form)))
    inputs = handle.tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        tokens = handle.module.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=0)[0, inputs["input_ids"].shape[1] :]
    expected = handle.tokenizer.decode(tokens, skip_special_tokens=True)
    with served(tmp_path / form, cwd=tmp_path) as endpoint:
        assert endpoint.get("/health")["status"] == "ok"
        [listed] = endpoint.get("/v1/models")["data"]
        assert (listed["id"], listed["status"]["value"]) == (form, "loaded")
        assert endpoint.greedy(PROMPT, 16)["text"] == expected
        chat = endpoint.post("/v1/chat/completions", messages=[{"role": "user", "content": PROMPT}], max_tokens=4, temperature=0)
        assert chat["choices"][0]["message"]["content"]
        port = int(endpoint.url.rpartition(":")[2])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
