"""Comparison of several runs, with groups of comparable values."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from lowrank_core.catalogue import registered
from lowrank_core.config import OBJECTIVES, RunConfig
from lowrank_core.config.options import Declared, options_of
from lowrank_core.errors import LowRankError
from lowrank_core.runs import Run
from lowrank_core.runs.client import results
from lowrank_core.studies.records import TrialRecord, best_trial, counts_of, read_rules, read_trials
from lowrank_core.studio.compare.comparison import Comparison, comparisons, label_of
from lowrank_core.studio.overview.text_facts import text_facts
from lowrank_core.studio.shared.formatting import DASH, interval_words
from lowrank_core.studio.shared.model_facts import ModelFacts, model_facts
from lowrank_core.studio.shared.summary import protocol_of
from lowrank_core.studio.shared.table import Column, Table, filled
from lowrank_core.studio.shared.trial_names import ratio_words, trial_label

__all__ = ["RunComparison", "compare_runs", "option_differences"]


@dataclass(frozen=True)
class RunComparison:
    """Runs as rows.

    Attributes:
        frame: of ``_COLUMNS``. Groups are letters: numbers with one letter were measured alike. Values and perplexities are missing where
            they were not measured.
        options: columns option, and one for each run's id: the options in which the runs differ, in words.
        notes: what can't be compared and why, and the protocols by letter; in sentences.
    """

    frame: pd.DataFrame
    options: pd.DataFrame
    notes: tuple[str, ...]

    @property
    def table(self) -> Table:
        """The frame as it is shown, without letters where all are alike."""
        alike = [group for group in ("value_group", "test_group") if self.frame[group].nunique() < 2]
        return Table(self.frame, [column for column in _COLUMNS if column.name not in alike], "The picked runs side by side")


@dataclass(frozen=True)
class _Row:
    """A row of the comparison; equal ``value_key`` or ``test_key`` means comparable."""

    run: Run
    name: str
    model: str
    text: str
    ratio: str | None
    trials: int | None
    best: TrialRecord | None
    objective: str
    value_key: Hashable | None
    measured: Comparison | None
    test_key: Hashable | None
    value_group: str | None = None
    test_group: str | None = None


_COLUMNS = (
    Column.text("run", "Run", width=180).of("name"),
    Column.text("model", "Model"),
    Column.text("text", "Text"),
    Column.text("removed", "Removed").of("ratio"),
    Column.whole("trials", "Trials"),
    Column.text("best", "Best trial").of(lambda row: row.best and trial_label(row.best)),
    Column.number("value", "Best value", help="The objective, on search-validation text.").of(lambda row: row.best and row.best.value),
    Column.text("value_group", "Comparable", "Best values with the same letter are comparable."),
    Column.number("perplexity", "Perplexity (test)", 3, "Of the best trial, as measured on test text.").of(
        lambda row: row.measured and row.measured.perplexity
    ),
    Column.text("interval", "95 % interval", "Bootstrap over test windows.").of(
        lambda row: row.measured and interval_words(row.measured.perplexity_interval)
    ),
    Column.number("dense", "Dense", 3, "Perplexity of the dense model on the same windows.").of(
        lambda row: row.measured and row.measured.dense_perplexity
    ),
    Column.text("test_group", "Comparable (test)", "Perplexities with the same letter are comparable."),
)


def compare_runs(runs: Sequence[Run]) -> RunComparison:
    """Return ``runs`` as rows; a run with a damaged study has no values."""
    rows = [_row(run) for run in runs]
    values = _letters([row.value_key for row in rows])
    tests = _letters([row.test_key for row in rows])
    frame = filled((replace(row, value_group=v, test_group=t) for row, v, t in zip(rows, values, tests, strict=True)), _COLUMNS)
    options = pd.DataFrame(_differing({run.id: run.config for run in runs}), columns=["option", *(run.id for run in runs)])
    return RunComparison(frame, options, (*_value_notes(rows, values), *_test_notes(rows, tests)))


def _differing(configs: Mapping[str, RunConfig]) -> list[dict[str, str]]:
    parts = [
        *({name: getattr(config, part) for name, config in configs.items()} for part in ("model", "text", "calibration", "search")),
        {name: config.search and config.search.compression for name, config in configs.items()},
    ]
    return [row for part in parts for row in option_differences(part)]


def option_differences(configs: Mapping[str, object | None]) -> list[dict[str, str]]:
    """Return a row for each option in which ``configs`` (name -> one of a class, or None) differ: its label, and its value by name."""
    kinds = {type(config) for config in configs.values() if config is not None}
    rows = []
    for declared in options_of(kinds.pop()) if kinds else ():
        values = {name: None if config is None else _words(declared, getattr(config, declared.name)) for name, config in configs.items()}
        if len(set(values.values())) > 1:
            rows.append({"option": declared.label, **{name: value or DASH for name, value in values.items()}})
    return rows


def _words(declared: Declared, value: object) -> str:
    return registered(declared.name).get(str(value)) or declared.words(value)


def _row(run: Run) -> _Row:
    config, search = run.config, run.config.search
    facts, best, measured, trials = None, None, None, None
    splits: dict[str, Hashable] = {}
    selected: Hashable = None
    try:
        facts, text = model_facts(run), text_facts(run)
        splits = {split.name: (split.sha256, text.context) for split in text.splits} if text else {}  # one text may be cut in two ways
        if search is not None:
            result = read_trials(run)
            selected = (read_rules(run) if search.objective == "bolaco" else "", str((run.part("selection") or {}).get("chosen")))
            trials, best = counts_of(result).complete, best_trial(result) if search.max_ratio is None else None
            measured = _measured(run, best, result)
    except LowRankError:
        facts, best, measured, trials = None, None, None, None
    model = _identity(facts, config.model.reference)
    judged = (search.objective, search.top_k, search.autocast, selected) if search else None
    return _Row(
        run=run,
        name=str(run.record["name"]),
        model=config.model.reference,
        text=config.text.reference,
        ratio=ratio_words(search) if search else None,
        trials=trials,
        best=best,
        objective=search.objective if search else "",
        value_key=None if best is None else (model, judged, splits.get("validation")),
        measured=measured,
        test_key=None if measured is None else (model, splits.get("test"), _protocol_key(measured)),
    )


def _identity(facts: ModelFacts | None, reference: str) -> Hashable:
    return (facts.fingerprint or facts.reference, facts.dtype) if facts is not None else reference


def _measured(run: Run, best: TrialRecord | None, trials: Sequence[TrialRecord]) -> Comparison | None:
    """Return the test measurement of the best trial's one-shot model; None without one."""
    if best is None:
        return None
    label = label_of(best.number, trials)
    known = {f"trial {best.number}", label}
    return next((c for c in comparisons(results(run)) if c.form == "one-shot" and c.label in known), None)


