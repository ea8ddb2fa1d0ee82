"""Exported models of a run: contents, verification, loading."""

from __future__ import annotations

import io
import shlex
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pandas as pd

from lowrank_core.config.mapping import build
from lowrank_core.errors import ModelError, RunError
from lowrank_core.files.weights import REGISTERING, weight_files
from lowrank_core.runs import JsonMapping, Run, read_json
from lowrank_core.studies.requests import ExportAnswer, answers_in
from lowrank_core.studio.compare.comparison import argument_of
from lowrank_core.studio.shared.formatting import number
from lowrank_core.studio.shared.trial_names import unit_label

__all__ = [
    "MAX_BYTES",
    "Loading",
    "Proof",
    "Written",
    "card_of",
    "loading_of",
    "rank_table_of",
    "ranks_in_words",
    "written_models",
    "zipped",
]

MAX_BYTES = 200_000_000
"""Limit of a folder served as one file, which is held in memory during the download."""


@dataclass(frozen=True)
class Proof:
    """Verification of an export: reloaded in a fresh process and measured again.

    Attributes:
        ok: as listed, and the same to rounding.
        recorded: perplexity as it was written; None where none was recorded.
        measured: perplexity as it was reloaded; None where it was not measured, for the reason in ``error``.
        difference, tolerance: of the two, in perplexity.
        protocol: of both; files: weight files whose size and SHA-256 were checked.
        time: seconds since the epoch.
    """

    ok: bool
    measured: float | None = None
    recorded: float | None = None
    difference: float | None = None
    tolerance: float | None = None
    protocol: str = ""
    files: int = 0
    error: str = ""
    time: float = 0.0

    @property
    def verdict(self) -> str:
        if self.error:
            return "Failed: not measured"
        if self.recorded is None:
            return "Files are as listed; no perplexity was recorded to compare with"
        return "Passed: equal up to rounding" if self.ok else "Failed: differs from the recorded perplexity"


@dataclass(frozen=True)
class Written:
    """An exported model, from its ``lowrank.json``.

    Attributes:
        allocation: what it was made from, in words.
        form: ``compressed``, ``plain`` or ``dense`` (merged); empty where the folder does not say.
        compression_ratio, model_compression_ratio: fraction removed from the compressible linears, from the whole model; None where
            the folder does not say.
        bytes: of its weight files; None where the folder has gone. folder_bytes: of all its files.
        perplexity: measured on the model as it was written; None without one. protocol: of that, in a line.
        parameters: in the weight files; dtype: of their floats; quantization: empty where the factors are floats.
        ranks: by unit, None where one is dense.
        healed: by which method; empty for a model as it came out of the compression.
        changed: when it was written, seconds since the epoch.
        proof: what reading it again in a fresh process gave; None where nobody asked.
        damage: why its ``lowrank.json`` can't be read; empty where it can.
    """

    path: Path
    allocation: str
    form: str = ""
    compression_ratio: float | None = None
    model_compression_ratio: float | None = None
    bytes: int | None = None
    folder_bytes: int = 0
    perplexity: float | None = None
    protocol: str = ""
    parameters: int | None = None
    dtype: str = ""
    quantization: str = ""
    with_code: bool = False
    auto_class: str = "AutoModelForCausalLM"
    ranks: Mapping[str, int | None] | None = None
    healed: str = ""
    changed: float | None = None
    proof: Proof | None = None
    damage: str = ""

    @property
    def proof_words(self) -> str:
        """The verification in a sentence; empty without one."""
        result = self.proof
        if result is None or result.measured is None:
            return "" if result is None else f"not measured: {result.error}"
        if result.recorded is None:
            return f"perplexity {number(result.measured, 5)}; nothing was recorded to compare it with"
        verdict = "equal up to rounding" if result.ok else "DIFFERS from the recording"
        return f"perplexity {number(result.measured, 5)}, recorded {number(result.recorded, 5)}: {verdict}"

    @property
    def form_words(self) -> str:
        if not self.form:
            return ""
        factors = f"factors{f', {self.quantization}' if self.quantization else ''}"
        words = {"dense": "dense merge", "plain": "plain factors"}.get(self.form, factors)
        return f"{words}, {self.dtype}{', with our code' if self.with_code else ''}"


@dataclass(frozen=True)
class _Measured:
    perplexity: float | None = None
    protocol: object = None


def written_models(run: Run, bodies: Sequence[JsonMapping]) -> list[Written]:
    """Return the models under the run's ``exports``, then exports elsewhere from the worker's results ``bodies``.

    One whose ``lowrank.json`` is damaged is there, and says so.

    Raises:
        RunError: an answer is damaged.
    """
    folder = run.path / "exports"
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")) if folder.is_dir() else []
    known = {path.resolve() for path in inside}
    reported = {Path(entry.path): entry for entry in answers_in(bodies, ExportAnswer)}
    elsewhere = [path for path in reported if path.resolve() not in known]
    proofs = _proofs(bodies, folder)
    return [_written(path, reported.get(path), proofs.get(path)) for path in (*inside, *elsewhere)]


