"""Facts of an export's base model, above all its licence."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard, try_to_load_from_cache

from lowrank_core.files.gguf import GgufFile, read_gguf
from lowrank_core.models.integrity import sha256_of
from lowrank_core.models.loading import notes_of, resolve_reference

__all__ = ["BaseModel", "base_model_of"]

_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING", "NOTICE", "NOTICE.txt", "USE_POLICY.md")


@dataclass(frozen=True)
class BaseModel:
    """The model that another was made from.

    Attributes:
        reference: as the user called it.
        repository: its hub id, or None for a local folder and the bundled model.
        metadata: what its card says of its licence, language and task.
        licences: its licence files.
        notes: what a user should know of its files, such as which of several sets of weights was loaded.
        file: of a GGUF file, what it was, for ``lowrank.json``; empty for a folder and a hub id.
    """

    reference: str
    repository: str | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)
    licences: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    file: Mapping[str, object] = field(default_factory=dict)

    @property
    def licence(self) -> str:
        """Its licence in a word, or what to do to learn it."""
        named = self.metadata.get("license_name") or self.metadata.get("license")
        if named:
            return str(named)
        return f"see {self.licences[0].name}" if self.licences else "unknown: check the base model"

    def copy_licence(self, folder: Path) -> None:
        for path in self.licences:
            shutil.copyfile(path, folder / path.name)


def base_model_of(reference: str) -> BaseModel:
    """Return what the folder or GGUF file of ``reference``, or the hub's local cache, tells; nothing is fetched."""
    place = resolve_reference(reference)
    folder = Path(place)
    if folder.is_file():
        return _of_gguf(reference, read_gguf(folder))
    local = folder.is_dir()
    result = {name: folder / name if local else _cached(place, name) for name in ("README.md", *_LICENCES)}
    there = {name: path for name, path in result.items() if path is not None and path.is_file()}
    card = _card(there["README.md"]) if "README.md" in there else {}
    repository = card.get("base_model") if local else place
    return BaseModel(
        reference=reference,
        repository=repository if isinstance(repository, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository) else None,
        metadata={name: card[name] for name in _CARRIED if card.get(name)},
        licences=tuple(path for name, path in there.items() if name != "README.md"),
        notes=notes_of(reference) if local else (),
    )


def _of_gguf(reference: str, file: GgufFile) -> BaseModel:
    """Return what the metadata of a GGUF file say."""
    of_base = [str(file.metadata.get(key, "")) for key in ("general.base_model.0.repo_url", "general.source.repo_url", "general.repo_url")]
    hosted = next(filter(None, (re.fullmatch(r"https://huggingface\.co/([\w.-]+/[\w.-]+?)/?", address) for address in of_base)), None)
    named = {key: f"general.{key.replace('_', '.')}" for key in _CARRIED}
    metadata = {key: file.metadata[name] for key, name in named.items() if name in file.metadata}
    return BaseModel(
        reference=reference,
        repository=hosted[1] if hosted else None,
        metadata=metadata,
        notes=file.notes,
        file={
            "name": file.path.name,
            "sha256": sha256_of(file.path),
            "bytes": file.path.stat().st_size,
            "format": "GGUF",
            "architecture": file.architecture,
            "quantization": file.types,
        },
    )


def _cached(repository: str, name: str) -> Path | None:
    path = try_to_load_from_cache(repository, name)
    return Path(path) if isinstance(path, str) else None


def _card(path: Path) -> Mapping[str, object]:
    """Return the metadata of a model card; empty where it has none that can be read."""
    try:
        content = path.read_text(encoding="utf-8")
        if not content.startswith("---"):
            return {}
        result: Mapping[str, object] = ModelCard(content, ignore_metadata_errors=True).data.to_dict()  # type: ignore[no-untyped-call]
        return result
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}
