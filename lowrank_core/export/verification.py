"""Is a folder what was exported? Its hashes, and its perplexity measured again by a process that knows nothing of this one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lowrank_core.config import ModelSource, TextConfig, from_mapping, to_mapping
from lowrank_core.errors import ConfigError, LowRankError, ModelError
from lowrank_core.export.manifest import Measurement, measurement_from, read_manifest
from lowrank_core.export.measuring import HeldOut, measured
from lowrank_core.models.integrity import check_folder
from lowrank_core.models.loading import load_model
from lowrank_core.runs.processes import python_command, python_environment
from lowrank_core.text import load_windows

__all__ = ["Verification", "tolerance_of", "verify"]

_PATIENCE = 0.5  # seconds
_LOGIT = 16
"""Size of a large logit: its rounding bounds what rounding does to a loss."""


@dataclass(frozen=True)
class Verification:
    """Recorded and measured state of a folder.

    Attributes:
        ok: every file is as listed, and the perplexities agree to rounding; where nothing comparable is recorded, the files alone.
        files: how many were checked.
        recorded: perplexity in ``lowrank.json``; None if none is recorded, or it was measured on other windows.
        measured: perplexity now. difference: measured - recorded. tolerance: in perplexity, see ``tolerance_of``.
        protocol: of the measurement, in a line.
    """

    ok: bool
    files: int
    recorded: float | None
    measured: float
    difference: float | None
    tolerance: float | None
    protocol: str


def tolerance_of(dtype: str) -> float:
    """Return by how much rounding may move a mean NLL (nats), for a model that runs in ``dtype``.

    A logit of 16 is rounded by at most half the distance of its neighbours, 8 eps; the mean over many tokens moves by less. It is eps of
    the dtype that the model *runs* in: weights that are stored in bfloat16 are read exactly, and on a CPU run in float32 (1e-6 nats);
    run in bfloat16 the bound is 0.06.
    """
    eps: float = torch.finfo(getattr(torch, dtype)).eps
    return _LOGIT * eps / 2


def verify(
    folder: Path,
    *,
    text: TextConfig | None = None,
    split: str = "test",
    device: str = "auto",
    waiting: Callable[[], None] | None = None,
) -> Verification:
    """Check the files of an export and measure its perplexity again in a fresh process.

    Args:
        text: measured on instead of what the manifest recorded: ``test_windows`` of ``split``.
        waiting: called twice a second meanwhile; if it raises, the process is ended.

    Raises:
        ModelError: a file is damaged or altered, or the folder is no export.
        ConfigError: nothing is recorded, and no text is given; or the recorded text has changed.
    """
    manifest = read_manifest(folder)
    files = check_folder(folder)
    recorded = manifest.measured
    if text is None and recorded is None:
        raise ConfigError(f"{folder} has no recorded perplexity to compare with. Give a text to measure it on (--text).")
    config, part, dtype = _asked(recorded, text, split)
    request = {"source": to_mapping(ModelSource(str(folder), device, dtype)), "text": to_mapping(config), "split": part}
    result = _in_fresh_process(request, waiting)
    if recorded is not None and text is None and result.protocol.sha256 != recorded.protocol.sha256:
        raise ConfigError(
            f"the text {config.reference} has changed since the export: its windows are other tokens. Restore it, or give one with --text."
        )
    return _compared(files, recorded, result)


def _asked(recorded: Measurement | None, text: TextConfig | None, split: str) -> tuple[TextConfig, str, str]:
    """Return on what to measure, which split of it, and in which dtype."""
    dtype = "auto" if recorded is None else recorded.protocol.dtype
    dtype = dtype if dtype in ("float32", "bfloat16") else "auto"
    if text is not None:
        return text, split, dtype
    assert recorded is not None
    return recorded.protocol.config, recorded.protocol.split, dtype


def _compared(files: int, recorded: Measurement | None, result: Measurement) -> Verification:
    same = recorded is not None and recorded.protocol.sha256 == result.protocol.sha256
    if recorded is None or not same:
        return Verification(True, files, None, result.perplexity, None, None, result.protocol.line)
    limit = max(tolerance_of(recorded.protocol.dtype), tolerance_of(result.protocol.dtype))
    return Verification(
        ok=abs(result.nll - recorded.nll) <= limit,
        files=files,
        recorded=recorded.perplexity,
        measured=result.perplexity,
        difference=result.perplexity - recorded.perplexity,
        tolerance=recorded.perplexity * limit,
        protocol=result.protocol.line,
    )


def _in_fresh_process(request: Mapping[str, object], waiting: Callable[[], None] | None) -> Measurement:
    """Measure in a new interpreter: nothing of this one's models, caches or registrations is there.

    Raises:
        ModelError: it failed; with what it said.
    """
    with subprocess.Popen(
        python_command("-c", "from lowrank_core.export.verification import _answer; _answer()"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=python_environment(),
    ) as process:
        said, complained = _heard(process, json.dumps(request), waiting)
    body = json.loads(said.splitlines()[-1]) if said.strip() else {}
    if "error" in body or process.returncode != 0:
        raise ModelError(str(body.get("error") or (complained.strip().splitlines() or ["no message"])[-1]))
    return measurement_from(body)


def _heard(process: subprocess.Popen[str], request: str, waiting: Callable[[], None] | None) -> tuple[str, str]:
    """Return what the process said on stdout and stderr once it has ended."""
    asked: str | None = request
    try:
        while True:
            try:
                return process.communicate(asked, timeout=_PATIENCE)
            except subprocess.TimeoutExpired:
                asked = None  # it has it; communicate goes on where it was
                if waiting is not None:
                    waiting()
    except BaseException:
        process.kill()
        raise


def _answer() -> None:
    """Read a request on stdin, and print the measurement, or the error, as one line of JSON."""
    request = json.loads(sys.stdin.read())
    source, config = from_mapping(ModelSource, request["source"]), from_mapping(TextConfig, request["text"])
    try:
        handle = load_model(source)
        windows = load_windows(config, handle.tokenizer, request["split"], count=config.test_windows)
        print(json.dumps(asdict(measured(handle, HeldOut(config, windows)))))
    except LowRankError as error:
        print(json.dumps({"error": str(error)}))
