"""Every recipe on one calibration, at equal parameters: what is left of the model's predictions on test text."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowrank_core.allocation.byte_budget import bytes_on
from lowrank_core.catalogue import as_markdown
from lowrank_core.compression.build import CompressedModel
from lowrank_core.compression.pipeline import Pipeline
from lowrank_core.config import ModelSource, RunConfig, TextConfig, to_mapping
from lowrank_core.config.benchmarks import QualityBenchmark
from lowrank_core.errors import LowRankError
from lowrank_core.evaluation import evaluate
from lowrank_core.files.grids import GRIDS
from lowrank_core.metrics import metric_named
from lowrank_core.presets.dense import DENSE
from lowrank_core.presets.recipes import PRESETS, VARIANTS, Preset, preset_named, search_by
from lowrank_core.runs import create_run
from lowrank_core.studies.records import best_trial, read_trials
from lowrank_core.types import Result
from lowrank_core.wording import NO_INTERVAL, fixed, fixed_interval
from lowrank_core.worker.context import chosen_model
from lowrank_core.worker.main import run_worker

__all__ = ["QualityRow", "benchmark", "markdown_of", "quality_table"]


@dataclass(frozen=True)
class QualityRow:
    """One recipe at one ratio, measured on test text; intervals are of 95 %, bootstrap over windows, paired for the difference.

    Attributes:
        compression_ratio: asked for; removed: as counted in the built model, indices and biases included.
        bytes, dense_bytes: of the whole model as it is stored, and of the dense model.
        int8_bytes, int8_perplexity, int8_kl: of the same model with its factors in 8 bits; None where that was not asked for.
        seconds: from the decompositions to the compressed model, those shared by all ratios included; calibration left out.
        error: why it could not be made at this ratio; the metrics are then None.
    """

    recipe: str
    label: str
    reference: str
    compression_ratio: float
    removed: float | None = None
    parameters: int | None = None
    perplexity: float | None = None
    dense_perplexity: float | None = None
    difference_interval: tuple[float, float] | None = None
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    top1_agreement: float | None = None
    bytes: int | None = None
    dense_bytes: int | None = None
    int8_bytes: int | None = None
    int8_perplexity: float | None = None
    int8_kl: float | None = None
    seconds: float | None = None
    protocol: str = ""
    error: str = ""


@dataclass(frozen=True)
class _Table:
    pipeline: Pipeline
    int8: bool = False

    def rows(self, preset: Preset, ratios: Sequence[float]) -> Iterator[QualityRow]:
        """Decompose once, and yield a row for each ratio."""
        began = time.perf_counter()
        pipeline = self.pipeline.under(preset)
        _ = pipeline.decomposed
        shared = time.perf_counter() - began
        for ratio in ratios:
            began = time.perf_counter()
            try:
                model = pipeline.compress(ratio)
            except LowRankError as error:
                yield replace(_named(preset, ratio), error=str(error))
                continue
            yield self.measured(_named(preset, ratio), model, shared + time.perf_counter() - began)

    def dense_rows(self) -> Iterator[QualityRow]:
        """Yield a row for the dense model on each grid."""
        for each in DENSE.values():
            began = time.perf_counter()
            model = self.pipeline.quantized(self.pipeline.compress(0), dense=each.grid, rounding=each.rounding)
            row = QualityRow(f"dense {each.name}", each.label, each.reference, 0.0)
            yield replace(self, int8=False).measured(row, model, time.perf_counter() - began)
            print(f"{each.label}: done", file=sys.stderr, flush=True)

    def byte_rows(self, preset: Preset) -> Iterator[QualityRow]:
        """Yield a row for each quantised dense model: a recipe in as many bytes, rounded likewise."""
        pipeline = self.pipeline.under(preset)
        for each in DENSE.values():
            began = time.perf_counter()
            row = QualityRow(f"{preset.name} bytes", f"{preset.label}, in the bytes of “{each.label}”", preset.reference, 0.0)
            try:
                allocation = pipeline.allocate_bytes(
                    bytes_on(GRIDS[each.grid], pipeline.units, _itemsize(pipeline)), rounding=each.rounding
                )
                model = pipeline.compress(allocation, rounding=each.rounding)
            except LowRankError as error:
                yield replace(row, error=str(error))
                continue
            yield replace(self, int8=False).measured(row, model, time.perf_counter() - began)
            print(f"{row.label}: done", file=sys.stderr, flush=True)

    def measured(self, row: QualityRow, model: CompressedModel, seconds: float) -> QualityRow:
        try:
            report = evaluate(model.handle, self.pipeline.windows.test, against=self.pipeline.handle)
            row = self._in_int8(row, model) if self.int8 else row
        except LowRankError as error:
            return replace(row, removed=model.report.compression_ratio, error=str(error))
        return replace(
            row,
            removed=model.report.compression_ratio,
            parameters=model.report.linear_parameters_after,
            perplexity=report.perplexity,
            dense_perplexity=report.dense_perplexity,
            difference_interval=report.perplexity_difference_interval,
            kl=report.kl,
            kl_interval=report.kl_interval,
            top1_agreement=report.top1_agreement,
            bytes=model.report.bytes_after,
            dense_bytes=model.report.bytes_before,
            seconds=seconds,
            protocol=report.protocol,
        )

    def _in_int8(self, row: QualityRow, model: CompressedModel) -> QualityRow:
        small = self.pipeline.quantized(model, factors="int8")
        report = evaluate(small.handle, self.pipeline.windows.test, against=self.pipeline.handle)
        return replace(row, int8_bytes=small.report.bytes_after, int8_perplexity=report.perplexity, int8_kl=report.kl)


def _itemsize(pipeline: Pipeline) -> int:
    return pipeline.handle.stored_dtype.itemsize


def _named(preset: Preset, ratio: float) -> QualityRow:
    return QualityRow(preset.name, preset.label, preset.reference, ratio)


def benchmark(source: ModelSource, text: TextConfig, config: QualityBenchmark) -> Result:
    """Measure every preset, or those named, at equal parameters on test text."""
    rows = quality_table(source, text, config)
    return {"model": source.reference, "rows": [to_mapping(row) for row in rows], "text": markdown_of(rows)}


def quality_table(source: ModelSource, text: TextConfig, config: QualityBenchmark) -> list[QualityRow]:
    """Compress by every preset at every ratio, and measure on test text.

    Raises:
        LowRankError: model or text can't be used, or there is no such preset.
    """
    presets = [preset_named(name) for name in config.presets or PRESETS]
    recipes = [*presets, *(VARIANTS.values() if config.variants else ())]
    weighed = [recipe for recipe in recipes if metric_named(recipe.compression.basis).needs_gradients]
    pipeline = Pipeline(source, text, compression=(weighed or recipes)[0])
    _ = pipeline.windows, [pipeline.under(recipe).statistics for recipe in recipes]  # measured before the first clock is started
    table = _Table(pipeline, config.int8)
    rows: list[QualityRow] = []
    for recipe in recipes:
        rows += table.rows(recipe, config.ratios)
        print(f"{recipe.label}: done", file=sys.stderr, flush=True)
    if config.dense:
        rows += table.dense_rows()
        rows += [row for recipe in presets if recipe.allocation == "lagrangian" for row in table.byte_rows(recipe)]
    if config.search:
        rows += [_searched(table, source, text, ratio) for ratio in config.ratios]
    return rows


def _searched(table: _Table, source: ModelSource, text: TextConfig, ratio: float) -> QualityRow:
    preset = PRESETS["bolaco"]
    config = replace(search_by(preset, ratio), confirmed=0)
    row = QualityRow("bolaco search", f"Bolaco, its search ({config.trials} trials)", preset.reference, ratio)
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = create_run(RunConfig(source, text, search=config), path=Path(folder) / "run")
            session, bench = run_worker(run, verbose=False)
            best = best_trial(read_trials(run))
            if bench is None or best is None:
                return replace(row, error="no trial met the budget")
            _, model = chosen_model(run, session, bench, best.number)
    except LowRankError as error:
        return replace(row, error=str(error))
    print(f"{row.label} at {ratio}: done", file=sys.stderr, flush=True)
    return table.measured(row, model, time.perf_counter() - began)


def markdown_of(rows: Sequence[QualityRow]) -> str:
    """Return Markdown tables of recipes: by ratio, with all metrics by ratio and KL, and the protocol."""
    measured = [row for row in rows if row.dense_perplexity is not None]
    protocols = sorted({f"Dense perplexity {row.dense_perplexity:.3f}; {row.protocol}." for row in measured})
    by_bytes = [_by_bytes(rows)] if any(row.recipe.startswith("dense ") for row in rows) else []
    return "\n\n".join([_overview(rows), _details(rows), *by_bytes, *protocols])


def _overview(rows: Sequence[QualityRow]) -> str:
    """Return perplexity above dense and KL, a column per ratio; the lowest KL, summed over logarithms, first."""
    rows = [row for row in rows if row.compression_ratio > 0]  # the others are in the table by bytes
    ratios = sorted({row.compression_ratio for row in rows})
    recipes: dict[str, dict[float, QualityRow]] = {}
    for row in rows:
        recipes.setdefault(row.label, {})[row.compression_ratio] = row
    return as_markdown(
        {"perplexity above dense, KL": label, **{f"{ratio:.0%} removed": _cell(result.get(ratio)) for ratio in ratios}}
        for label, result in sorted(recipes.items(), key=lambda item: _distance(item[1]))
    )


def _by_bytes(rows: Sequence[QualityRow]) -> str:
    """Return a line for each model that was measured, the smallest first: what a byte buys."""
    sizes = [(row.bytes, row, row.kl, row.perplexity) for row in rows if row.bytes is not None]
    sizes += [
        (row.int8_bytes, replace(row, label=f"{row.label}, factors in int8"), row.int8_kl, row.int8_perplexity)
        for row in rows
        if row.int8_bytes
    ]
    return as_markdown(
        {
            "bytes": f"{size:,}",
            "of dense": f"{size / (row.dense_bytes or 1):.1%}",
            "model": row.label if row.compression_ratio == 0 else f"{row.label}, {row.compression_ratio:.0%} removed",
            "KL to dense": f"{kl or 0.0:.3g}",
            "test perplexity": f"{perplexity or math.nan:.3f}",
        }
        for size, row, kl, perplexity in sorted(sizes, key=lambda entry: (entry[0], entry[2] or 0.0))
    )


def _distance(result: Mapping[float, QualityRow]) -> tuple[int, float]:
    logarithms = [math.log(max(row.kl, 1e-12)) for row in result.values() if row.kl is not None]
    return -len(logarithms), sum(logarithms)


def _cell(row: QualityRow | None) -> str:
    if row is None or row.perplexity is None or row.dense_perplexity is None:
        return "–"
    return f"{_above(row, row.perplexity - row.dense_perplexity)}, {row.kl or 0.0:.3g}"


def _above(row: QualityRow, difference: float) -> str:
    """Return a difference of perplexities with its interval."""
    return f"{fixed(difference, 3, signed=True)} ({fixed_interval(row.difference_interval, 3, signed=True)})"


def _kl_words(row: QualityRow) -> str:
    return NO_INTERVAL if row.kl_interval is None else f"{row.kl_interval[0]:.3g} to {row.kl_interval[1]:.3g}"


def _details(rows: Sequence[QualityRow]) -> str:
    int8 = any(row.int8_bytes is not None for row in rows)
    ordered = sorted(rows, key=lambda row: (row.compression_ratio, row.kl is None, row.kl or 0.0))
    return as_markdown([_cells(row, int8=int8) for row in ordered])


def _cells(row: QualityRow, *, int8: bool) -> dict[str, str]:
    perplexity, dense, kl = row.perplexity or math.nan, row.dense_perplexity or math.nan, row.kl or 0.0
    cells = {
        "removed": f"{row.compression_ratio:.0%}",
        "recipe": row.label,
        "parameters": f"{row.parameters or 0:,}",
        "test perplexity": f"{perplexity:.3f}",
        "above dense (95 % interval)": _above(row, perplexity - dense),
        "KL to dense (95 % interval)": f"{kl:.3g} ({_kl_words(row)})",
        "top-1": f"{row.top1_agreement or 0.0:.1%}",
    }
    if int8:
        small = (row.int8_perplexity or math.nan) - dense
        sizes = {"bytes": f"{row.bytes or 0:,}", "int8: bytes": f"{row.int8_bytes or 0:,}"}
        cells |= {**sizes, "above dense": fixed(small, 3, signed=True), "KL": f"{row.int8_kl or 0.0:.3g}"}
        cells |= dict.fromkeys(("int8: bytes", "above dense", "KL"), "–") if row.int8_bytes is None else {}
    cells["s"] = f"{row.seconds or 0.0:.0f}"
    said = {"removed": cells["removed"], "recipe": row.label, "parameters": "–", "test perplexity": row.error}
    return {**dict.fromkeys(cells, ""), **said} if row.error else cells
