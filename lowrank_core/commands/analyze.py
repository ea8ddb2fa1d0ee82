"""``lowrank analyze``: spectra of every layer, tokens along the top directions of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowrank_core.commands.shared import coverage_warnings, progress_line, progress_stage, reported
from lowrank_core.compression.pipeline import Pipeline
from lowrank_core.config import CalibrationConfig, ModelSource, TextConfig, to_mapping
from lowrank_core.config.directions import DirectionsConfig
from lowrank_core.coverage import coverage_lines
from lowrank_core.models import describe, notes_of
from lowrank_core.models.attention import find_heads
from lowrank_core.spectra.spectrum import LayerSpectrum, effective_rank, participation_ratio, rank_for_energy, stable_rank
from lowrank_core.statistics.directions import top_directions
from lowrank_core.statistics.spectra import spectra_of
from lowrank_core.types import Result

__all__ = ["analyze"]


_COLUMNS = {
    "break_even_rank": ("break-even", 10, "d"),
    "weight_effective_rank": ("eff. rank W", 16, ".1f"),
    "feature_effective_rank": ("eff. rank y", 16, ".1f"),
    "feature_rank_for_90_percent": ("90 % of y", 14, "d"),
    "feature_rank_for_99_percent": ("99 % of y", 14, "d"),
}
"""Key of a layer's row -> heading, width and format of its column."""


def analyze(
    source: ModelSource,
    text: TextConfig,
    calibration: CalibrationConfig,
    *,
    directions: tuple[str, str] | None = None,
    each_expert: bool = False,
) -> Result:
    """Calibrate, and return the metrics of every compressible layer, with the top ``directions`` (module, side) if given.

    In words, the experts of a mixture are a line with a range for each of their matrices, unless ``each_expert`` is to have its own.
    """
    config = DirectionsConfig(*directions, batch_size=calibration.batch_size) if directions else None
    pipeline = Pipeline(source, text, calibration=calibration, progress=progress_stage)
    handle = pipeline.handle
    doubts, heads = coverage_warnings(handle), find_heads(handle)
    statistics = reported(pipeline.moments)
    spectra = spectra_of(handle, statistics, progress=progress_line("Spectra"))
    rows = [_spectrum_row(spectrum) for spectrum in spectra]
    lines = _lines(spectra, rows, each_expert=each_expert)
    summary = {**describe(handle), **heads.describe()}
    del summary["layers"]
    lines += ["", *coverage_lines(handle.coverage), *handle.left_fused, *map(str, heads.dropped)]
    figures = statistics.describe(spectra, handle.layers)
    result: Result = {
        "model": summary,
        "layers": rows,
        "calibration": figures,
        "warnings": [*notes_of(source.reference), *doubts, *statistics.warnings()],
    }
    if config is not None:
        output = top_directions(handle, pipeline.calibration_windows, statistics, config)
        result["directions"] = to_mapping(output)
        lines += ["", output.to_text()]
    return {**result, "text": "\n".join(lines)}


def _lines(spectra: Sequence[LayerSpectrum], rows: Sequence[Mapping[str, Any]], *, each_expert: bool) -> list[str]:
    """Return a heading, and a line for each layer or mixture, in the order of the model."""
    alike: dict[str, list[Mapping[str, Any]]] = {}
    shapes = {}
    for spectrum, row in zip(spectra, rows, strict=True):
        name = spectrum.shape.name if each_expert else spectrum.shape.mixture or spectrum.shape.name
        alike.setdefault(name, []).append(row)
        shapes[name] = f"{spectrum.shape.d_out} x {spectrum.shape.d_in}"
    heading = " ".join([f"{'layer':42}", f"{'shape':>12}", *(f"{label:>{width}}" for label, width, _ in _COLUMNS.values())])
    named = {name: f"{name} ({len(group)} experts)" if len(group) > 1 else name for name, group in alike.items()}
    return [heading, *(" ".join([f"{named[name]:42}", f"{shapes[name]:>12}", *_cells(group)]) for name, group in alike.items())]


def _cells(group: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for key, (_, width, form) in _COLUMNS.items():
        values = [row[key] for row in group]
        ends = dict.fromkeys(f"{end:{form}}" for end in (min(values), max(values)))
        yield f"{' to '.join(ends):>{width}}"


def _spectrum_row(spectrum: LayerSpectrum) -> Result:
    shape, weight, feature = spectrum.shape, spectrum.weight_energy, spectrum.feature_eigenvalues
    return {
        "name": shape.name,
        "kind": shape.kind,
        "depth": shape.depth,
        "d_out": shape.d_out,
        "d_in": shape.d_in,
        "break_even_rank": shape.break_even_rank,
        "weight_effective_rank": effective_rank(weight),
        "feature_effective_rank": effective_rank(feature),
        "weight_stable_rank": stable_rank(weight),
        "feature_stable_rank": stable_rank(feature),
        "feature_participation_ratio": participation_ratio(feature),
        "feature_rank_for_90_percent": rank_for_energy(feature, 0.90),
        "feature_rank_for_99_percent": rank_for_energy(feature, 0.99),
        "weight_rank_for_90_percent": rank_for_energy(weight, 0.90),
        "weight_rank_for_99_percent": rank_for_energy(weight, 0.99),
    }
