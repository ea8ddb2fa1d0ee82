"""Cost of every stage of ``compress``, each run in a process of its own, in units of a plain forward pass; next to an earlier build.

Notation::

    F    CPU seconds (user and system, all threads) of one forward pass of the dense model over the calibration tokens

Of an earlier build only the command line is used. Where its output does not tell stages, its totals stand alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import psutil
import torch

from lowrank_core.catalogue import as_markdown
from lowrank_core.config import ModelSource, TextConfig, to_mapping
from lowrank_core.config.benchmarks import PaceBenchmark
from lowrank_core.config.flags import flags_of
from lowrank_core.errors import ConfigError, RunError
from lowrank_core.models import load_model
from lowrank_core.runs.processes import python_command, python_environment
from lowrank_core.runs.stage_times import stage_of
from lowrank_core.text import load_windows
from lowrank_core.types import Result
from lowrank_core.wording import amount

__all__ = ["BuildPace", "PaceRow", "benchmark", "markdown_of", "pace_table"]

_THIS, _WHOLE, _REST = "this build", "in all", "the rest"
_ROOT = Path(__file__).resolve().parents[3]
_POLL_SECONDS = 0.05
_BATCH = 8


@dataclass(frozen=True)
class PaceRow:
    """A stage of a build.

    Attributes:
        stage: its name; what is in no stage (imports, hashes of the weights) is ``the rest``.
        cpu_seconds, seconds: of all threads on a processor, and on the clock.
        forwards: CPU seconds in units of F.
    """

    stage: str
    cpu_seconds: float
    seconds: float
    forwards: float


@dataclass(frozen=True)
class BuildPace:
    """One run of ``compress`` by a build.

    Attributes:
        build: ``this build``, or a git revision.
        rows: its stages where its output tells them, then the whole.
        peak_bytes: largest resident memory of the process.
        written_bytes: what it wrote to disk, files that it deleted included where the system counts them.
        kept_bytes: statistics and the exported folder.
        perplexity: of what was written, on test text; None where the build does not tell.
    """

    build: str
    rows: tuple[PaceRow, ...]
    peak_bytes: int
    written_bytes: int
    kept_bytes: int
    perplexity: float | None

    def row(self, stage: str) -> PaceRow | None:
        return next((row for row in self.rows if row.stage == stage), None)


def benchmark(source: ModelSource, text: TextConfig, config: PaceBenchmark) -> Result:
    """Run ``compress``, by an earlier build in turns if one is given, and compare the stages."""
    forward, builds = pace_table(source, text, config)
    result = {"model": source.reference, "forward_cpu_seconds": forward, "builds": [to_mapping(build) for build in builds]}
    return {**result, "text": markdown_of(forward, builds)}


def pace_table(source: ModelSource, text: TextConfig, config: PaceBenchmark) -> tuple[float, list[BuildPace]]:
    """Return F, and for each build the medians over its turns.

    Raises:
        ConfigError: there is no such revision, or no checkout to take it from.
        RunError: a build's ``compress`` failed; says which, with its last line.
    """
    source, text = _absolute(source, text)
    runs: dict[str, list[BuildPace]] = {}
    forwards = []
    with _trees(config.against) as trees:
        for turn in range(config.turns):
            for build, tree in list(trees.items())[:: -1 if turn % 2 else 1]:
                runs.setdefault(build, []).append(_run(build, tree, _arguments(source, text, config)))
                print(f"{build}, turn {turn + 1} of {config.turns}: done", file=sys.stderr, flush=True)
            forwards.append(_forward(source, text))
    forward = median(forwards)
    return forward, [_in_units(_middle(runs[build]), forward) for build in trees]


def _absolute(source: ModelSource, text: TextConfig) -> tuple[ModelSource, TextConfig]:
    """Return both with absolute paths: the processes work in a folder of their own."""
    model, (kind, colon, place) = Path(source.reference).expanduser(), text.reference.partition(":")
    source = replace(source, reference=str(model.absolute())) if model.exists() and source.reference != "demo" else source
    return source, replace(text, reference=f"{kind}:{Path(place).expanduser().absolute()}") if colon else text


def _arguments(source: ModelSource, text: TextConfig, config: PaceBenchmark) -> list[str]:
    flags = {**flags_of(source, always=("reference",)), **flags_of(text, always=("reference", "context", "calibration_windows"))}
    flags |= {"compression-ratio": config.compression_ratio, **({"preset": config.preset} if config.preset else {})}
    words = [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in flags.items()]
    return ["compress", *words, "--json"]


@contextmanager
def _trees(against: str) -> Iterator[dict[str, Path]]:
    """Give build -> the folder that its package is in; an earlier one is checked out for the time."""
    if not against:
        yield {_THIS: _ROOT}
        return
    with tempfile.TemporaryDirectory() as parent:
        tree = Path(parent) / "build"
        _git("worktree", "add", "--detach", str(tree), against)
        try:
            yield {_THIS: _ROOT, against: tree}
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> None:
    try:
        subprocess.run(["git", "-C", str(_ROOT), *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ConfigError("--against takes the earlier build from a git checkout, and there is no git here. Install it.") from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [""])[-1]
        raise ConfigError(f"--against: git {arguments[0]} failed ({reason}). Give a revision of the checkout that you run from.") from error


class _Watch(threading.Thread):
    """Watches the resident memory of a process, and what it writes.

    The system's own maximum of a child (``ru_maxrss``) would not do: on Linux it begins with the memory of the process that started it.
    """

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._process = process
        self.peak = self.written = 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(_POLL_SECONDS):
            try:
                self.peak = max(self.peak, _peak_of(self._process))
                counters = getattr(self._process, "io_counters", None)  # macOS has none
                self.written = counters().write_bytes if counters is not None else 0
            except (psutil.Error, OSError):
                continue  # it has just ended


def _peak_of(process: psutil.Process) -> int:
    """Return the largest resident memory so far where the system keeps it, else that of now."""
    status = Path(f"/proc/{process.pid}/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    kept = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
    return int(process.memory_info().rss) if kept is None else kept


def _run(build: str, tree: Path, arguments: Sequence[str]) -> BuildPace:
    """Run ``compress`` of the package in ``tree`` with a home of its own, so that nothing is there already."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+", encoding="utf-8") as log:
        home, out = Path(folder) / "home", Path(folder) / "out"
        command = python_command("-m", "lowrank_core", *arguments, "--out", str(out))
        environment = python_environment(PYTHONPATH=str(tree), LOWRANK_HOME=str(home))
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, cwd=folder, text=True) as process:
            watch = _Watch(psutil.Process(process.pid))
            watch.start()
            assert process.stdout is not None
            output = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        watch.ended.set()
        watch.join()
        if process.returncode:
            log.seek(0)
            reason = (log.read().strip().splitlines() or [f"exit status {process.returncode}"])[-1]
            raise RunError(f"compress of {build} failed: {reason.rstrip('.')}. Run it by itself to see more.")
        kept = sum(path.stat().st_size for place in (home, out) for path in place.rglob("*") if path.is_file())
    body = json.loads(output.strip().splitlines()[-1])
    rows = _rows(body.get("stages") or {}, usage.ru_utime + usage.ru_stime, seconds)
    return BuildPace(build, rows, watch.peak, max(watch.written, kept), kept, body.get("perplexity"))


