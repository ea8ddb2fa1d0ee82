"""``lowrank speed``: several batch sizes, and models in vLLM's processes, in turns; ``tests/serving`` asks vLLM itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowrank_core.cli import main
from lowrank_core.models import ModelHandle
from lowrank_core.speed import SpeedConfig
from lowrank_core.speed import vllm as engine_module
from lowrank_core.speed.timing import Timing, random_prompts
from lowrank_core.speed.vllm_process import timed_steps

SIZES = ["--prompt-tokens", "4", "--new-tokens", "3", "--rounds", "2", "--warmup", "1"]

PROCESS = """
import json, sys
request = json.loads(sys.argv[1])
print("a line of vLLM's own")
print(MARK + json.dumps({"peak": 100, "place": f"{request['dtype']}, cpu, vLLM 0.0"}), flush=True)
for line in sys.stdin:
    config, slow = json.loads(line), request["model"].endswith("twin")
    with open(LOG, "a") as log:
        print(request["model"].rpartition("/")[2], config["batch_size"], file=log)
    print(MARK + json.dumps({"first_token": 2.0 if slow else 1.0, "decode": 1.0, "peak": 50 if slow else 40}), flush=True)
"""
"""Stands for the process: the model called ``twin`` takes two seconds to its first token, others one."""


class _Engine:
    """Reads one prompt a step, then writes a token of each prompt a step, as vLLM's does where a step has no room for all prompts."""

    def __init__(self, lengths: int) -> None:
        self.waiting, self.written, self.lengths = [], {}, lengths

    def add_request(self, number: str, prompt: dict[str, list[int]], sampling: object) -> None:
        assert sampling == "greedy"
        self.waiting.append((number, prompt["prompt_token_ids"]))

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.written)

    def step(self) -> list[SimpleNamespace]:
        if self.waiting:
            self.written[self.waiting.pop(0)[0]] = 1
        else:
            self.written = {number: tokens + 1 for number, tokens in self.written.items()}
        outputs = [SimpleNamespace(request_id=n, outputs=[SimpleNamespace(token_ids=[0] * tokens)]) for n, tokens in self.written.items()]
        self.written = {number: tokens for number, tokens in self.written.items() if tokens < self.lengths}
        return outputs


def test_the_first_token_is_there_once_every_prompt_has_one():
    ticks = count()
    engine = _Engine(lengths=4)
    timing = timed_steps(engine, [[1, 2], [3], [4]], "greedy", lambda: float(next(ticks)))
    assert timing == Timing(3.0, 3.0, 1.0)  # three steps of reading, each timed; the rest by one look at the clock
    assert not engine.has_unfinished_requests()


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Put a script in place of vLLM's process; return a file of who was asked for which batch."""

    def installed(script: str) -> Path:
        log, file = tmp_path / "log", tmp_path / "process.py"
        file.write_text(f"MARK, LOG = {engine_module.MARK!r}, {str(log)!r}\n{script}")
        monkeypatch.setattr(engine_module, "find_spec", lambda name: object())
        real = engine_module.python_command
        monkeypatch.setattr(engine_module, "python_command", lambda *arguments: real(str(file), arguments[-1]))
        return log

    return installed


def test_models_in_vllm_go_in_turns_and_are_compared_at_each_batch_size(
    vllm: Callable[[str], Path], llama: ModelHandle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    other = tmp_path / "twin"
    log = vllm(PROCESS)
    monkeypatch.setattr(engine_module, "resolve_reference", lambda reference: str(reference))
    other.symlink_to(llama.reference)
    command = ["speed", "--model", str(other), "--against", llama.reference, "--engine", "vllm", "--batch-size", "1", "8", *SIZES, "--json"]
    assert main(command) == 0, capsys.readouterr().err
    body = json.loads(capsys.readouterr().out)
    assert list(body["batches"]) == ["1", "8"]
    for batch, result in body["batches"].items():
        assert result["first_token_speedup"]["median"] == result["prefill_speedup"]["median"] == 0.5
        assert result["decode_speedup"]["median"] == 1.0
        assert result["compressed"]["prefill_tokens_per_second"]["median"] == int(batch) * 4 / 2.0
        assert result["compressed"]["decode_tokens_per_second"]["median"] == int(batch) * 2 / 1.0
        assert (result["compressed"]["memory"]["loading"], result["compressed"]["memory"]["running"]) == (100, 50)
        assert "float32, cpu, vLLM 0.0" in result["compressed"]["protocol"]
        assert result["dense"]["parameters"] == llama.parameters
    asked = [line.split() for line in log.read_text().splitlines()]
    dense = Path(llama.reference).name
    assert [(name == "twin", size) for name, size in asked] == [
        (name, size) for size in ("1", "8") for name in (False, True, False, True, True, False)
    ]
    assert {name for name, _ in asked} == {"twin", dense}
    assert main(command[:-1]) == 0
    assert capsys.readouterr().out.count("Slower than the dense model here: prefill (0.50 times), TTFT (0.50 times).") == 2


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("import sys; sys.exit('ValueError: no such kernel')", r"status 1: ValueError: no such kernel"),
        ('print(MARK + \'{"peak": null, "place": ""}\', flush=True); raise MemoryError(\'no room\')', r"status 1: .*no room"),
    ],
)
def test_a_process_that_ends_is_told_in_a_line(
    script: str, words: str, vllm: Callable[[str], Path], llama: ModelHandle, capsys: pytest.CaptureFixture[str]
):
    vllm(script)
    assert main(["speed", "--model", llama.reference, "--engine", "vllm", *SIZES]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "vLLM's process with" in error
    assert re.search(words, error)


def test_vllm_has_to_be_installed(llama: ModelHandle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(engine_module, "find_spec", lambda name: None)
    assert main(["speed", "--model", llama.reference, "--engine", "vllm", *SIZES]) == 2
    assert "python -m pip install 'lowrank-studio[vllm]'" in capsys.readouterr().err


def test_batch_sizes_are_measured_one_after_the_other_in_transformers(llama: ModelHandle, capsys: pytest.CaptureFixture[str]):
    command = ["speed", "--model", llama.reference, "--batch-size", "1", "3", *SIZES, "--no-peak-memory", "--json"]
    assert main(command) == 0
    body = json.loads(capsys.readouterr().out)
    assert [f"batch {size}," in result["protocol"] for size, result in body["batches"].items()] == [True, True]
    assert main([*command[:3], "--batch-size", "2", *SIZES, "--no-peak-memory", "--json"]) == 0
    assert "batch 2," in json.loads(capsys.readouterr().out)["protocol"]  # a single one as ever
    assert main([*command[:3], "--batch-size", "0", *SIZES]) == 2
    assert "batch size must be at least 1" in capsys.readouterr().err


def test_prompts_of_both_engines_are_the_same():
    config = SpeedConfig(batch_size=2, prompt_tokens=5)
    assert torch.equal(random_prompts(300, config), random_prompts(300, config))
    assert random_prompts(300, config).shape == (2, 5)
