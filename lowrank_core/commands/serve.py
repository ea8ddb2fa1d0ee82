"""``lowrank serve``: a server in a process of its own, which is awaited, and ended with this one.

Both engines answer ``GET /health`` once the model is loaded, ``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``. With
transformers' server the model is loaded as by every other command, with all their checks; vLLM loads it by our plugin (``layers.vllm``).
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from transformers import AutoConfig, PretrainedConfig

from lowrank_core.config import ModelSource, from_mapping, to_mapping
from lowrank_core.config.serving import ServeConfig
from lowrank_core.errors import ConfigError, LowRankError, ModelError, RunError
from lowrank_core.layers.channels import REDUCED_FORMS
from lowrank_core.models import load_model
from lowrank_core.models.headers import check_headers
from lowrank_core.models.loading import resolve_reference
from lowrank_core.models.plain import is_plain_form
from lowrank_core.models.unrolled import natively
from lowrank_core.runs.processes import python_command, python_environment
from lowrank_core.types import Result

__all__ = ["serve"]

_NEEDED = {"transformers": ("fastapi", "openai", "pydantic", "uvicorn"), "vllm": ("vllm",)}
_EXTRA = {"transformers": "serve", "vllm": "vllm"}
_POLL = 0.2  # seconds
_PATIENCE = 20.0
"""Seconds that a server has to end its requests."""


def serve(source: ModelSource, config: ServeConfig) -> Result:
    """Serve until this process is interrupted.

    Raises:
        ConfigError: the engine is not installed, or doesn't take the model; the address is taken or none of this machine.
        ModelError: the folder is damaged, of another format, or can't be loaded.
        RunError: the server ended by itself.
    """
    _check_engine(config.engine)
    _check_address(config)
    place = resolve_reference(source.reference)
    if Path(place).is_dir():
        check_headers(Path(place))
    command = _vllm_command(place, source, config) if config.engine == "vllm" else python_command("-c", _CHILD, _request(source, config))
    name, url = _name_of(place), f"http://{_in_url(config.host)}:{config.port}"
    print(f"loading {source.reference} in {config.engine} …", flush=True)
    with _ended_like_an_interrupt(), _running(command) as server:
        try:
            server.await_health(url)
            print(f"ready at {url}/v1, model {name!r}; Ctrl-C stops it.", flush=True)
            server.wait()
        except KeyboardInterrupt:
            return {"url": f"{url}/v1", "model": name, "text": "Stopped."}


def _check_engine(engine: str) -> None:
    missing = [name for name in _NEEDED[engine] if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the engine {engine} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. "
            f"Install it: python -m pip install 'lowrank-studio[{_EXTRA[engine]}]'."
        )


def _check_address(config: ServeConfig) -> None:
    """Bind the address once: nothing is loaded where it can't be listened on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {config.port} of {config.host} is taken. Give another one with --port.") from error
        raise ConfigError(
            f"can't listen on {config.host}, port {config.port} ({error.strerror or error}). Give --host or --port."
        ) from error