def _proofs(bodies: Sequence[JsonMapping], folder: Path) -> dict[Path, Proof]:
    """Return the newest verification of each folder, failures included."""
    result: dict[Path, Proof] = {}
    for body in bodies:
        when = float(body.get("time", 0.0))
        if body.get("kind") == "verify" and body.get("ok"):
            result[Path(str(body.get("path")))] = build(Proof, body.get("verification", {}), "an answer", time=when)
        elif body.get("kind") == "verify":
            path = folder / Path(str(argument_of(body, "path") or "")).name
            result[path] = Proof(ok=False, error=str(body.get("error") or "no reason given"), time=when)
    return result


def _written(path: Path, reported: ExportAnswer | None, proof: Proof | None) -> Written:
    trial = "" if reported is None else f"trial {reported.trial}" if isinstance(reported.trial, int) else str(reported.trial)
    source = path / "lowrank.json"
    try:
        body = read_json(source) or {}
        measured = build(_Measured, body.get("measured") or {}, str(source))
        ranks, healing = body.get("ranks"), body.get("healing")
        return build(
            Written,
            {**body, "parameters": body.get("written_parameters"), "dtype": body.get("stored_dtype", "")},
            str(source),
            path=path,
            allocation=body.get("allocation") or trial or path.name,
            bytes=_weight_bytes(path) if path.is_dir() else None,
            folder_bytes=sum(file.stat().st_size for file in _files(path)),
            perplexity=measured.perplexity,
            protocol=str(measured.protocol.get("line", "")) if isinstance(measured.protocol, Mapping) else "",
            ranks=dict(ranks) if isinstance(ranks, Mapping) and ranks else None,
            healed=str(healing.get("method", "")) if isinstance(healing, Mapping) else "",
            changed=source.stat().st_mtime if source.is_file() else None,
            proof=proof,
            damage="",
        )
    except RunError as error:
        return Written(path, trial or path.name, proof=proof, damage=str(error))


def _weight_bytes(folder: Path) -> int:
    """Return the bytes of the weight files that are loaded."""
    try:
        return sum((folder / name).stat().st_size for name in weight_files(folder).loaded)
    except ModelError:
        return 0


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


def ranks_in_words(ranks: Mapping[str, int | None]) -> str:
    """Return the number of compressed units and the range of their ranks, in words."""
    low = [rank for rank in ranks.values() if rank is not None]
    dense = len(ranks) - len(low)
    if not low:
        return "every layer stays dense"
    kept = f", {dense} dense" if dense else ""
    return f"{len(low)} compressed{kept}; ranks {min(low)} to {max(low)}, median {median(low):g}"


def rank_table_of(ranks: Mapping[str, int | None]) -> pd.DataFrame:
    """Return a row for each unit: layer, rank (missing where it is dense)."""
    ranks_column = pd.Series(list(ranks.values()), dtype="Int64")
    return pd.DataFrame({"layer": [unit_label(name) for name in ranks], "rank": ranks_column})


@dataclass(frozen=True)
class Loading:
    """Code that loads a folder, with its purpose."""

    title: str
    code: str
    language: str = "python"


def loading_of(path: Path, form: str, *, with_code: bool, auto_class: str) -> tuple[Loading, ...]:
    """Return the ways to load a folder: Python, and a server if one supports its form."""
    ways = [("With transformers, or any runtime that reads its checkpoints", "", "")]
    if form == "plain":
        ways = [("With transformers, by the module in the folder", "", ", trust_remote_code=True")]
    elif form != "dense":
        ways = [("With this package installed", REGISTERING, "")]
    if with_code:
        ways.append(("Without it, with the code in the folder", "", ", trust_remote_code=True"))
    command = {"dense": "vllm serve {}", "plain": "vllm serve {} --trust-remote-code"}.get(form, "lowrank serve {}")
    served = Loading("With a server", command.format(shlex.quote(str(path))), "bash")
    result = tuple(
        Loading(
            title,
            f"{first}from transformers import {auto_class}, AutoTokenizer\n\n"
            f"folder = {str(path)!r}\n"
            f"model = {auto_class}.from_pretrained(folder{option})\n"
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
        )
        for title, first, option in ways
    )
    return (*result, served)


def card_of(path: Path) -> str | None:
    """Return the text of a folder's model card, or None without one.

    Raises:
        RunError: it can't be read.
    """
    card = path / "README.md"
    try:
        return card.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{card} can't be read: {error}. Export the model again.") from error


def zipped(folder: Path) -> bytes:
    """Return ``folder`` as a zip file that unpacks to a folder of its name; weights hardly shrink, so nothing is compressed.

    Raises:
        RunError: it has gone, or has more than ``MOST_BYTES``.
    """
    files = _files(folder)
    if not files:
        raise RunError(f"{folder} does not exist any more. Write the model again.")
    if sum(path.stat().st_size for path in files) > MAX_BYTES:
        raise RunError(f"{folder} is too large for one download. Copy the folder.")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path in files:
            archive.write(path, Path(folder.name) / path.relative_to(folder))
    return buffer.getvalue()
