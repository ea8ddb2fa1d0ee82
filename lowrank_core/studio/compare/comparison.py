"""Measurements on test text, dense against compressed, from the worker's results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from lowrank_core.allocation import ALLOCATORS, unspent_words
from lowrank_core.config import SearchConfig
from lowrank_core.config.mapping import build
from lowrank_core.parameters import budget_of
from lowrank_core.presets.recipes import PRESETS
from lowrank_core.runs import JsonMapping
from lowrank_core.runs.client import BACKGROUND
from lowrank_core.studies.model_ref import ModelRef
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studies.requests import CompareAnswer, HealAnswer, OtherTextAnswer, answers_in
from lowrank_core.studio.shared.table import Column, Table, intervals
from lowrank_core.studio.shared.trial_names import model_name, trial_label

__all__ = [
    "Comparison",
    "Confirmed",
    "Failure",
    "argument_of",
    "comparisons",
    "confirmed",
    "confirmed_spec",
    "label_of",
    "last_failure",
    "other_texts",
    "refusals",
    "unspent_notes",
    "warnings_of",
]


@dataclass(frozen=True)
class Comparison:
    """One compressed model measured on a text, the dense model next to it; intervals are of 95 %, and empty where there is none.

    Attributes:
        label: an allocator's name, ``trial N`` or ``preset:NAME``; of a healed model with the method.
        form: ``one-shot`` or ``healed``.
        perplexity_interval, dense_perplexity_interval: of the compressed and the dense model model, bootstrap over windows.
        perplexity_difference_interval: of compressed - original, paired by window.
        kl_interval: of the KL divergence, bootstrap over windows.
        perplexity_ratio_interval: of compressed / original, paired by window.
        window_nll, dense_window_nll: mean of each window, in nats per token.
        by_position: metrics over ranges of positions, as ``studio.compare.loss_details`` reads them.
        flops, dense_flops: for one token, as ``accounting.FLOPS_MEANING`` says; None where they were not counted.
        compression_ratio, model_compression_ratio: fraction removed from the compressible linears, from the whole model.
        shown: ``model_name`` of the label among the run's trials; empty where they were not given.
        warnings: caveats.
        key: what a request calls the model, but for the number of a trial that a rule chose; see ``label_of``.
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
    reverse_kl: float | None = None
    reverse_kl_interval: tuple[float, ...] = ()
    top5_agreement: float | None = None
    perplexity_ratio_interval: tuple[float, ...] = ()
    window_nll: tuple[float, ...] = ()
    dense_window_nll: tuple[float, ...] = ()
    by_position: tuple[object, ...] = ()
    flops: int | None = None
    dense_flops: int | None = None
    key: str = ""
    warnings: tuple[str, ...] = ()
    shown: str = ""

    @property
    def name(self) -> str:
        """Display name."""
        return self.shown or model_name(self.label)

    @property
    def dense(self) -> Comparison:
        """The dense model, as a row of its own: nothing is compared."""
        nothing: dict[str, Any] = {
            **dict.fromkeys(("perplexity_difference_interval", "kl_interval"), ()),
            **dict.fromkeys(("kl", "top1_agreement", "reverse_kl", "top5_agreement"), math.nan),
            **dict.fromkeys(("compression_ratio", "model_compression_ratio"), 0.0),
        }
        own = ("perplexity", "perplexity_interval", "nll", "window_nll", "parameters", "compressible_parameters", "bytes", "flops")
        return replace(self, shown="Dense", form="dense", **nothing, **{name: getattr(self, f"dense_{name}") for name in own})

    @property
    def given(self) -> bool:
        """Whether it comes from a rule, a preset or a grid, not from a search."""
        return (ref := ModelRef.find(self.label)) is not None and ref.kind in ("allocator", "preset", "dense")


def unspent_notes(result: Sequence[Comparison], search: SearchConfig) -> list[str]:
    """Return notes on presets, rules and trials whose rounding leaves part of the budget unspent; for a single ratio only."""
    return [f"{each.name}: {words}" for each in result for words in _unspent(each, search)]


