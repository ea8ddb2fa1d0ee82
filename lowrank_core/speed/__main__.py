"""The process that ``measure_memory`` starts: a request on stdin, peaks on stdout."""

from __future__ import annotations

import contextlib
import json
import sys

import torch

from lowrank_core.config import ModelSource, from_mapping, to_mapping
from lowrank_core.config.speed import SpeedConfig
from lowrank_core.errors import LowRankError, ModelError
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.models.unrolled import roll_back
from lowrank_core.runs.measurements import MemoryReport
from lowrank_core.speed.memory import Meter
from lowrank_core.speed.timing import prompt_for, timed_generation

__all__: list[str] = []


def _measured(source: ModelSource, config: SpeedConfig, fingerprint: str) -> MemoryReport:
    device = _run(load_model(source), config)  # once for what libraries and threads take: no part of the model
    meter = Meter(device)
    handle = load_model(source)
    loading = meter.peak()
    meter.restart()
    _run(handle, config)
    report = MemoryReport(loading, meter.peak(), meter.measured)
    if fingerprint and handle.fingerprint != fingerprint:
        raise ModelError(f"{source.reference} has changed since it was loaded")
    return report


def _run(handle: ModelHandle, config: SpeedConfig) -> torch.device:
    roll_back(handle.module, keep=lambda unrolled: not unrolled.dense)  # as it is stored
    timed_generation(handle, prompt_for(handle, config), config.new_tokens)
    return handle.device


def main() -> int:
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    try:
        with contextlib.redirect_stdout(sys.stderr):
            report = _measured(from_mapping(ModelSource, request["source"]), SpeedConfig(**request["config"]), request["fingerprint"])
    except LowRankError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(to_mapping(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
