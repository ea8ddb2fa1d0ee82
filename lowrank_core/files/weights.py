"""Selection of a folder's weight files: one rule for readers of headers and of weights. Torch-free.

transformers (checked from 5.10 to 5.24) takes the first of these that is there: the file that ``transformers_weights`` of config.json
names, ``model.safetensors``, the shards that ``model.safetensors.index.json`` lists. Safetensors of other names are never loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from lowrank_core.errors import ModelError
from lowrank_core.files.gguf import is_gguf

__all__ = ["REGISTERING", "WeightFiles", "read_object", "guard_name", "unguarded_note", "weight_files", "without_guard"]

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SUFFIXES = (".safetensors", ".safetensors.index.json")
_PICKLED = re.compile(r"pytorch_model.*\.bin(\.index\.json)?")
_FOREIGN = (".h5", ".msgpack", ".onnx", ".tflite", ".mlmodel", ".npz")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_SHARD = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.safetensors")
_NAMED_FIRST = 4
"""Files or sets of shards that are named where there are many."""


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder.

    Attributes:
        loaded: names of the safetensors files whose tensors are read, sorted.
        index: name of the index that lists them; empty for one file.
        ignored: names of other weight files and indices in the folder, sorted.
    """

    loaded: tuple[str, ...]
    index: str
    ignored: tuple[str, ...]

    @property
    def note(self) -> str:
        """Note on loaded and ignored files; empty without others."""
        if not self.ignored:
            return ""
        taken = f"the {len(self.loaded)} shards of {self.index}" if self.index else self.loaded[0]
        sets = sorted(dict.fromkeys(_SHARD.sub(r"\g<stem>-*-of-\g<count>.safetensors", name) for name in self.ignored))
        left = ", ".join(sets[:_NAMED_FIRST])
        more = f" and {len(sets) - _NAMED_FIRST} more" if len(sets) > _NAMED_FIRST else ""
        return f"The folder holds several sets of weights: transformers loads {taken}; not loaded: {left}{more}."


def weight_files(folder: Path) -> WeightFiles:
    """Return which files of ``folder`` are loaded.

    Raises:
        ModelError: there is none, the index lists one that is missing, or what is loaded is not the weights of the folder alone.
    """
    present = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    _refuse_distributed(folder, present)
    entry = _entry(folder, present)
    index = entry if entry.endswith(".json") else ""
    loaded = _shards(folder, index) if index else (entry,)
    every = {name for name in present if name.endswith(_SUFFIXES) or _PICKLED.fullmatch(name)}
    return WeightFiles(loaded, index, tuple(sorted(every - {*loaded, index})))


def _refuse_distributed(folder: Path, present: list[str]) -> None:
    shards = [name for name in present if _DISTRIBUTED.fullmatch(name)]
    if shards:
        raise ModelError(
            f"{folder} holds a distributed checkpoint ({shards[0]}). Load it with transformers, save it with `save_pretrained`, "
            "and give that folder."
        )


def _entry(folder: Path, present: list[str]) -> str:
    """Return the name of the file, or of the index, that is loaded."""
    named = read_object(folder / "config.json").get("transformers_weights") if "config.json" in present else None
    if named is not None:
        if not isinstance(named, str) or Path(named).name != named or not named.endswith(_SUFFIXES):
            raise ModelError(f"config.json of {folder} names no safetensors file of the folder as its transformers_weights: {named!r}.")
        if named not in present:
            raise ModelError(f"{folder} lacks {named}, which config.json names as its transformers_weights. Copy the model again.")
        return named
    for name in (_WHOLE, _INDEX):
        if name in present:
            return name
    others = [name for name in present if name.endswith(".safetensors")]
    if others:
        raise ModelError(
            f"{folder} holds neither {_WHOLE} nor {_INDEX}; transformers does not load {others[0]}. "
            f'Rename it, or name it in config.json: "transformers_weights": "{others[0]}".'
        )
    raise ModelError(f"{folder} holds no .safetensors file{_other_formats(present)}")


def _other_formats(present: list[str]) -> str:
    """Return the end of the sentence on a folder without safetensors: what it holds instead, and what to do."""
    pickled = [name for name in present if _PICKLED.fullmatch(name) or name.endswith((".pth", ".pt", ".ckpt"))]
    if pickled:
        return (
            f", but {pickled[0]}, a pickle: those are not read, as they may run code. Load it with transformers where you trust it, "
            "save it with `save_pretrained`, and give that folder."
        )
    named = [name for name in present if name.endswith(_FOREIGN)]
    if named:
        return f", but {named[0]}, which transformers does not read for PyTorch. Give the model with safetensors weights."
    models = [name for name in present if is_gguf(name)]
    if models:
        return f", but GGUF files: give one of them by its name, such as {models[0]}."
    return ". Save the model again with `save_pretrained`, or finish the download."


def _shards(folder: Path, index: str) -> tuple[str, ...]:
    listed = read_object(folder / index).get("weight_map")
    names = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ModelError(f"{folder / index} lists no weight files. Copy or download the model again.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of {len(names)} weight files (first: {missing[0]}). Copy or download the model again."
        )
    return tuple(names)


REGISTERING = "import lowrank_core.models.hf  # registers the format with transformers\n"
"""The line before ``from_pretrained`` reads a folder of factors."""


def guard_name(layer: str, entry: Mapping[str, object]) -> str:
    """Return the name of the tensor that guards the compressed layer at the dotted path ``layer`` (``models.guard``).

    Args:
        entry: of the layer in ``config.json``; that of an expert's names the parameter that all experts share.
    """
    return str(entry.get("guard", f"{layer}.weight"))


def without_guard(layers: Mapping[str, Mapping[str, object]], empty: Collection[str]) -> list[str]:
    """Return the names of the guards of ``layers`` that are not among those of ``empty`` tensors.

    transformers saves some architectures under other names than their modules have, guards included: then their number tells.
    """
    names = dict.fromkeys(guard_name(layer, entry) for layer, entry in layers.items())
    lacking = [name for name in names if name not in empty]
    renamed = set(empty) - set(names)
    return lacking if len(renamed) < len(lacking) else []


def unguarded_note(folder: Path) -> str:
    """Return what a user should know of a folder of factors that an earlier version wrote, in a line (``models.guard``)."""
    return (
        f"{folder} was written by an earlier version: without `import lowrank_core.models.hf` it loads with random weights, and no error. "
        f"Rewrite it: lowrank export --from {folder} --out NEW."
    )


def read_object(path: Path) -> dict[str, object]:
    """Return the JSON object in a file of a checkpoint.

    Raises:
        ModelError: it is missing, can't be read, or holds something else.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent} holds no {path.name}. Give the folder that save_pretrained wrote.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error}.") from error
    if not isinstance(body, dict):
        raise ModelError(f"{path} holds no JSON object. Give the folder that save_pretrained wrote.")
    return body
