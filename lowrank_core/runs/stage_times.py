"""Stages of a run and the seconds they take: estimated before the start, and counted down while it runs. Torch-free.

Notation::

    w_s      work of a stage: multiply-adds of its matrix products, up to a factor of the stage's own
    t_s      seconds that it took once on this machine, for a work of w'_s:  estimate t_s · w_s / w'_s

The machine's record (``$LOWRANK_HOME/stage_times.json``) keeps t_s and w'_s by stage and model. A stage of the same model comes first,
then the newest of another model on the same device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from lowrank_core.allocation.lems import TRIALS
from lowrank_core.config import CompressionConfig, ModelSource, RunConfig
from lowrank_core.config.mapping import build
from lowrank_core.errors import RunError
from lowrank_core.metrics import metric_named
from lowrank_core.parameters import MatrixShape
from lowrank_core.runs.files import read_json, write_json
from lowrank_core.runs.paths import home

__all__ = [
    "KEPT",
    "PieceTimer",
    "StageTime",
    "TimeEstimate",
    "estimated",
    "line_through",
    "remember",
    "stage_of",
    "stages_of",
    "stages_of_compression",
    "stages_of_quantization",
    "work_of",
]

_LOADING, _READING, _CALIBRATING, _GRADIENTS = "Loading the model", "Reading the text", "Calibrating", "Measuring gradients"
_OF_WEIGHTS, _SPECTRA, _FACTORISING, _COMPRESSING, _WRITING = (
    "Computing weight spectra",
    "Computing spectra",
    "Factorising",
    "Compressing",
    "Writing and measuring",
)
_DENSE, _WEIGHTS, _SEARCHING, _TUNING, _CUTTING = "Measuring the dense model", "Measuring error weights", "Searching", "Tuning", "Cutting"
_SELECTING = "Selecting"

_ANALYSIS = (_LOADING, _READING, _OF_WEIGHTS, _CALIBRATING, _SPECTRA)
_COMPRESSION = (_LOADING, _CALIBRATING, _GRADIENTS, _TUNING, _FACTORISING, _WEIGHTS, _CUTTING, _SEARCHING, _COMPRESSING, _WRITING)
_SEARCH = (*_ANALYSIS, _GRADIENTS, _FACTORISING, _SELECTING, _DENSE, _WEIGHTS, _SEARCHING)
"""Stages in their order; the name of a stage begins with one of them (``stage_of``)."""

KEPT = "on disk already"
_FILE = "stage_times.json"
_ENOUGH, _TIMES = 0.4, 2
"""Seconds that tell enough, and how often what is shorter is timed again: the first time may load or allocate."""
_KEPT = 200
"""Entries of the record: the newest."""


@dataclass(frozen=True)
class StageTime:
    """A stage and its seconds; None where nothing is known of it. ``words`` say what the seconds go by."""

    name: str
    seconds: float | None
    words: str = ""


@dataclass(frozen=True)
class TimeEstimate:
    """Stages in their order.

    Attributes:
        stages: each with its seconds.
    """

    stages: tuple[StageTime, ...] = ()

    @property
    def total(self) -> float | None:
        """Seconds of all stages; None where one is not known."""
        return self._sum(self.stages)

    def number(self, name: str) -> int:
        """Return the place of a stage from 1 on; 0 where it is none of them."""
        return next((place for place, stage in enumerate(self.stages, start=1) if stage.name == stage_of(name)), 0)

    def seconds(self, name: str) -> float | None:
        """Return the seconds of one stage; None where they are not known."""
        return next((stage.seconds for stage in self.stages if stage.name == stage_of(name)), None)

    def after(self, name: str) -> float | None:
        """Return the seconds of all stages after one; None where one of them, or the stage itself, is not known."""
        place = self.number(name)
        return self._sum(self.stages[place:]) if place else None

    @staticmethod
    def _sum(stages: Sequence[StageTime]) -> float | None:
        known = [stage.seconds for stage in stages if stage.seconds is not None]
        return sum(known) if len(known) == len(stages) else None


def stage_of(name: str) -> str:
    """Return the stage that a name is of: ``Factorising by Studio (default)`` is ``Factorising``; itself where it is none."""
    return next((stage for stage in dict.fromkeys((*_COMPRESSION, *_SEARCH)) if name.startswith(stage)), name)


def stages_of(config: RunConfig) -> tuple[str, ...]:
    """Return the stages of a run, up to the end of its search if it has one."""
    search = config.search
    if search is None:
        return _ANALYSIS
    has = {_GRADIENTS: _by_gradients(search.compression), _SELECTING: search.selected_windows > 0, _WEIGHTS: search.error_weights}
    return tuple(stage for stage in _SEARCH if has.get(stage, True))


def stages_of_compression(
    compression: CompressionConfig, *, tune: bool = False, weights: bool = False, cut: bool = False, trials: bool = False
) -> tuple[str, ...]:
    """Return the stages of ``lowrank compress``, with those that its options and its allocator add."""
    has = {_GRADIENTS: _by_gradients(compression), _TUNING: tune, _WEIGHTS: weights, _CUTTING: cut, _SEARCHING: trials}
    return tuple(stage for stage in _COMPRESSION if has.get(stage, True))


def stages_of_quantization(*, gptq: bool) -> tuple[str, ...]:
    """Return the stages of ``lowrank compress`` where every layer stays dense."""
    return tuple(stage for stage in _COMPRESSION if stage in (_LOADING, _WRITING) or (gptq and stage == _CALIBRATING))


def _by_gradients(compression: CompressionConfig) -> bool:
    return metric_named(compression.basis).needs_gradients


def work_of(
    config: RunConfig, shapes: Sequence[MatrixShape], head: int = 0, *, compression: CompressionConfig | None = None
) -> dict[str, float]:
    """Return stage -> its work; equal works take equally long.

    Args:
        config: of the run.
        shapes: of the compressible matrices.
        head: multiply-adds of the output embedding for a token.
        compression: that of the search, or the defaults, where None.
    """
    text, search = config.text, config.search
    compression = compression or (search.compression if search is not None else CompressionConfig())
    windows = text.calibration_windows
    gradients, fitted = min(windows, config.calibration.gradient_windows or windows), min(windows, compression.fit_windows)
    linear = sum(shape.d_out * shape.d_in for shape in shapes)
    inputs = sum(width**2 for width in {shape.input_group or shape.name: shape.d_in for shape in shapes}.values())
    outputs = sum(shape.d_out**2 for shape in shapes)
    cubes = sum(shape.d_out * shape.d_in * shape.max_rank for shape in shapes)
    validation = search.selected_windows or text.validation_windows if search is not None else text.validation_windows
    sequential = metric_named(compression.basis).sequential
    per_window = {
        _READING: windows + text.validation_windows + text.test_windows,
        _CALIBRATING: windows * (linear + inputs),
        _GRADIENTS: gradients * (3 * (linear + head) + outputs),
        _COMPRESSING: fitted * (4 * linear + 2 * inputs) * sequential,
        _DENSE: validation * (linear + head),
        _WEIGHTS: validation * (linear + head) * len(shapes),
        _SEARCHING: validation * (linear + head) * (search.trials if search is not None else TRIALS),
        _WRITING: text.test_windows * (linear + head),
    }
    result = {stage: float(text.context * work) for stage, work in per_window.items()}
    result |= {_LOADING: float(linear + head), _OF_WEIGHTS: 2.0 * cubes, _SPECTRA: 2.0 * cubes, _FACTORISING: float(cubes)}
    result[_COMPRESSING] += cubes if sequential else linear
    return result


@dataclass(frozen=True)
class _Entry:
    """Seconds of a stage on this machine."""

    stage: str
    model: str
    device: str
    seconds: float
    work: float


def _entries() -> list[_Entry]:
    """Return the record, the newest first; empty where there is none, or it can't be read: it is written again."""
    try:
        body = read_json(home() / _FILE) or {}
        entries = body.get("stages", [])
        return [build(_Entry, entry, _FILE) for entry in entries] if isinstance(entries, list) else []
    except RunError:
        return []