def _unspent(shown: Comparison, search: SearchConfig) -> tuple[str, ...]:
    ref = ModelRef.find(shown.label)
    preset = PRESETS.get(ref.name) if ref is not None and ref.kind == "preset" else None
    if preset is None and (search.max_ratio is not None or (ref is not None and ref.kind == "dense")):
        return ()
    multiple = (preset.compression if preset else search.compression).rank_multiple
    dense, ratio = shown.dense_compressible_parameters, search.compression_ratio
    return unspent_words(budget_of(dense, ratio), shown.compressible_parameters, dense, ratio, multiple)


@dataclass(frozen=True)
class Failure:
    """A failed request."""

    kind: str
    error: str
    time: float = 0.0


_ELSEWHERE = ("measure", "directions", *BACKGROUND)
"""Requests of other pages."""


def label_of(trial: int | str, trials: Sequence[TrialRecord]) -> str:
    """Return the label of ``trial`` (a number or an allocator's name) in the worker's results."""
    record = next((record for record in trials if record.number == trial), None)
    return record.label if record is not None and record.label in ALLOCATORS else ModelRef.parse(trial).label


def argument_of(request: Mapping[str, object], name: str) -> object:
    """Return an argument of a request, or of the request that a result answers; None without it."""
    arguments = request.get("arguments")
    return arguments.get(name) if isinstance(arguments, Mapping) else None


def comparisons(bodies: Sequence[JsonMapping], trials: Sequence[TrialRecord] = ()) -> list[Comparison]:
    """Return the newest test measurement of each model, one-shot and healed separately; the lowest perplexity first.

    Models are called what they are called among ``trials``, those of the run.
    """
    newest: dict[str, Comparison] = {}
    known: tuple[type[CompareAnswer | HealAnswer], ...] = (CompareAnswer, HealAnswer)
    for answer in answers_in(bodies, *known):
        if isinstance(answer, HealAnswer):
            key = str(ModelRef("healed", answer.folder or answer.label))
            before = answer.label.partition(", healed")[0]
            newest[key] = _comparison(answer, key)
            newest.setdefault(before, _comparison(replace(answer, report=answer.one_shot), before))
        else:
            newest[_key(answer)] = _comparison(answer, _key(answer))
    return sorted(_named(_with_flops(_told_apart(list(newest.values()))), trials), key=lambda comparison: comparison.perplexity)


def _key(answer: CompareAnswer) -> str:
    ref = ModelRef.find(answer.trial)
    return str(ref) if ref is not None and ref.kind == "healed" else answer.filed_as


def _comparison(answer: CompareAnswer | HealAnswer, key: str) -> Comparison:
    healed = (ref := ModelRef.find(key)) is not None and ref.kind == "healed"
    label, form = (answer.label, "healed") if healed else (key, "one-shot")
    return build(Comparison, _with_width(answer.report), "a comparison", label=label, form=form, time=answer.time, key=key)


def _with_width(report: JsonMapping) -> JsonMapping:
    """Return a measurement without zero-width intervals: older versions computed them from one window."""
    return {name: value for name, value in report.items() if not (name.endswith("_interval") and _has_no_width(value))}


def _has_no_width(value: object) -> bool:
    return value is None or (isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1])


def warnings_of(result: Sequence[Comparison]) -> list[str]:
    """Return the distinct warnings of comparisons."""
    return list(dict.fromkeys(warning for comparison in result for warning in comparison.warnings))


def _told_apart(result: list[Comparison]) -> list[Comparison]:
    """Append the folder's suffix to the names of healings of one model by one method."""
    labels = [comparison.label for comparison in result]
    return [
        replace(each, label=f"{each.label} ({each.key[-4:]})") if each.form == "healed" and labels.count(each.label) > 1 else each
        for each in result
    ]


def _named(result: Sequence[Comparison], trials: Sequence[TrialRecord]) -> list[Comparison]:
    return [replace(each, shown=model_name(each.label, trials)) for each in result]


def _with_flops(result: list[Comparison]) -> list[Comparison]:
    """Copy the FLOPs of a healed model from its source, which has the same ranks."""
    counted = {each.label: each for each in result if each.flops is not None}
    return [
        replace(each, flops=before.flops, dense_flops=before.dense_flops)
        if each.flops is None and (before := counted.get(each.label.partition(", healed")[0])) is not None
        else each
        for each in result
    ]


