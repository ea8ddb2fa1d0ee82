"""Checkpoint of a healing: one safetensors file, replaced atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank_core.errors import RunError

__all__ = ["Checkpoint", "load_checkpoint", "remove_checkpoint", "save_checkpoint"]

_FILE = "checkpoint.safetensors"
_WORDS = ("identity", "rate", "step", "best_step", "history", "optimizer")
PARTS = ("values", "best", "moments")


@dataclass(frozen=True)
class Checkpoint:
    """The state after a validation.

    Attributes:
        identity: of models, text and settings; only the same healing goes on from here.
        rate: the largest learning rate, which may have been measured.
        step: of the optimiser; best_step: of the best validation.
        history: points as mappings.
        values, best: trained tensors now and at the best step, by name.
        moments, optimizer: the optimiser's state, its tensors by name, and the rest as what JSON can hold.
    """

    identity: str
    rate: float
    step: int
    best_step: int
    history: Sequence[Mapping[str, object]]
    values: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    optimizer: object


def save_checkpoint(folder: Path, state: Checkpoint) -> None:
    """Replace the checkpoint in ``folder``: a reader finds the old one or the new one whole.

    Raises:
        RunError: the disk is full or read-only.
    """
    tensors = {f"{part}/{name}": tensor.contiguous() for part in PARTS for name, tensor in getattr(state, part).items()}
    words = {**{name: getattr(state, name) for name in _WORDS}, "sha256": _digest(tensors)}
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
            words: dict[str, Any] = json.loads(stored.metadata()["state"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # it is no mapping
        if words.get("sha256", digest := _digest(tensors)) != digest:  # those of earlier versions have none
            raise ValueError("its tensors are not what was written, their SHA-256 differs")
        parts: dict[str, Any] = {
            part: {name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")} for part in PARTS
        }
        result = Checkpoint(**{name: words[name] for name in _WORDS}, **parts)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}). Delete it to heal from the start.") from error
    if result.identity != identity:
        raise RunError(
            f"{path} belongs to another healing: other models, text or settings. Repeat those, or delete it to heal from the start."
        )
    return result


def _digest(tensors: Mapping[str, Tensor]) -> str:
    result = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        result.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()


def remove_checkpoint(folder: Path) -> None:
    """Delete the checkpoint of a healing that is done."""
    (folder / _FILE).unlink(missing_ok=True)
