"""``lowrank serve`` as a user has it: the command in a process, and requests to its endpoint."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank_core.runs.processes import python_command

__all__ = ["Endpoint", "served"]

_LIMIT = 600
"""Seconds for a server to start, answer and end."""


class Endpoint:
    """Address of a server that is ready, and the model's name there."""

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(f"{self.url}{path}") as answer:
            text = answer.read()
        return json.loads(text) if text else {}

    def post(self, path: str, **body: object) -> dict:
        data = json.dumps({"model": self.model, **body}).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())

    def greedy(self, prompt: str, tokens: int, **more: object) -> dict:
        """Return the first choice of a completion without sampling."""
        return self.post("/v1/completions", prompt=prompt, max_tokens=tokens, temperature=0, **more)["choices"][0]


@contextmanager
def served(folder: Path, *options: str, cwd: Path) -> Iterator[Endpoint]:
    """Serve ``folder``; the command is interrupted at the end, and must end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = python_command("-m", "lowrank_core", "serve", str(folder), "--port", str(port), *options, "--json")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=cwd) as process:
        watchdog = threading.Timer(_LIMIT, process.kill)
        watchdog.start()
        assert process.stderr is not None
        said = ""
        for line in iter(process.stderr.readline, ""):
            said += line
            if line.startswith("ready at "):
                break
        assert "ready at" in said, said
        drain = threading.Thread(target=process.stderr.read)
        drain.start()
        try:
            yield Endpoint(f"http://127.0.0.1:{port}", folder.name)
        finally:
            process.send_signal(signal.SIGINT)
            assert process.stdout is not None
            result = process.stdout.read()
            drain.join()
            watchdog.cancel()
    assert process.returncode == 0, said
    assert json.loads(result)["model"] == folder.name
