"""``lowrank serve``: what is refused before anything starts, and the life of a server, here a small one of Python's own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from exported import all_forms
from safetensors.torch import load_file, save_file

from lowrank_core.cli import main
from lowrank_core.commands import serve as serving
from lowrank_core.config import ExportConfig, ModelSource
from lowrank_core.config.serving import ServeConfig
from lowrank_core.errors import LowRankError, ModelError, RunError
from lowrank_core.export import export
from lowrank_core.layers.forms import FORMS
from lowrank_core.models import load_model
from lowrank_core.models.headers import check_headers
from lowrank_core.runs.processes import python_command

SERVER = """
import http.server, sys, time
print("a message", flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"ok")
    def log_message(self, *unused): print("asked", self.path, flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, llama_checkpoint: Path) -> Path:
    path = tmp_path_factory.mktemp("served") / "llama"
    export(all_forms(load_model(ModelSource(str(llama_checkpoint)))), path)
    return path


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: True)


def _changed(folder: Path, target: Path, change: Callable[[dict], object], *, manifest: bool = True) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        if manifest or path.name != "lowrank.json":
            (target / path.name).write_bytes(path.read_bytes())
    body = json.loads((target / "config.json").read_text())
    change(body["quantization_config"]["layers"])
    (target / "config.json").write_text(json.dumps(body))
    return target


def _damage(folder: Path, target: Path) -> Path:
    _changed(folder, target, lambda layers: None)
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8])
    return target


