"""``lowrank evaluate`` and ``lowrank generate``: a result as a mapping, with a ``text`` to print."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest

from lowrank_core.commands.shared import progress_line
from lowrank_core.config import ModelSource, TextConfig
from lowrank_core.config.evaluation import BehaviourConfig, EvaluationConfig, Sampling
from lowrank_core.coverage import Coverage, shown
from lowrank_core.evaluation import EvaluationReport, PositionRow, evaluate
from lowrank_core.evaluation.behaviour import measure_behaviour
from lowrank_core.evaluation.generation import Continuation, side_by_side
from lowrank_core.models import load_model
from lowrank_core.runs.measurements import BehaviourComparison
from lowrank_core.text import load_windows, open_text
from lowrank_core.types import Result
from lowrank_core.wording import NO_INTERVAL, fixed, fixed_interval, fraction_words

__all__ = ["continue_with", "evaluate_on", "evaluate_on_texts"]

_COLUMN = 58
"""Characters of a continuation's lines, two next to each other."""


def evaluate_on(
    source: ModelSource, text: TextConfig, config: EvaluationConfig, against: str | None = None, behaviour: BehaviourConfig | None = None
) -> Result:
    """Measure a model on one text, and its ``behaviour`` if that is given.

    Raises:
        ConfigError, ModelError, TextError: as for ``evaluate_on_texts``.
    """
    ((report, behaves),), coverage = _reports(source, [text], config, against, behaviour)
    return {
        **_mapping(report, behaves, coverage),
        "model": source.reference,
        "text": "\n".join([_one(report), *_removed(report, coverage), *_behaviour_lines(behaves)]),
    }


def evaluate_on_texts(
    source: ModelSource,
    texts: Sequence[TextConfig],
    config: EvaluationConfig,
    against: str | None = None,
    behaviour: BehaviourConfig | None = None,
) -> Result:
    """Measure a model on several texts: what was calibrated on one of them may have lost another.

    Raises:
        ConfigError: the stride does not fit the context.
        ModelError: a model can't be used, or the two do not share a vocabulary.
        TextError: a text is unknown, can't be read, or is too short; raised before anything is measured.
        NumericalError: a window's loss is not finite.
    """
    measured, coverage = _reports(source, texts, config, against, behaviour)
    rows = [{**_mapping(report, behaves, coverage), "model": source.reference} for report, behaves in measured]
    reports = [report for report, _ in measured]
    lines = [line for _, behaves in measured for line in _behaviour_lines(behaves)]
    return {
        "model": source.reference,
        "texts": rows,
        "text": "\n".join([_several(reports), *_removed(reports[0], coverage), *lines]),
    }


def continue_with(source: ModelSource, prompt: str, sampling: Sampling, against: str | None = None) -> Result:
    """Continue a prompt with a model, next to the model ``against`` if given.

    Raises:
        ConfigError: the prompt is empty, or does not fit a model's context.
        ModelError: a model can't be used.
    """
    others = () if against is None else (ModelSource(against, source.device, source.dtype),)
    result = side_by_side([load_model(each) for each in (*others, source)], prompt, sampling)
    return {"prompt": prompt, **asdict(sampling), "continuations": [asdict(each) for each in result], "text": _columns(prompt, result)}


def _mapping(report: EvaluationReport, behaves: BehaviourComparison | None, coverage: Coverage | None) -> Result:
    covered = {} if coverage is None else {"coverage": coverage.to_mapping()}
    return {**report.to_mapping(), **({} if behaves is None else {"behaviour": behaves.to_mapping()}), **covered}


def _behaviour_lines(behaves: BehaviourComparison | None) -> list[str]:
    """Return the behaviour of the dense model and of the compressed one as a table; nothing where it was not measured."""
    if behaves is None:
        return []
    lines = ["", f"{'behaviour':12} {'repeated 4-grams':>17} {'ended':>13} {'tokens':>8} {'over dense':>11}"]
    for name, row, ratio in behaves.rows:
        shown = "model" if behaves.dense is None else name
        cells = (fraction_words(row.repeated), row.ended_words, f"{row.tokens:.1f}", "–" if ratio is None else f"{ratio:.2f}x")
        lines.append(f"{shown:12} {cells[0]:>17} {cells[1]:>13} {cells[2]:>8} {cells[3]:>11}")
    return [*lines, behaves.protocol]


def _removed(report: EvaluationReport, coverage: Coverage | None) -> list[str]:
    """Return the line on what was removed from the dense model, and of how much of it."""
    if coverage is None or report.compression_ratio is None or report.model_compression_ratio is None:
        return []
    removed = f"{shown(report.compression_ratio)} of the compressible linears, {shown(report.model_compression_ratio)} of the model"
    return [f"parameters removed: {removed}. {coverage.statement()}."]


