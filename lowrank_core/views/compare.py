"""Original against compressed, as measured on test text: from the worker's answers in ``results/``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from lowrank_core.allocation import ALLOCATORS
from lowrank_core.runs import JsonMapping, Run, read_json
from lowrank_core.search.records import MANUAL, TrialRecord
from lowrank_core.views.records import build
from lowrank_core.views.trials import trial_label

__all__ = [
    "Comparison",
    "Confirmed",
    "Continuation",
    "Export",
    "Failure",
    "answers",
    "comparison_table",
    "comparisons",
    "confirmed",
    "continuations",
    "exports",
    "label_of",
    "last_failure",
]


@dataclass(frozen=True)
class Comparison:
    """One allocation measured on test text, the original beside it; intervals are of 95 %.

    Attributes:
        label: an allocator's name or ``trial N``; of a healed model with the method.
        form: ``one-shot`` or ``healed``.
        perplexity_interval, dense_perplexity_interval: of the compressed and the original model, bootstrap over windows.
        perplexity_difference_interval: of compressed - original, paired by window.
        kl_interval: of the KL divergence, bootstrap over windows.
        compression_ratio, model_compression_ratio: fraction removed from the compressible linears, from the whole model.
    """

    label: str
    form: str
    time: float
    dataset: str
    split: str
    context: int
    windows: int
    tokens: int
    bos: str
    perplexity: float
    dense_perplexity: float
    nll: float
    dense_nll: float
    kl: float
    top1_agreement: float
    compression_ratio: float
    model_compression_ratio: float
    parameters: int
    dense_parameters: int
    compressible_parameters: int
    dense_compressible_parameters: int
    bytes: int
    dense_bytes: int
    protocol: str = ""
    perplexity_interval: tuple[float, ...] = ()
    dense_perplexity_interval: tuple[float, ...] = ()
    perplexity_difference_interval: tuple[float, ...] = ()
    kl_interval: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """The label as it is shown."""
        return ALLOCATORS[self.label].label if self.label in ALLOCATORS else self.label


@dataclass(frozen=True)
class Continuation:
    """The same prompt continued by both models."""

    prompt: str
    dense_text: str
    compressed_text: str
    trial: object
    tokens: int
    seed: int = 0
    temperature: float = 0.0
    time: float = 0.0


@dataclass(frozen=True)
class Export:
    """A compressed model on disk."""

    path: str
    trial: object
    time: float = 0.0


@dataclass(frozen=True)
class Failure:
    """A request that the worker could not meet."""

    kind: str
    error: str
    time: float = 0.0


def label_of(trial: int | str, trials: Sequence[TrialRecord]) -> str:
    """Return the label under which the worker files ``trial``, a number or an allocator's name."""
    record = next((record for record in trials if record.number == trial), None)
    if record is not None and record.label in ALLOCATORS:
        return record.label
    return trial if isinstance(trial, str) else f"trial {trial}"


def answers(run: Run) -> list[JsonMapping]:
    """Return the worker's answers, the oldest first.

    Raises:
        RunError: one is damaged.
    """
    folder = run.path / "results"
    paths = sorted(folder.glob("[0-9]*.json")) if folder.is_dir() else []
    return [body for path in paths if (body := read_json(path)) is not None]


def _of_kind(bodies: Sequence[JsonMapping], kind: str) -> list[JsonMapping]:
    return [body for body in bodies if body.get("ok") and body.get("kind") == kind]


def _filed(body: JsonMapping) -> str:
    """Return under which name an answer is filed: hand-picked trials have one label for all, so theirs is the number."""
    label, trial = str(body.get("label")), body.get("trial")
    return f"trial {trial}" if label == MANUAL and type(trial) is int else label


def comparisons(bodies: Sequence[JsonMapping]) -> list[Comparison]:
    """Return the newest measurement of each allocation, one-shot and healed by themselves; the least perplexity first."""
    newest: dict[tuple[str, str], tuple[JsonMapping, float]] = {}
    for body in bodies:
        when = float(body.get("time", 0))
        if not body.get("ok"):
            continue
        if body.get("kind") == "compare":
            newest["one-shot", _filed(body)] = body.get("report", {}), when
        elif body.get("kind") == "heal":
            newest["healed", str(body.get("label"))] = body.get("report", {}), when
            newest.setdefault(("one-shot", str(body.get("label")).partition(", healed")[0]), (body.get("one_shot", {}), when))
    found = [
        build(Comparison, report, "a comparison", label=label, form=form, time=when) for (form, label), (report, when) in newest.items()
    ]
    return sorted(found, key=lambda comparison: comparison.perplexity)