LAYER, STACK = "model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.q_proj"
DAMAGES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "a file is cut short": (_damage, "model.safetensors is damaged or cut short"),
    "a newer form": (
        lambda a, b: _changed(a, b, lambda layers: layers[LAYER].update(form="tensor_train")),
        f"no valid form ('tensor_train'; this version knows {', '.join(FORMS)})",
    ),
    "a rank that is none": (lambda a, b: _changed(a, b, lambda layers: layers[LAYER].update(rank=99)), "no valid rank (99; 1 to 32"),
    "a foreign rank": (
        lambda a, b: _changed(a, b, lambda layers: layers[LAYER].update(rank=11)),
        f"{LAYER}.down has the shape (12, 32), and config.json says (11, 32)",
    ),
    "a layer that is not there": (
        lambda a, b: _changed(a, b, lambda layers: layers.update({"model.layers.7.mlp.up_proj": layers[LAYER]})),
        "which this architecture has not",
    ),
}


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_can_not_be_served_is_refused_before_anything_starts(
    engine: str, damage: str, folder: Path, tmp_path: Path, port: int, installed: None, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(serving, "_running", lambda command: pytest.fail("a server was started"))
    spoil, message = DAMAGES[damage]
    assert main(["serve", str(spoil(folder, tmp_path / "spoiled")), "--port", str(port), "--engine", engine]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1


def test_sound_folders_pass_the_same_check(folder: Path, llama_checkpoint: Path, gpt2_checkpoint: Path, tmp_path: Path):
    check_headers(folder)
    check_headers(llama_checkpoint)
    export(all_forms(load_model(ModelSource(str(gpt2_checkpoint)))), tmp_path / "gpt2", config=ExportConfig(quantization="int8"))
    check_headers(tmp_path / "gpt2")
    tensors = load_file(tmp_path / "gpt2" / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".values"))
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, tmp_path / "gpt2" / "model.safetensors", {"format": "pt"})
    (tmp_path / "gpt2" / "lowrank.json").unlink()
    with pytest.raises(ModelError, match="has the shape"):
        check_headers(tmp_path / "gpt2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "sglang"], "engine must be one of transformers, vllm; got 'sglang'"),
        (["--port", "0"], "port must be at least 1"),
        (["--host", "192.0.2.1"], "can't listen on 192.0.2.1"),
        (["--engine", "vllm", "--device", "cpu"], "Leave --device out"),
    ],
)
def test_what_is_asked_for_wrongly_is_told(options: list[str], message: str, folder: Path, port: int, installed: None, capsys):
    assert main(["serve", str(folder), "--port", str(port), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_missing_engine_is_told_with_the_extra_that_brings_it(engine: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    assert main(["serve", str(folder), "--engine", engine]) == 2
    extra = {"transformers": "serve", "vllm": "vllm"}[engine]
    assert f"Install it: python -m pip install 'lowrank-studio[{extra}]'." in capsys.readouterr().err


def test_a_port_that_is_taken_is_told(folder: Path, installed: None, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        assert main(["serve", str(folder), "--port", str(taken)]) == 2
    assert f"port {taken} of 127.0.0.1 is taken. Give another one with --port." in capsys.readouterr().err


def test_vllm_gets_the_folder_and_not_the_plain_form(folder: Path, llama_checkpoint: Path, tmp_path: Path):
    config = ServeConfig("vllm", port=8123)
    command = serving._vllm_command(str(folder), ModelSource(str(folder)), config)
    assert command[1:4] == ["-P", "-m", "vllm.entrypoints.openai.api_server"]
    assert f"--model {folder} --served-model-name llama --host 127.0.0.1 --port 8123 --dtype float32" in " ".join(command)
    export(all_forms(load_model(ModelSource(str(llama_checkpoint)))), tmp_path / "plain", config=ExportConfig(form="plain"))
    with pytest.raises(LowRankError, match=r"vllm serve .*plain --trust-remote-code"):
        serving._vllm_command(str(tmp_path / "plain"), ModelSource(str(tmp_path / "plain")), config)


def test_a_server_is_awaited_and_ended(port: int, capsys: pytest.CaptureFixture[str]):
    with serving._running(python_command("-c", SERVER, str(port))) as server:
        server.await_health(f"http://127.0.0.1:{port}")
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models").read()
        process = server.process
        for _ in range(1000):
            if "asked /v1/models" in (said := capsys.readouterr().err):
                break
            time.sleep(0.01)
        assert "a message" not in said  # of the time before it was ready
    assert process.poll() is not None
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('lowrank: model: x is damaged. Copy it.')", r"^model: x is damaged. Copy it.$"),
        ("raise ValueError('no such thing')", "the server did not start: no such thing"),
        (
            "print('(EngineCore) ValueError: Unknown layer'); raise RuntimeError('failed. See root cause above.')",
            "did not start: Unknown layer",
        ),
        ("pass", "the server did not start: it gave no reason"),
    ],
)
def test_a_server_that_does_not_start_gives_its_reason(code: str, message: str, port: int):
    with serving._running([sys.executable, "-c", code]) as server, pytest.raises(ModelError, match=message):
        server.await_health(f"http://127.0.0.1:{port}")


def test_a_server_that_ends_is_an_error(port: int):
    with serving._running([sys.executable, "-c", "raise SystemExit(3)"]) as server, pytest.raises(RunError, match="with status 3"):
        server.wait()


def test_a_server_is_not_left_behind_where_the_command_is_terminated():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), serving._ended_like_an_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_command_ends_its_server(folder: Path, port: int, tmp_path: Path):
    """The whole command, with a small server in place of the engine's."""
    code = (
        "import sys\nfrom lowrank_core.commands import serve\nserve.find_spec = lambda name: True\n"
        f"serve._CHILD = {SERVER.replace('sys.argv[1]', str(port))!r}\nfrom lowrank_core.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    command = python_command("-c", code, "serve", str(folder), "--port", str(port), "--json")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        assert process.stdout is not None
        assert process.stderr is not None
        lines = []
        for line in iter(process.stderr.readline, ""):
            lines.append(line)
            if line.startswith("ready at "):
                process.send_signal(signal.SIGTERM)  # started in the background, a process may ignore SIGINT
        output = process.stdout.read()
        watchdog.cancel()
    assert process.returncode == 0, "".join(lines)
    result = json.loads(output)
    assert "loading" in lines[0]
    assert f"ready at http://127.0.0.1:{port}/v1, model 'llama'; Ctrl-C stops it.\n" in lines
    assert result == {"url": f"http://127.0.0.1:{port}/v1", "model": "llama"}
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health")


def test_the_plugin_that_vllm_looks_up_is_there():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["lowrank"].partition(":")
    assert callable(getattr(import_module(module), name))
    assert {"serve", "vllm"} <= project["optional-dependencies"].keys()
