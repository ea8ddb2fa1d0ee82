"""Identity of a run: its model, tokens and statistics. Nothing is measured or exported with others.

Files change while a run rests: weights are trained on, a text grows. Trials of two models are no study, so whoever loads the model or
the text of a run compares them with what was there at first, before anything is computed from them, and refuses what differs. The
worker that leads leaves what it loads in ``identity.json`` at once, and in the study for workers on other machines. Runs of earlier
versions have the study's copy, and the hashes in model.json and text.json.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

import optuna
from transformers import PreTrainedTokenizerBase

from lowrank_core.compression.decomposed import Decomposed
from lowrank_core.config import CalibrationConfig
from lowrank_core.errors import ConfigError
from lowrank_core.models import ModelHandle
from lowrank_core.runs import Run, read_json, write_json
from lowrank_core.statistics.calibration import statistics_key
from lowrank_core.studies.storage import open_storage
from lowrank_core.text import WindowSet

__all__ = ["EXPORT", "JOIN", "RESUME", "RunIdentity", "identity_of_factors", "identity_of_model", "identity_of_texts", "signed_in"]

Facts = Mapping[str, object]

RESUME, JOIN, EXPORT = "this run can't go on", "this worker can't join", "nothing can be exported from this run"

_FILE = "identity.json"
_SAME_ENERGY = 1e-3
"""Relative: two machines sum in different orders, and float32 tells."""

_MODEL_WORDS = {
    "dtype": "the precision of its model differs",
    "config": "the configuration of its model differs",
    "model": "the weights of its model differ",
    "tokenizer": "the tokenizer of its model differs",
}
_TEXT_WORDS = {
    "calibration": "the tokens of its calibration text differ",
    "validation": "the tokens of its validation text differ",
    "test": "the tokens of its test text differ",
    "text": "the tokens of its calibration or validation text differ",
}
_WORDS = {
    **_MODEL_WORDS,
    **_TEXT_WORDS,
    "statistics": "the settings of its calibration differ",
    "energy": "the errors of its factors differ",
}
"""Fact -> how its difference is reported, the first cause first."""

_PROBE = 'The 1,024 ranks: a café, naïve "quotes" and\n\ttabs; Größe 中文 ελληνικά \U0001f600 def f(x): return x**2  # two spaces'


def identity_of_model(handle: ModelHandle) -> dict[str, object]:
    """Return hashes of a model's weights, configuration and tokenizer behaviour."""
    return {**handle.identity, "tokenizer": _tokenizer_hash(handle.tokenizer)}


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the vocabulary and a sample's encoding and decoding: the file differs between versions."""
    ids = [tokenizer(_PROBE, add_special_tokens=special, verbose=False)["input_ids"] for special in (False, True)]
    parts = [sorted(tokenizer.get_vocab().items()), ids, tokenizer.decode(ids[0])]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def identity_of_texts(handle: ModelHandle, config: CalibrationConfig, *texts: WindowSet) -> dict[str, object]:
    """Return the hash of each split's tokens, and the key of the calibration statistics."""
    result: dict[str, object] = {windows.split: windows.sha256 for windows in texts}
    calibration = next((windows for windows in texts if windows.split == "calibration"), None)
    return result if calibration is None else {**result, "statistics": statistics_key(handle, calibration, config)}


def identity_of_factors(decomposed: Decomposed) -> dict[str, object]:
    """Return the total energy of the factors: the sum of errors at rank 0."""
    return {"energy": float(sum(curve[0] for curve in decomposed.curves.values()))}


def signed_in(study: optuna.Study) -> dict[str, object]:
    """Return the identity stored in ``study``."""
    result: dict[str, object] = json.loads(study.user_attrs.get("fingerprint", "{}"))
    return result


@dataclass(frozen=True)
class RunIdentity:
    """Identity of a run, from all its records.

    Attributes:
        run: the run.
        claim: how a refusal begins.
        known: facts by name; what no place knows can't be compared, and is taken as it is.
    """

    run: Run
    claim: str
    known: tuple[Facts, ...]

    @classmethod
    def of(cls, run: Run, claim: str = RESUME) -> RunIdentity:
        """Read the identity of ``run``.

        Raises:
            RunError: a file is damaged. ConfigError: the study's database can't be reached.
        """
        return cls(run, claim, (read_json(run.path / _FILE) or {}, _of_study(run), _of_parts(run)))

    def check(self, result: Facts) -> None:
        """Raise unless ``found`` is what the run was begun with.

        Raises:
            ConfigError: it is not; names what differs, and the way out.
        """
        for name, words in _WORDS.items():
            for facts in self.known:
                if name in result and name in facts and not _same(name, result[name], facts[name]):
                    raise ConfigError(
                        f"{self.claim}: {words} from what it was begun with ({self._both(name, result, facts)}). {self._advice(name)}"
                    )

    def keep(self, result: Facts) -> None:
        """Check the identity, and store new facts in the run's folder.

        Raises:
            ConfigError: as ``check``. RunError: the disk is full or read-only.
        """
        self.check(result)
        path = self.run.path / _FILE
        kept = read_json(path) or {}
        if not result.keys() <= kept.keys():
            write_json(path, {**result, **kept})

    def _both(self, name: str, result: Facts, facts: Facts) -> str:
        here, there = (_short(value) for value in (result[name], facts[name]))
        versions, now = self.run.record.get("versions") or {}, metadata.version("transformers")
        then = versions.get("transformers", now)
        by_version = f"; transformers {now} here, {then} there" if name in _MODEL_WORDS and then != now else ""
        return f"{here} here, {there} there{by_version}"

    def _advice(self, name: str) -> str:
        if self.claim == JOIN:
            return "Give it the same model and text, and the same version of this package."
        config = self.run.config
        new = "or start a new run with `lowrank search`."
        if name == "dtype":
            return f"Give --device and --dtype as before, {new}"
        if name in _MODEL_WORDS:
            return f"Put the old model back at {config.model.reference}, {new}"
        if name in _TEXT_WORDS:
            return f"Put the old text back at {config.text.reference}, {new}"
        return f"Put the old settings back in {self.run.path / 'run.json'}, {new}"


def _same(name: str, mine: object, theirs: object) -> bool:
    if name == "energy" and isinstance(mine, float) and isinstance(theirs, float):
        return math.isclose(mine, theirs, rel_tol=_SAME_ENERGY)
    return mine == theirs


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else str(value)


def _of_study(run: Run) -> Facts:
    if run.storage_url is None and not run.journal.exists():
        return {}
    try:
        return signed_in(optuna.load_study(study_name=run.study_name, storage=open_storage(run)))
    except KeyError:  # no study yet
        return {}


def _of_parts(run: Run) -> Facts:
    """Return the identity facts in the run's JSON files."""
    model, text = run.part("model") or {}, run.part("text") or {}
    result = {"model": model.get("fingerprint"), "dtype": model.get("dtype")}
    result |= {split: facts.get("sha256") for split, facts in (text.get("splits") or {}).items()}
    return {name: value for name, value in result.items() if value}