def _reports(
    source: ModelSource, texts: Sequence[TextConfig], config: EvaluationConfig, against: str | None, behaviour: BehaviourConfig | None
) -> tuple[list[tuple[EvaluationReport, BehaviourComparison | None]], Coverage | None]:
    """Measure, once every text is known to be there and long enough; return what the dense model is made of, too, where there is one."""
    for text in texts:
        open_text(text.reference)
    handle = load_model(source)
    dense = None if against is None else load_model(ModelSource(against, source.device, source.dtype))
    if behaviour is not None:
        behaviour.check_fits(handle)
    sets = [load_windows(text, handle.tokenizer, config.split, count=_count(text, config), stride=config.stride) for text in texts]
    result = [
        (
            evaluate(handle, windows, against=dense, progress=progress_line(f"Evaluating {windows.dataset}")),
            None
            if behaviour is None
            else measure_behaviour(handle, windows, behaviour, against=dense, progress=progress_line("Continuing")),
        )
        for windows in sets
    ]
    return result, None if dense is None else dense.coverage


def _count(text: TextConfig, config: EvaluationConfig) -> int | None:
    return text.test_windows if config.windows is None and config.split != "all" else config.windows


def _one(report: EvaluationReport) -> str:
    lines = [f"perplexity {report.perplexity:.3f}  ({_interval(report.perplexity_interval)})"]
    if report.dense_perplexity is not None:
        lines += [
            f"dense      {report.dense_perplexity:.3f}  ({_interval(report.dense_perplexity_interval)})",
            f"difference {_difference(report)}  ({_interval(report.perplexity_difference_interval, paired=True)})",
            f"KL {_fixed(report.kl)} nats per token ({fixed_interval(report.kl_interval, 4)}), "
            f"reverse KL {_fixed(report.reverse_kl)} ({fixed_interval(report.reverse_kl_interval, 4)})",
            f"top-1 agreement {report.top1_agreement:.1%}, top-5 {report.top5_agreement:.1%}",
        ]
    return "\n".join([*lines, *_warnings(report), report.protocol, *_positions(report.by_position or ())])


def _warnings(report: EvaluationReport) -> list[str]:
    return [f"warning: {warning}" for warning in report.warnings]


def _positions(rows: Sequence[PositionRow]) -> list[str]:
    if not rows:
        return []
    alongside = rows[0].kl is not None
    head = f"{'context':>12} {'tokens':>8} {'NLL':>8}" + (f" {'dense':>8} {'KL':>8} {'top-1':>7}" if alongside else "")
    lines = ["", head]
    for row in rows:
        span = f"{row.first}" if row.first == row.last else f"{row.first} to {row.last}"
        more = f" {row.dense_nll:8.4f} {_fixed(row.kl):>8} {row.top1_agreement:7.1%}" if alongside else ""
        lines.append(f"{span:>12} {row.tokens:>8} {row.nll:8.4f}{more}")
    return lines


def _several(reports: Sequence[EvaluationReport]) -> str:
    alongside = reports[0].kl is not None
    head = f"{'text':24} {'perplexity (95 %)':>28}"
    lines = [head + (f" {'dense':>9} {'difference (95 %)':>28} {'KL':>8} {'reverse':>8} {'top-1':>7} {'top-5':>7}" if alongside else "")]
    for report in reports:
        line = f"{report.dataset[:24]:24} {f'{report.perplexity:.3f} ({fixed_interval(report.perplexity_interval, 3)})':>28}"
        if alongside:
            difference = f"{_difference(report)} ({fixed_interval(report.perplexity_difference_interval, 3)})"
            line += (
                f" {report.dense_perplexity:>9.3f} {difference:>28}"
                f" {_fixed(report.kl):>8} {_fixed(report.reverse_kl):>8} {report.top1_agreement:7.1%} {report.top5_agreement:7.1%}"
            )
        lines += [line, *(f"  {warning}" for warning in _warnings(report)), f"  {report.protocol}"]
    return "\n".join([*lines, *(["KL in nats per token."] if alongside else [])])


def _difference(report: EvaluationReport) -> str:
    assert report.dense_perplexity is not None
    return fixed(report.perplexity - report.dense_perplexity, 3, signed=True)


def _fixed(value: float | None) -> str:
    assert value is not None
    return fixed(value, 4)


def _interval(ends: tuple[float, float] | None, *, paired: bool = False) -> str:
    """Return an interval with what it is; where there is none, that."""
    if ends is None:
        return "no paired interval" if paired else NO_INTERVAL
    return f"95 % interval{', paired' if paired else ''} {fixed_interval(ends, 3)}"


def _columns(prompt: str, result: Sequence[Continuation]) -> str:
    """Return the continuations next to each other under the models' names; a single one keeps its lines."""
    if len(result) == 1:
        return f"{result[0].model}\n{result[0].facts.words()}\n\n{prompt}{result[0].text}"
    dense, ours = result
    heads = [[*_wrapped(dense.model), *_wrapped(dense.facts.words())], [*_wrapped(ours.model), *_wrapped(ours.facts.words(dense.facts))]]
    columns = [[*head, "-" * _COLUMN, *_wrapped(each.text)] for head, each in zip(heads, result, strict=True)]
    lines = [" | ".join(f"{part:{_COLUMN}}" for part in parts).rstrip() for parts in zip_longest(*columns, fillvalue="")]
    return "\n".join([f"prompt: {prompt}", "", *lines])


def _wrapped(text: str) -> list[str]:
    """Return lines of the column's width at most; the text's own line breaks and indents stay."""
    wrapper = textwrap.TextWrapper(_COLUMN, drop_whitespace=False, replace_whitespace=False)
    return [part for line in text.expandtabs(4).splitlines() for part in (wrapper.wrap(line) or [""])]
