"""Speed of models in vLLM: each in a process of its own, which waits while the other runs, so that they go in turns."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NoReturn

import torch

from lowrank_core.config import ModelSource
from lowrank_core.config.speed import SpeedConfig
from lowrank_core.errors import ConfigError, ModelError
from lowrank_core.models import load_model
from lowrank_core.models.headers import check_headers, vllm_dtype
from lowrank_core.models.loading import resolve_reference
from lowrank_core.runs.measurements import MemoryReport, SpeedReport
from lowrank_core.runs.processes import python_command, python_environment
from lowrank_core.speed.timing import Counted, Timing, rates_of
from lowrank_core.speed.turns import in_turns

__all__ = ["MARK", "VllmSpeed", "speed_in_vllm"]

MARK = "lowrank-speed: "
"""Begins the lines that the process answers with."""

_MEMORY = (
    "peak memory of vLLM's process above what it held before it loaded the model: weights, the key-value cache that it reserves "
    "(VLLM_CPU_KVCACHE_SPACE, in GiB, on a CPU), and what it keeps for its kernels"
)


@dataclass(frozen=True)
class VllmSpeed:
    """Reports and timings of models in one batch size, both in the order of the models."""

    reports: tuple[SpeedReport, ...]
    timings: tuple[tuple[Timing, ...], ...]


def speed_in_vllm(sources: Sequence[ModelSource], configs: Sequence[SpeedConfig], *, peak_memory: bool = True) -> list[VllmSpeed]:
    """Measure models in vLLM, in turns round by round; one result for each config.

    Raises:
        ConfigError: vLLM is not installed, or doesn't take a model; or the lengths pass its positions.
        ModelError: a model can't be loaded, or the process that runs it ended early.
    """
    if find_spec("vllm") is None:
        raise ConfigError("the engine vllm needs vllm, which is not installed. Install it: python -m pip install 'lowrank-studio[vllm]'.")
    started = [(source, resolve_reference(source.reference)) for source in sources]
    dtypes = [vllm_dtype(place, source) for source, place in started]
    models = [_counted(place, source, configs) for source, place in started]
    results = []
    with ExitStack() as stack:
        processes = [
            stack.enter_context(_running(place, dtype, *model, configs))
            for (_, place), dtype, model in zip(started, dtypes, models, strict=True)
        ]
        for config in configs:
            actions = [partial(process.generation, config) for process in processes]
            in_turns(actions, config.warmup)
            timings = tuple(zip(*in_turns(actions, config.rounds), strict=True))
            reports = [process.report(config, times, peak_memory) for process, times in zip(processes, timings, strict=True)]
            results.append(VllmSpeed(tuple(reports), timings))
    return results


def _counted(place: str, source: ModelSource, configs: Sequence[SpeedConfig]) -> tuple[Counted, int]:
    """Return counts and vocabulary of a model, which is checked and let go of."""
    if Path(place).is_dir():
        check_headers(Path(place))
    handle = load_model(source)
    for config in configs:
        config.check_fits(handle)
    return Counted(handle.reference, handle.parameters, handle.bytes), handle.vocabulary


class _Process:
    """A process that has loaded a model in vLLM."""

    def __init__(self, process: subprocess.Popen[str], model: Counted, errors: IO[str]) -> None:
        self._process, self._model, self._errors = process, model, errors
        self._loaded = self._answer()
        self._running_peak: int | None = None

    def generation(self, config: SpeedConfig) -> Timing:
        """Return the seconds of one generation."""
        assert self._process.stdin is not None
        try:
            print(json.dumps(asdict(config)), file=self._process.stdin, flush=True)
        except OSError:
            self._refuse()
        body = self._answer()
        self._running_peak = body["peak"]  # since the first generation of this config
        return Timing(body["first_token"], body["first_token"], body["decode"])

    def report(self, config: SpeedConfig, timings: Sequence[Timing], peak_memory: bool) -> SpeedReport:
        memory = MemoryReport(self._loaded["peak"], self._running_peak, _MEMORY) if peak_memory else None
        return rates_of(self._model, config, timings, memory, self._loaded["place"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = next((line for line in self._process.stdout if line.startswith(MARK)), None)
        if line is None:
            self._refuse()
        body: dict[str, Any] = json.loads(line.removeprefix(MARK))
        return body

    def _refuse(self) -> NoReturn:
        self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        named = [line for line in lines if "Error: " in line]
        last = (named or lines or ["it said nothing"])[-1][-300:]
        raise ModelError(f"vLLM's process with {self._model.reference} ended early (status {self._process.returncode}: {last}).")


@contextmanager
def _running(place: str, dtype: str, model: Counted, vocabulary: int, configs: Sequence[SpeedConfig]) -> Iterator[_Process]:
    request = {"model": place, "dtype": dtype, "vocabulary": vocabulary, "configs": [asdict(config) for config in configs]}
    threads = str(torch.get_num_threads())
    environment = python_environment(OMP_NUM_THREADS=threads, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            python_command("-m", "lowrank_core.speed.vllm_process", json.dumps(request)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        ) as process,
    ):
        try:
            yield _Process(process, model, errors)
        finally:
            process.kill()
            with suppress(BrokenPipeError):  # a line that an ended process didn't read
                process.stdin.close()  # type: ignore[union-attr]