def other_texts(bodies: Sequence[JsonMapping], trials: Sequence[TrialRecord] = ()) -> dict[str, list[Comparison]]:
    """Return the newest measurement of each model on each second text, by the text's reference; the newest text first."""
    newest: dict[str, dict[str, Comparison]] = {}
    for answer in answers_in(bodies, OtherTextAnswer):
        result = newest.pop(answer.text, {})
        result[_key(answer)] = _comparison(answer, _key(answer))
        newest[answer.text] = result
    return {text: _named(_told_apart(list(result.values())), trials) for text, result in reversed(newest.items())}


@dataclass(frozen=True)
class Confirmed:
    """Trials of a search, measured on test text.

    Attributes:
        protocol: how, in words.
        frame: columns trial, name, value (on search-validation text), perplexity, low, high, kl, kl_low, kl_high; the dense model first,
            then by value.
        warnings: caveats.
    """

    protocol: str
    frame: pd.DataFrame
    warnings: tuple[str, ...] = ()


def confirmed(bodies: Sequence[JsonMapping], trials: Sequence[TrialRecord]) -> Confirmed | None:
    """Return the newest test measurement of each trial; None without any."""
    known = {trial.number: trial for trial in trials}
    newest = {a.trial: a for a in answers_in(bodies, CompareAnswer) if type(a.trial) is int and a.trial in known}
    if not newest:
        return None
    result = {number: _comparison(answer, answer.label) for number, answer in newest.items()}
    first = next(iter(result.values()))
    ordered = sorted(result, key=lambda number: (known[number].value is None, known[number].value or 0.0, number))
    rows = [_ends({"name": "Dense", "perplexity": first.dense_perplexity}, first.dense_perplexity_interval, ())]
    for number in ordered:
        report, trial = result[number], known[number]
        row = {"trial": number, "name": trial_label(trial), "value": trial.value, "perplexity": report.perplexity, "kl": report.kl}
        rows.append(_ends(row, report.perplexity_interval, report.kl_interval))
    frame = pd.DataFrame(rows, columns=["trial", "name", "value", "perplexity", "low", "high", "kl", "kl_low", "kl_high"])
    return Confirmed(first.protocol, frame.astype({"trial": "Int64"}), tuple(warnings_of(list(result.values()))))


def confirmed_spec(seen: Confirmed) -> Table:
    """Return its frame as it is shown, intervals in words."""
    columns = (
        Column.text("name", "Allocation"),
        Column.number("value", "Value on validation text", help="The objective on search-validation text, as the search saw it."),
        Column.number("perplexity", "Perplexity on test text", 3, digits=5),
        Column.short("interval", "95 % interval", "Of the perplexity, bootstrap over windows."),
        Column.number("kl", "KL on test text (nats per token)", help="To the dense model."),
        Column.short("kl_interval", "95 % interval", "Of the KL, bootstrap over windows."),
    )
    shown = seen.frame.assign(
        interval=intervals(seen.frame, "perplexity", "low", "high", 4), kl_interval=intervals(seen.frame, "kl", "kl_low", "kl_high", 4)
    )
    caption = f"Trials of the search by their validation value, confirmed on test text. {seen.protocol}"
    return Table(shown, columns, caption, "confirmed", seen.frame)


def _ends(row: dict[str, object], perplexity: Sequence[float], kl: Sequence[float]) -> dict[str, object]:
    low, high = perplexity or (None, None)
    kl_low, kl_high = kl or (None, None)
    return {**row, "low": low, "high": high, "kl_low": kl_low, "kl_high": kl_high}


def last_failure(bodies: Sequence[JsonMapping]) -> Failure | None:
    """Return the newest result if it is a failure that no other section reports."""
    reported = [body for body in bodies if body.get("kind") not in _ELSEWHERE and not _is_preset(body)]
    if not reported or reported[-1].get("ok"):
        return None
    return build(Failure, {"kind": "request", "error": "no reason given", **reported[-1]}, "an answer")


def _is_preset(body: JsonMapping) -> bool:
    ref = ModelRef.find(argument_of(body, "trial"))
    return ref is not None and ref.kind == "preset"


def refusals(bodies: Sequence[JsonMapping]) -> dict[str, str]:
    """Return the error of each preset whose newest request failed, by display name."""
    newest = {str(argument_of(body, "trial")): body for body in bodies if body.get("kind") == "compare" and _is_preset(body)}
    return {model_name(key): str(body.get("error") or "no reason given") for key, body in newest.items() if not body.get("ok")}