def _rows(stages: Mapping[str, Mapping[str, float]], cpu_seconds: float, seconds: float) -> tuple[PaceRow, ...]:
    rows = [PaceRow(stage_of(name), took["cpu_seconds"], took["seconds"], 0.0) for name, took in stages.items()]
    if rows:
        rest = cpu_seconds - sum(row.cpu_seconds for row in rows), seconds - sum(row.seconds for row in rows)
        rows.append(PaceRow(_REST, *rest, 0.0))
    return (*rows, PaceRow(_WHOLE, cpu_seconds, seconds, 0.0))


def _middle(runs: Sequence[BuildPace]) -> BuildPace:
    """Return the medians of one build's runs."""
    columns = [[run.rows[place] for run in runs] for place in range(len(runs[0].rows))]
    rows = tuple(PaceRow(c[0].stage, median(r.cpu_seconds for r in c), median(r.seconds for r in c), 0.0) for c in columns)
    peak, written, kept = (
        int(median(values)) for values in zip(*((run.peak_bytes, run.written_bytes, run.kept_bytes) for run in runs), strict=True)
    )
    return BuildPace(runs[0].build, rows, peak, written, kept, runs[0].perplexity)


def _in_units(build: BuildPace, forward: float) -> BuildPace:
    return replace(build, rows=tuple(replace(row, forwards=row.cpu_seconds / forward) for row in build.rows))


@torch.inference_mode()
def _forward(source: ModelSource, text: TextConfig) -> float:
    """Return F, measured in this process."""
    handle = load_model(source)
    windows = load_windows(text, handle.tokenizer, "calibration", count=text.calibration_windows)
    handle.module(input_ids=windows.ids[:1].to(handle.device), use_cache=False)
    began = time.process_time()
    for ids in torch.split(windows.ids, _BATCH):
        handle.module(input_ids=ids.to(handle.device), use_cache=False)
    return time.process_time() - began


def markdown_of(forward: float, builds: Sequence[BuildPace]) -> str:
    """Return the stages of all builds side by side as a Markdown table; with two, how many times the earlier one takes."""
    names = dict.fromkeys(row.stage for build in builds for row in build.rows if row.stage != _WHOLE)
    stages = [_cells(stage, [build.row(stage) for build in builds], builds) for stage in (*names, _WHOLE)]
    notes = [
        f"{build.build}: peak memory {amount(build.peak_bytes)}, {amount(build.written_bytes)} written, {amount(build.kept_bytes)} kept, "
        f"perplexity on test text {'not told' if build.perplexity is None else format(build.perplexity, '.6g')}."
        for build in builds
    ]
    if len(builds) == 2:
        notes.append(f"Peak memory of {builds[1].build} over {builds[0].build}: {builds[1].peak_bytes / builds[0].peak_bytes:.2f}.")
    place = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    unit = f"F = {forward:.1f} CPU seconds: one forward pass of the calibration tokens ({place})."
    return "\n".join([as_markdown(stages), "", unit, *notes])


def _cells(stage: str, rows: Sequence[PaceRow | None], builds: Sequence[BuildPace]) -> dict[str, str]:
    result = {"stage": stage}
    for build, row in zip(builds, rows, strict=True):
        words = "–" if row is None else f"{row.forwards:.2f} F, {row.cpu_seconds:.1f} CPU s, {row.seconds:.1f} s"
        result[build.build] = words
    if len(rows) == 2:
        this, earlier = rows
        told = this is not None and earlier is not None and this.cpu_seconds > 0
        result["ratio of CPU seconds"] = f"{earlier.cpu_seconds / this.cpu_seconds:.2f}" if told else "–"  # type: ignore[union-attr]
    return result
