"""Statistics on disk: a safetensors file for each finished block, read one entry at a time.

A folder, named by the content that the statistics come from, holds ``inputs/block-000.safetensors`` … (or ``outputs/…``, ``factors/…``),
each written whole or not at all, and ``done.json`` once all are there. While it grows it also holds the hidden states after finished
blocks.

``checksums.json`` has the size and the SHA-256 of each of these files, entered before a file gets its name. They are compared whenever a
folder is opened, and before an interrupted calibration goes on: a damaged, swapped or foreign block is never believed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from shutil import disk_usage
from typing import Any, Generic, TypeVar

import numpy as np
import psutil
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank_core.errors import ModelError, NumericalError, RunError
from lowrank_core.models.integrity import sha256_of
from lowrank_core.statistics.moments import InputStatistics, OutputStatistics
from lowrank_core.wording import amount

__all__ = [
    "HiddenStates",
    "StoredStatistics",
    "block_path",
    "damage_told",
    "exclusive",
    "finish",
    "finished_blocks",
    "free_memory",
    "in_passes",
    "is_finished",
    "statistics_folder",
    "write_block",
    "write_tensors",
]

S = TypeVar("S", InputStatistics, OutputStatistics)

_FORMAT = 2
"""Of the folders. 1 had no checksums: what is in them can't be trusted, so that such statistics are computed again."""

_DONE = "done.json"
_CHECKSUMS = "checksums.json"
_POLL_SECONDS = 0.5


@contextmanager
def damage_told(folder: Path) -> Iterator[None]:
    """Name the folder where what is read in it is not what was written.

    Raises:
        NumericalError: it is not.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise NumericalError(f"the stored statistics in {folder} are damaged ({error}). Delete that folder and calibrate again.") from error


def statistics_folder(store: Path, key: str, context: int) -> Path:
    """Return where ``store`` keeps the statistics that are called ``key``, of windows of ``context`` tokens.

    The key hashes tokens alone, as runs have recorded it: the same tokens may be cut into 50 windows of 16, or 25 of 32.
    """
    return store / f"{key}-{context}-{_FORMAT}"


def _checksums(folder: Path) -> dict[str, tuple[int, str]]:
    """Return file -> size and SHA-256; a folder that was renamed holds other statistics than its name says."""
    try:
        body = json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if body["statistics"] != folder.name:
        raise ValueError(f"{_CHECKSUMS} is of {body['statistics']}")
    return {str(name): (int(size), str(digest)) for name, (size, digest) in body["files"].items()}


def _enter(folder: Path, name: str, file: Path) -> None:
    """Enter the checksum of ``file``, which is called ``name`` next."""
    files = {**_checksums(folder), name: (file.stat().st_size, sha256_of(file))}
    partial = folder / f"{_CHECKSUMS}.partial"
    partial.write_text(json.dumps({"statistics": folder.name, "files": files}, indent=1), encoding="utf-8")
    partial.replace(folder / _CHECKSUMS)


def _check(folder: Path, name: str) -> None:
    entered = _checksums(folder).get(name)
    if entered is None:
        raise ValueError(f"{name} has no checksum")
    size, digest = entered
    if (result := (folder / name).stat().st_size) != size:
        raise ValueError(f"{name} is cut short: {result} bytes of {size}")
    if sha256_of(folder / name) != digest:
        raise ValueError(f"{name} is not what was written: its SHA-256 differs")


def finished_blocks(folder: Path, part: str) -> set[int]:
    """Return the blocks of ``part`` that are there, each checked.

    Raises:
        NumericalError: one is damaged.
    """
    paths = sorted((folder / part).glob("block-*.safetensors"))
    with damage_told(folder):
        for path in paths:
            _check(folder, f"{part}/{path.name}")
        return {int(path.stem.removeprefix("block-")) for path in paths}


def block_path(folder: Path, part: str, block: int) -> Path:
    """Return the file of a finished block; ``part`` is inputs or outputs."""
    return folder / part / f"block-{block:03d}.safetensors"


def write_block(path: Path, statistics: Mapping[str, S], seconds: float, *, influence: float | None = None, note: str = "") -> None:
    """Write the statistics of a block, with its influence where that was measured, and a note on how: whole, or not at all."""
    tensors = {}
    for name, entry in statistics.items():
        for field in fields(entry):
            value = getattr(entry, field.name)
            tensors[f"{name}/{field.name}"] = value.contiguous().clone() if isinstance(value, Tensor) else torch.tensor(value)
    metadata = {"names": json.dumps(list(statistics)), "seconds": repr(seconds), "note": note}
    write_tensors(path, tensors, metadata if influence is None else {**metadata, "influence": repr(influence)})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file of a finished block, and enter its checksum: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(dict(tensors), partial, metadata=dict(metadata))
    _enter(path.parents[1], f"{path.parent.name}/{path.name}", partial)
    partial.replace(path)


def finish(folder: Path) -> None:
    """Mark the statistics in ``folder`` as complete, and remove what only their making needed."""
    blocks = len(list(folder.glob("*/block-*.safetensors")))
    partial = folder / f"{_DONE}.partial"
    partial.write_text(json.dumps({"blocks": blocks}), encoding="utf-8")
    partial.replace(folder / _DONE)
    for path in folder.glob("hidden-*"):
        path.unlink(missing_ok=True)


def is_finished(folder: Path) -> bool:
    """Return whether ``folder`` holds complete statistics.

    Raises:
        NumericalError: it should, and blocks are missing.
    """
    with damage_told(folder):
        try:
            expected = int(json.loads((folder / _DONE).read_text(encoding="utf-8"))["blocks"])
        except FileNotFoundError:
            return False
        result = len(list(folder.glob("*/block-*.safetensors")))
        if result != expected:
            raise ValueError(f"{result} blocks of {expected}")
    return True


def free_memory(device: torch.device) -> int:
    """Return the free bytes where tensors on ``device`` lie."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)


