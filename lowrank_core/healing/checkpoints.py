"""What a healing needs to go on after its process was killed: one safetensors file, replaced as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank_core.errors import RunError

__all__ = ["Checkpoint", "load_checkpoint", "remove_checkpoint", "save_checkpoint"]

_FILE = "checkpoint.safetensors"
PARTS = ("values", "best", "averages", "squares")


@dataclass(frozen=True)
class Checkpoint:
    """The state after a validation.

    Attributes:
        identity: of models, text and settings; only the same healing goes on from here.
        rate: the largest learning rate, which may have been measured.
        step: of the optimiser; best_step: of the best validation.
        history: points as mappings.
        values, best: trained tensors now and at the best step, by name.
        averages, squares: Adam's moments, by name.
    """

    identity: str
    rate: float
    step: int
    best_step: int
    history: tuple[Mapping[str, object], ...]
    values: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    averages: Mapping[str, Tensor]
    squares: Mapping[str, Tensor]


def save_checkpoint(folder: Path, state: Checkpoint) -> None:
    """Replace the checkpoint in ``folder``: a reader finds the old one or the new one whole.

    Raises:
        RunError: the disk is full or read-only.
    """
    tensors = {f"{part}/{name}": tensor.contiguous() for part in PARTS for name, tensor in getattr(state, part).items()}
    words = {name: getattr(state, name) for name in ("identity", "rate", "step", "best_step", "history")}
    temporary = folder / f".{_FILE}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"state": json.dumps(words)})
        temporary.replace(folder / _FILE)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"can't write a checkpoint in {folder}: {error}. Free some space, then heal again: it goes on.") from error


def load_checkpoint(folder: Path, identity: str, device: torch.device) -> Checkpoint | None:
    """Return the checkpoint in ``folder``; None if there is none.

    Raises:
        RunError: it is damaged, or of another healing.
    """
    path = folder / _FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt", device=str(device)) as stored:
            words = json.loads(stored.metadata()["state"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # it is no mapping
        parts = {part: {name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")} for part in PARTS}
        found = Checkpoint(words["identity"], words["rate"], words["step"], words["best_step"], tuple(words["history"]), **parts)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}). Delete it to heal from the start.") from error
    if found.identity != identity:
        raise RunError(
            f"{path} belongs to another healing: other models, text or settings. Repeat those, or delete it to heal from the start."
        )
    return found


def remove_checkpoint(folder: Path) -> None:
    """Delete the checkpoint of a healing that is done."""
    (folder / _FILE).unlink(missing_ok=True)