def _device(source: ModelSource) -> str:
    return f"{source.device} {source.dtype}"


def remember(source: ModelSource, work: Mapping[str, float], name: str, seconds: float) -> None:
    """Add to the machine's record what a whole stage took; nothing of a stage without work.

    Raises:
        RunError: the disk is full or read-only.
    """
    stage = stage_of(name)
    if not work.get(stage) or not seconds > 0:
        return
    entry = _Entry(stage, source.reference, _device(source), seconds, work[stage])
    others = [e for e in _entries() if (e.stage, e.model, e.device) != (entry.stage, entry.model, entry.device)]
    try:
        home().mkdir(parents=True, exist_ok=True)
        write_json(home() / _FILE, {"stages": [asdict(e) for e in [entry, *others][:_KEPT]]})
    except OSError as error:
        raise RunError(f"can't write in {home()}: {error.strerror}. Free some space, or set LOWRANK_HOME to another folder.") from error


def estimated(source: ModelSource, work: Mapping[str, float], stages: Sequence[str], *, kept: Sequence[str] = ()) -> TimeEstimate:
    """Return what the machine's record says of ``stages`` of a run with ``work``; the results of those in ``kept`` are on disk."""
    entries = _entries()
    return TimeEstimate(
        tuple(StageTime(stage, 0.0, KEPT) if stage in kept else _known(stage, source, work.get(stage, 0.0), entries) for stage in stages)
    )