def _in_url(host: str) -> str:
    """Return the address under which this machine reaches the server."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{reachable}]" if ":" in reachable else reachable


def _name_of(place: str) -> str:
    return Path(place).name if Path(place).exists() else place


def _request(source: ModelSource, config: ServeConfig) -> str:
    return json.dumps({"source": to_mapping(source), "serving": to_mapping(config)})


def _check_for_vllm(place: str, config: PretrainedConfig) -> None:
    """Raise for a folder that vLLM does not read, or not by us.

    Raises:
        ConfigError: it is one.
    """
    if is_plain_form(config):
        raise ConfigError(
            f"vLLM would run the module that the plain form brings. Leave --engine out, or run: vllm serve {place} --trust-remote-code"
        )
    stated = getattr(config, "quantization_config", None)
    layers = stated.get("layers") if isinstance(stated, Mapping) else getattr(stated, "layers", None)
    if isinstance(layers, Mapping) and any(entry.get("form") in REDUCED_FORMS for entry in layers.values()):
        raise ConfigError(
            "vLLM does not read layers with fewer channels than the architecture (--modules). Leave --engine out, or take the form dense."
        )


def _vllm_command(place: str, source: ModelSource, config: ServeConfig) -> list[str]:
    """Return the command of vLLM's server. Its console script fails in some builds; without a GPU it runs in float32, as we do.

    Raises:
        ConfigError: it doesn't take the model, or not by us.
    """
    if Path(place).is_file():
        raise ConfigError("vLLM reads no GGUF file by our means. Leave --engine out, or give the folder of an export.")
    if Path(place).is_dir():
        _check_for_vllm(place, AutoConfig.from_pretrained(place, local_files_only=True))
    if source.device != "auto":
        raise ConfigError("vLLM chooses the device by its build. Leave --device out.")
    dtype = "float32" if source.dtype == "auto" and not torch.cuda.is_available() else source.dtype
    options = {"model": place, "served-model-name": _name_of(place), "host": config.host, "port": str(config.port), "dtype": dtype}
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    return python_command("-m", "vllm.entrypoints.openai.api_server", *flags, "--enforce-eager")


class _Server:
    """A server's process. What it writes is kept until it is ready, for its error, and passed on from then."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._kept: deque[str] = deque(maxlen=400)
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if self._ready.is_set():
                sys.stderr.write(line)
            else:
                self._kept.append(line)

    def await_health(self, url: str) -> None:
        """Return once ``/health`` answers.

        Raises:
            ModelError: the process ended before.
        """
        while self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    self._ready.set()
                    return
            except OSError:
                time.sleep(_POLL)
        self._reader.join(_PATIENCE)
        raise ModelError(_error_in(list(self._kept)))

    def wait(self) -> NoReturn:
        """Wait for the end of the process.

        Raises:
            RunError: it ended.
        """
        raise RunError(f"the server ended by itself, with status {self.process.wait()}. Its last messages are above.")

    def stop(self) -> None:
        """End the process and all that it started."""
        if self.process.poll() is None:
            self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_PATIENCE)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # vLLM's engine is a process of its own
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _error_in(lines: list[str]) -> str:
    """Return the error of a server that did not start: ours, else the last exception's message that says anything."""
    ours = [line.removeprefix(_MARK).strip() for line in lines if line.startswith(_MARK)]
    messages = re.findall(r"\b\w*(?:Error|Exception): *(.+)", "\n".join(lines))
    reasons = [message for message in messages if "See root cause above" not in message]
    return ours[-1] if ours else f"the server did not start: {(reasons or ['it gave no reason'])[0].strip()[:300]}"


@contextmanager
def _running(command: list[str]) -> Iterator[_Server]:
    """Run a server in a process group of its own: Ctrl-C reaches this process alone, which ends it."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=python_environment(), start_new_session=True
    )
    server = _Server(process)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def _ended_like_an_interrupt() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that no server is left behind."""

    def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_MARK = "lowrank: "
_CHILD = "import sys; from lowrank_core.commands.serve import _answer; sys.exit(_answer(sys.argv[1]))"


def _answer(request: str) -> int:
    """Run transformers' server with a model that is loaded by us; its own way would load what we refuse."""
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    body = json.loads(request)
    source, config = from_mapping(ModelSource, body["source"]), from_mapping(ServeConfig, body["serving"])
    try:
        handle = load_model(source)
    except LowRankError as error:
        print(f"{_MARK}{error}", flush=True)
        return 2

    name = _name_of(resolve_reference(source.reference))

    class Loaded(model_manager.ModelManager):  # type: ignore[misc]
        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id

        def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
            return handle.module, handle.tokenizer

        def list_models(self, *_: Any, **__: Any) -> list[dict[str, Any]]:
            return [{"id": name, "object": "model", "created": 0, "owned_by": "", "status": {"value": "loaded"}}]

        get_gen_models = list_models  # its name in 5.19, which lists the hub's cache

    model_manager.ModelManager = Loaded  # `Serve` looks it up there
    with natively(handle.module):
        Serve(force_model=name, host=config.host, port=config.port, device=str(handle.device))
    return 0
