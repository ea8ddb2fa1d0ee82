"""``lowrank.json``: what an export holds, how it was made, and what was measured on it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from lowrank_core import __version__
from lowrank_core.compression.build import CompressionReport, UnitCount
from lowrank_core.config import TextConfig, from_mapping
from lowrank_core.errors import ConfigError, ModelError
from lowrank_core.models.integrity import MANIFEST, sha256_of

__all__ = [
    "ExportManifest",
    "Measurement",
    "Protocol",
    "WeightFile",
    "listed_files",
    "measurement_from",
    "read_manifest",
    "report_of",
    "versions",
]

_HASHED = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True)
class WeightFile:
    """A file of weights, or the index of several."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Protocol:
    """Protocol of a perplexity, sufficient to measure it again.

    Attributes:
        text, split, windows, context, bos, seed: as in ``TextConfig``; ``bos`` is the rule.
        dtype: that the model ran in, which need not be the one that it is stored in.
        sha256: of the tokens of the windows.
        line: for people.
    """

    text: str
    split: str
    windows: int
    context: int
    bos: str
    seed: int
    dtype: str
    sha256: str
    line: str

    @property
    def config(self) -> TextConfig:
        return TextConfig(self.text, context=self.context, bos=self.bos, seed=self.seed, test_windows=self.windows)


@dataclass(frozen=True)
class Measurement:
    """A perplexity, its 95 % interval (None from one window), the mean NLL (nats) and its protocol; of the model as it was written."""

    perplexity: float
    perplexity_interval: tuple[float, float] | None
    nll: float
    protocol: Protocol


@dataclass(frozen=True)
class ExportManifest:
    """Contents of ``lowrank.json``.

    Attributes:
        made_from: the dense model, as the user called it; auto_class: of transformers, which loads it.
        form: ``compressed``, ``plain`` or ``dense``; stored_dtype: of its floats; with_code: whether our code lies next to the weights.
        files: name -> weight file.
        written_parameters: in the files, indices included: as many as were counted in the factors, unless the form is dense.
        guards: empty tensors (no numbers, no bytes of data) that make transformers refuse the folder where our package is absent; 0 in a
            dense form, and in a folder of an earlier version. Their lines in the headers are part of the files' bytes.
        details: how it was made, and the counts of ``CompressionReport`` with its two ratios; next to the rest in the file.
        measured: on the model as written, or None.
        figures: others that were known when it was written (``metrics_of``).
        versions: of what wrote it.
    """

    made_from: str
    form: str
    stored_dtype: str
    with_code: bool
    files: Mapping[str, WeightFile]
    written_parameters: int
    guards: int = 0
    auto_class: str = "AutoModelForCausalLM"
    details: Mapping[str, object] = field(default_factory=dict)
    measured: Measurement | None = None
    figures: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def written_bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    @property
    def provenance(self) -> dict[str, object]:
        """Provenance of the model, without counts, which every export recomputes."""
        counts = {f.name for f in fields(CompressionReport)} | {"compression_ratio", "model_compression_ratio"}
        return {name: value for name, value in self.details.items() if name not in counts}

    def to_mapping(self) -> dict[str, object]:
        """Return the manifest ready for JSON."""
        body = asdict(self)
        return {"made_from": self.made_from, **body.pop("details"), **body, "written_bytes": self.written_bytes}

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(self.to_mapping(), indent=1, allow_nan=False), encoding="utf-8")


def listed_files(folder: Path) -> dict[str, WeightFile]:
    """Return size and hash of the weight files in ``folder``."""
    paths = sorted(path for path in folder.iterdir() if path.name.endswith(_HASHED))
    return {path.name: WeightFile(path.stat().st_size, sha256_of(path)) for path in paths}


def versions() -> dict[str, str]:
    """Return the versions that what is written depends on."""
    libraries = {name: metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    return {"lowrank-studio": __version__, "python": platform.python_version(), **libraries}


def read_manifest(folder: Path) -> ExportManifest:
    """Return what ``lowrank.json`` of ``folder`` says.

    Raises:
        ModelError: there is none, it is damaged, or an earlier version wrote it, which listed no files.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ModelError(f"model: {folder} has no {MANIFEST}. Give a folder written by `lowrank compress` or `lowrank export`.")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        own = {f.name for f in fields(ExportManifest)}
        known = {name: value for name, value in body.items() if name in own - {"details", "files", "measured"}}
        files = {str(name): from_mapping(WeightFile, entry) for name, entry in body["files"].items()}
        rest = {name: value for name, value in body.items() if name not in {*own, "written_bytes"}}
        result = None if body["measured"] is None else measurement_from(body["measured"])
        return ExportManifest(**known, files=files, details=rest, measured=result)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise ModelError(f"model: {MANIFEST} of {folder} is damaged, or of an earlier version. Export the model again.") from error


def measurement_from(body: Mapping[str, Any]) -> Measurement:
    """Return a measurement from its JSON.

    Raises:
        KeyError, TypeError, ValueError, ConfigError: it is none.
    """
    protocol, ends = from_mapping(Protocol, body["protocol"]), body["perplexity_interval"]
    interval = None if ends is None else (float(ends[0]), float(ends[1]))
    return Measurement(float(body["perplexity"]), interval, float(body["nll"]), protocol)


def report_of(manifest: ExportManifest) -> CompressionReport:
    """Return the counts that an export's ``lowrank.json`` holds.

    Raises:
        ModelError: they are not there.
    """
    details: dict[str, Any] = dict(manifest.details)
    try:
        units = tuple(UnitCount(**unit) for unit in details["units"])
        counts = {f.name: details[f.name] for f in fields(CompressionReport) if f.name in details}
        return CompressionReport(**{**counts, "units": units})
    except (KeyError, TypeError) as error:
        raise ModelError("model: lowrank.json doesn't hold the counts of the compression. Export the model again.") from error
