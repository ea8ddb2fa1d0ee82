"""A model of twice the memory that it may take: calibrated, compressed, written and evaluated."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch
from checkpoints import save_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_core.runs.processes import python_command, python_environment

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")]

_CHILD = """
import json, sys
from lowrank_core.runs.processes import return_freed_arrays
return_freed_arrays()
import torch, transformers, scipy, datasets  # what any command has loaded once it works
import lowrank_core.cli, lowrank_core.commands.compress
print("ready", flush=True)
sys.stdin.readline()
sys.exit(lowrank_core.cli.main(sys.argv[1:]))
"""


def own_memory(pid: int) -> int:
    """Return the bytes of a process that no file backs."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def run_within(size: int, *arguments: str) -> tuple[dict[str, object], int]:
    """Run a command; kill it when it takes more than ``size`` bytes beside those of Python and its libraries. Return what it printed."""
    command = python_command("-c", _CHILD, *arguments, "--json")
    environment = python_environment(MALLOC_ARENA_MAX="2")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        before = own_memory(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        peak = 0
        while child.poll() is None:
            try:
                peak = max(peak, own_memory(child.pid) - before)
            except OSError:
                break
            if peak > size:
                child.kill()
            time.sleep(0.01)
        output = child.stdout.read()
        assert child.wait() == 0, f"{peak / 2**20:.0f} MiB of {size / 2**20:.0f}"
    return json.loads(output), peak


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    """Embedding, head and 2 blocks with 660 MiB of weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=80_000,
        hidden_size=1024,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=16,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return save_tokenizer(folder, sample_text)


def test_twice_the_memory(large: Path, text_file: Path, tmp_path: Path) -> None:
    weights = (large / "model.safetensors").stat().st_size
    text = ["--text", f"file:{text_file}", "--context", "16"]
    small = ["--windows", "16", "--batch-size", "2", "--test-windows", "4", "--compression-ratio", "0.3"]
    out = tmp_path / "out"
    limit = weights // 2
    written, _ = run_within(limit, "compress", "--model", str(large), *text, *small, "--memory", "1GB", "--out", str(out))
    assert written["written_bytes"] < weights  # type: ignore[operator]
    evaluated, _ = run_within(limit, "evaluate", "--model", str(out), *text, "--test-windows", "4", "--memory", "1GB")
    assert evaluated["perplexity"] == pytest.approx(written["perplexity"], rel=1e-6)