def _known(stage: str, source: ModelSource, work: float, entries: Sequence[_Entry]) -> StageTime:
    alike = [entry for entry in entries if entry.stage == stage and entry.device == _device(source) and entry.work > 0]
    own = [entry for entry in alike if entry.model == source.reference]
    if not work or not alike:
        return StageTime(stage, None, "not measured on this machine yet")
    entry = (own or alike)[0]
    return StageTime(stage, entry.seconds * work / entry.work, "an earlier run" if own else f"an earlier run of {entry.model}")


def line_through(few: tuple[int, float], more: tuple[int, float]) -> tuple[float, float]:
    """Return (seconds without a window, seconds of one window) from two timed numbers of windows; neither is negative."""
    (n, t), (m, u) = few, more
    slope = max(0.0, (u - t) / (m - n))
    return max(0.0, u - slope * m), slope


class PieceTimer:
    """Times small pieces of work."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def once(self, piece: Callable[[], object]) -> float:
        """Return the seconds that ``piece`` takes this time."""
        began = self._clock()
        piece()
        return self._clock() - began

    def seconds(self, piece: Callable[[], object]) -> float:
        """Return the seconds of ``piece``; the fewest of several times, where once tells little."""
        first = self.once(piece)
        return min([first, *(self.once(piece) for _ in range(_TIMES if first < _ENOUGH else 0))])

    def line(self, piece: Callable[[int], object], counts: tuple[int, int], every: int) -> tuple[float, float]:
        """Return (seconds without a step, seconds of one) of ``piece``, which takes a number of steps, ``every`` at most.

        The second of the two ``counts`` grows where it takes hardly longer than the first, which is timed twice: the first call of all
        loads code and touches memory for the others.
        """
        few, more = min(counts[0], every), min(counts[1], every)
        begin = min(self.seconds(partial(piece, few)), self.once(partial(piece, few)))
        end = self.seconds(partial(piece, more)) if more > few else begin
        while end - begin < _ENOUGH and more < every:
            more = min(4 * more, every)
            end = self.seconds(partial(piece, more))
        return line_through((few, begin), (more, end)) if few < more else (0.0, end / more)