def continuations(bodies: Sequence[JsonMapping]) -> list[Continuation]:
    """Return the continuations, the newest first."""
    return [build(Continuation, body, "a continuation") for body in reversed(_of_kind(bodies, "generate"))]


def exports(bodies: Sequence[JsonMapping]) -> list[Export]:
    """Return the exports, the newest first."""
    return [build(Export, body, "an export") for body in reversed(_of_kind(bodies, "export"))]


@dataclass(frozen=True)
class Confirmed:
    """Trials of a search, measured on test text.

    Attributes:
        protocol: how, in words.
        frame: columns trial, name, value (on search-validation text), perplexity, low, high, kl, kl_low, kl_high; the original first,
            then by value.
    """

    protocol: str
    frame: pd.DataFrame


def confirmed(bodies: Sequence[JsonMapping], trials: Sequence[TrialRecord]) -> Confirmed | None:
    """Return the trials that were measured on test text, each as it was measured last; None without any."""
    known = {trial.number: trial for trial in trials}
    newest = {body["trial"]: body for body in _of_kind(bodies, "compare") if type(body.get("trial")) is int and body["trial"] in known}
    if not newest:
        return None
    found = {
        number: build(
            Comparison,
            body.get("report", {}),
            "a comparison",
            label=str(body.get("label")),
            form="one-shot",
            time=float(body.get("time", 0)),
        )
        for number, body in newest.items()
    }
    first = next(iter(found.values()))
    ordered = sorted(found, key=lambda number: (known[number].value is None, known[number].value or 0.0, number))
    rows = [_ends({"name": "Original", "perplexity": first.dense_perplexity}, first.dense_perplexity_interval, ())]
    for number in ordered:
        report, trial = found[number], known[number]
        row = {"trial": number, "name": trial_label(trial), "value": trial.value, "perplexity": report.perplexity, "kl": report.kl}
        rows.append(_ends(row, report.perplexity_interval, report.kl_interval))
    frame = pd.DataFrame(rows, columns=["trial", "name", "value", "perplexity", "low", "high", "kl", "kl_low", "kl_high"])
    return Confirmed(first.protocol, frame.astype({"trial": "Int64"}))


def _ends(row: dict[str, object], perplexity: Sequence[float], kl: Sequence[float]) -> dict[str, object]:
    low, high = perplexity or (None, None)
    kl_low, kl_high = kl or (None, None)
    return {**row, "low": low, "high": high, "kl_low": kl_low, "kl_high": kl_high}


def last_failure(bodies: Sequence[JsonMapping]) -> Failure | None:
    """Return the newest answer if it is a failure; what was said to a hand-picked allocation is told where it was picked."""
    told = [body for body in bodies if body.get("kind") != "measure"]
    if not told or told[-1].get("ok"):
        return None
    return build(Failure, {"kind": "request", "error": "no reason given", **told[-1]}, "an answer")


def comparison_table(found: Sequence[Comparison]) -> pd.DataFrame:
    """Return the original as a first row, then a row for each measured allocation."""
    if not found:
        return pd.DataFrame()
    first = found[0]
    rows: list[dict[str, object]] = [
        {
            "allocation": "Original",
            "form": "dense",
            "perplexity": first.dense_perplexity,
            "low": None,
            "high": None,
            "kl": None,
            "agreement": None,
            "removed": 0.0,
        }
        | {
            "model_removed": 0.0,
            "parameters": first.dense_parameters,
            "linears": first.dense_compressible_parameters,
            "bytes": first.dense_bytes,
        }
    ]
    if first.dense_perplexity_interval:
        rows[0]["low"], rows[0]["high"] = first.dense_perplexity_interval
    rows += [_row(comparison) for comparison in found]
    return pd.DataFrame(rows).astype({"low": float, "high": float, "kl": float, "agreement": float})


def _row(comparison: Comparison) -> dict[str, object]:
    low, high = comparison.perplexity_interval or (None, None)
    return {
        "allocation": comparison.name,
        "form": comparison.form,
        "perplexity": comparison.perplexity,
        "low": low,
        "high": high,
        "kl": comparison.kl,
        "agreement": comparison.top1_agreement,
        "removed": comparison.compression_ratio,
        "model_removed": comparison.model_compression_ratio,
        "parameters": comparison.parameters,
        "linears": comparison.compressible_parameters,
        "bytes": comparison.bytes,
    }