def _protocol_key(measured: Comparison) -> Hashable:
    return measured.dataset, measured.split, measured.context, measured.windows, measured.tokens, measured.bos


def _letters(keys: Sequence[Hashable | None]) -> list[str | None]:
    """Return A, B, … for equal keys, in the order of their first appearance; None stays."""
    order = list(dict.fromkeys(key for key in keys if key is not None))
    return [None if key is None else _letter(order.index(key)) for key in keys]


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def _value_notes(rows: Sequence[_Row], letters: Sequence[str | None]) -> list[str]:
    groups = {letter: row for row, letter in zip(reversed(rows), reversed(letters), strict=True) if letter}
    if len(groups) < 2:
        return [f"Best values: {OBJECTIVES[row.objective]}, on the same search-validation text." for row in groups.values()]
    words = "; ".join(f"{letter}: {OBJECTIVES[groups[letter].objective]} of {groups[letter].model}" for letter in sorted(groups))
    return [
        "Best values with different letters are not comparable: objective, model or search-validation text differ "
        f"({words}, on {_texts(groups)})."
    ]


def _texts(groups: dict[str, _Row]) -> str:
    texts = list(dict.fromkeys(row.text for row in groups.values()))
    return texts[0] if len(texts) == 1 else " and ".join(texts)


def _test_notes(rows: Sequence[_Row], letters: Sequence[str | None]) -> list[str]:
    groups = {letter: row for row, letter in zip(reversed(rows), reversed(letters), strict=True) if letter}
    protocols = {letter: protocol_of(row.measured) for letter, row in groups.items() if row.measured is not None}
    if not groups:
        return ["No best trial of these runs is measured on test text yet; do it on the Compare page."]
    if len(groups) == 1:
        return [f"Perplexity on test text, one protocol for all: {protocol}." for protocol in protocols.values()]
    listed = " ".join(f"{letter}: {groups[letter].model}; {protocols[letter]}." for letter in sorted(protocols))
    return [f"Perplexities with different letters are not comparable: model or test text differ. {listed}"]