def in_passes(blocks: Sequence[int], needed: Callable[[int], int], room: int) -> list[list[int]]:
    """Return ``blocks`` in runs whose needed bytes fit in ``room`` together; one that doesn't has a pass alone."""
    result: list[list[int]] = []
    left = 0
    for block in blocks:
        if not result or needed(block) > left:
            result.append([])
            left = room
        result[-1].append(block)
        left -= needed(block)
    return result


class StoredStatistics(Mapping[str, S], Generic[S]):
    """Statistics by name, each read from its block's file when it is asked for, and not kept. All files are checked at the start.

    Attributes:
        name: of the folder, which is that of their content.
        sizes: (tokens, width) of each entry, without reading it.
        seconds: that measuring took, over all blocks.
        influence: of each block, in their order; None of one that has none.
        notes: on how blocks were measured, each once.
    """

    def __init__(self, folder: Path, part: str, kind: type[S]) -> None:
        """Raises NumericalError: a file is damaged."""
        self._folder = folder
        self.name = folder.name
        self._kind: type[S] = kind
        self._places: dict[str, Path] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.seconds = 0.0
        self.influence: list[float | None] = []
        self.notes: list[str] = []
        with damage_told(folder):
            for block in sorted(finished_blocks(folder, part)):
                self._index(block_path(folder, part, block))

    def _index(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            self.seconds += float(metadata["seconds"])
            self.influence.append(float(metadata["influence"]) if "influence" in metadata else None)
            if (note := metadata.get("note", "")) and note not in self.notes:
                self.notes.append(note)
            for name in json.loads(metadata["names"]):
                self._places[name] = path
                self.sizes[name] = (int(file.get_tensor(f"{name}/count")), _width(file, name, self._kind))

    def __getitem__(self, name: str) -> S:
        """Raises NumericalError: a value is not finite, or the file has been damaged since."""
        path = self._places[name]
        with damage_told(self._folder), safe_open(path, framework="pt") as file:
            values: dict[str, Any] = {field.name: file.get_tensor(f"{name}/{field.name}") for field in fields(self._kind)}
            for part, value in values.items():
                if not torch.isfinite(value.sum()):  # as good as looking at each, and ten times as fast
                    raise ValueError(f"{name}: {part.replace('_', ' ')} holds NaN or Inf")
        values["count"] = int(values["count"])
        entry: S = self._kind(**values)
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _width(file: Any, name: str, kind: type[InputStatistics] | type[OutputStatistics]) -> int:
    vector = "mean" if kind is InputStatistics else "fisher_rows"
    return int(file.get_slice(f"{name}/{vector}").get_shape()[0])


@contextmanager
def exclusive(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold ``folder`` for this process, to write there; ``waiting`` is called twice a second while another has it, and may raise.

    Raises:
        RunError: it can't be written to, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        while True:
            try:
                lock.acquire(timeout=_POLL_SECONDS)
                break
            except Timeout:
                waiting()
        try:
            yield
        finally:
            lock.release()
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(
            f"can't write in {folder}: {reason}. Free some space, or set LOWRANK_HOME to a folder that you can write to."
        ) from error


class _MappedFile:
    """A tensor in a file, of which only the rows that are asked for are mapped, and only as long as they are used."""

    def __init__(self, path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype
        self.path = path

    def __getitem__(self, span: slice) -> Tensor:
        start, stop, _ = span.indices(self.shape[0])
        row = self.shape[1:].numel() * self.dtype.itemsize
        mapped = np.memmap(self.path, np.uint8, "r+", offset=start * row, shape=((stop - start) * row,))
        return torch.from_numpy(mapped).view(self.dtype).reshape(stop - start, *self.shape[1:])

    def __setitem__(self, span: slice, values: Tensor) -> None:
        self[span].copy_(values)


class HiddenStates:
    """Hidden states (windows, T, d) of all windows between two blocks: in memory, or in files under ``folder``, mapped as they are read.

    Files carry their form in their name, ``hidden-003.float32.256x4096``; one is renamed to it when its block is done.
    """

    def __init__(self, windows: int, folder: Path | None = None) -> None:
        self._windows, self._folder = windows, folder
        self._previous: Tensor | _MappedFile | None = None
        self._next: Tensor | _MappedFile | None = None
        self._partial: Path | None = None

    def resume(self, block: int) -> None:
        """Take the stored hidden states after ``block``.

        Raises:
            NumericalError: they are not there, or damaged.
        """
        assert self._folder is not None
        with damage_told(self._folder):
            paths = list(self._folder.glob(f"hidden-{block:03d}.*"))
            if len(paths) != 1:
                raise ValueError(f"the hidden states after block {block} are missing")
            _, dtype, form = paths[0].name.split(".")
            shape = (self._windows, *(int(size) for size in form.split("x")))
            _check(self._folder, paths[0].name)
            self._previous = self._mapped(paths[0], getattr(torch, dtype), shape, new=False)

    def read(self, span: slice) -> Tensor | None:
        """Return the hidden states of some windows before the current block; None for the first block."""
        return None if self._previous is None else self._previous[span]

    def write(self, span: slice, hidden: Tensor) -> None:
        """Store the hidden states of some windows after the current block.

        Raises:
            ModelError: the disk has no room for them.
        """
        if self._next is None:
            self._next = self._created(hidden)
        self._next[span] = hidden.to("cpu")

    def advance(self, block: int) -> None:
        """``block`` is done: what was written is what the next one reads."""
        self._previous, self._next = self._next, None
        if self._partial is not None and self._folder is not None:
            name = f"hidden-{block:03d}.{self._partial.name.removeprefix('hidden-partial.')}"
            _enter(self._folder, name, self._partial)
            self._partial.replace(self._folder / name)
            if isinstance(self._previous, _MappedFile):
                self._previous.path = self._folder / name
            self._partial = None

    def forget(self, block: int) -> None:
        """Remove the stored hidden states after ``block`` and before it."""
        for path in self._folder.glob("hidden-*.*") if self._folder else ():
            number = path.name.split(".")[0].removeprefix("hidden-")
            if number.isdecimal() and int(number) <= block:
                path.unlink(missing_ok=True)

    def _created(self, like: Tensor) -> Tensor | _MappedFile:
        shape = (self._windows, *like.shape[1:])
        if self._folder is None:
            previous = self._previous
            fits = previous is not None and previous.shape == shape and previous.dtype == like.dtype
            return previous if fits and previous is not None else torch.empty(shape, dtype=like.dtype)
        form = "x".join(str(size) for size in shape[1:])
        self._partial = self._folder / f"hidden-partial.{str(like.dtype).removeprefix('torch.')}.{form}"
        self._partial.unlink(missing_ok=True)
        return self._mapped(self._partial, like.dtype, shape, new=True)

    def _mapped(self, path: Path, dtype: torch.dtype, shape: tuple[int, ...], *, new: bool) -> _MappedFile:
        size = torch.Size(shape).numel() * dtype.itemsize
        if new:
            if (free := disk_usage(path.parent).free) < size:  # a mapped file on a full disk ends the process
                raise ModelError(f"calibration needs {amount(size)} in {path.parent}, and {amount(free)} are free. Make room.")
            with path.open("wb") as file:
                file.truncate(size)
        elif path.stat().st_size != size:
            raise ValueError(f"{path.name} is cut short")
        return _MappedFile(path, dtype, shape)
