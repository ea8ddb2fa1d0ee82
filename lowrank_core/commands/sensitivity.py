"""``lowrank sensitivity``: measure in an existing or a new run."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from lowrank_core.config import CalibrationConfig, ModelSource, RunConfig, TextConfig
from lowrank_core.errors import ConfigError
from lowrank_core.runs import Run, client, create_run, open_run
from lowrank_core.sensitivity.config import TYPE, SensitivityConfig
from lowrank_core.sensitivity.records import SensitivityCell
from lowrank_core.studies.requests import SensitivityRequest
from lowrank_core.types import Result
from lowrank_core.wording import given_percent
from lowrank_core.worker.main import measure_alone
from lowrank_core.worker.sensitivity import SensitivityOutcome

__all__ = ["NewRun", "sensitivity_in"]

_MAX_ROWS = 10


@dataclass(frozen=True)
class NewRun:
    """The run that is made where there is none."""

    model: ModelSource
    text: TextConfig
    calibration: CalibrationConfig


def sensitivity_in(folder: Path | None, new: NewRun | None, config: SensitivityConfig) -> Result:
    """Measure what is missing in the run at ``folder``, or in a new one there (under the home where ``folder`` is None).

    A run with a worker is left to it: the request waits until its trials are done.

    Raises:
        ConfigError: a run and a model were given, or neither.
        LowRankError: as ``measure_alone``.
    """
    run = _run(folder, new)
    run.refuse_if_recorded()
    if run.worker_alive() and run.status().pid != os.getpid():
        request = client.submit(run, SensitivityRequest(config), launch=False)
        return {
            "run": str(run.path),
            "request": request,
            "text": f"{run.path} has a worker, which measures when its trials are done; see the Sensitivity page.",
        }
    return _told(run, measure_alone(run, config, verbose=sys.stderr.isatty()))


def _run(folder: Path | None, new: NewRun | None) -> Run:
    there = folder is not None and (folder / "run.json").exists()
    if there and new is not None:
        raise ConfigError(f"{folder} is a run with a model and a text of its own. Leave --model and --text out, or give a new folder.")
    if new is not None:
        return create_run(RunConfig(model=new.model, text=new.text, calibration=new.calibration), path=folder)
    if folder is None:
        raise ConfigError("where to measure? Give --run DIR, or --model M and --text T for a new run.")
    return open_run(folder)


def _told(run: Run, result: SensitivityOutcome) -> Result:
    warnings, counted = run.status().dense_warnings, f"{result.measured} cells measured now, {len(result.cells)} in {run.path}"
    return {
        "run": str(run.path),
        "file": result.file,
        "measured": result.measured,
        "setting": asdict(result.setting),
        "cells": [asdict(cell) for cell in result.cells],
        "warnings": list(warnings),
        "text": "\n".join([*_lines(result.cells), _protocol(result), *(f"warning: {warning}" for warning in warnings), counted]),
    }


def _protocol(result: SensitivityOutcome) -> str:
    setting = result.setting
    top = f", {setting.top_k} likeliest tokens" if setting.top_k else ""
    return (
        f"KL to the dense model, nats per token{top}; {setting.basis}, {setting.storage}, one by one, {setting.dtype}; {setting.protocol}"
    )


def _lines(cells: tuple[SensitivityCell, ...]) -> list[str]:
    """Return a table of types by kept ratio, and the most sensitive modules at the first ratio."""
    kept = sorted({cell.kept for cell in cells})
    by_key = {cell.key: cell for cell in cells}
    types = list(dict.fromkeys(cell.name for cell in cells if cell.scope == TYPE))
    lines = [f"{'all of a type, kept':30}" + "".join(f"{given_percent(ratio):>12}" for ratio in kept)] if types else []
    lines += [f"{kind:30}" + "".join(f"{_word(by_key.get((TYPE, kind, ratio))):>12}" for ratio in kept) for kind in types]
    modules = [cell for cell in cells if cell.scope != TYPE]
    if modules:
        first = sorted(
            (cell for cell in modules if cell.kept == modules[0].kept), key=lambda cell: -(math.inf if cell.kl is None else cell.kl)
        )
        lines.append(f"the most sensitive modules at {given_percent(modules[0].kept)} kept, each alone:")
        lines += [f"  {cell.name:40} {_word(cell):>12}" for cell in first[:_MAX_ROWS]]
    return lines


def _word(cell: SensitivityCell | None) -> str:
    return "-" if cell is None else "diverged" if cell.kl is None else f"{cell.kl:.3g}"
