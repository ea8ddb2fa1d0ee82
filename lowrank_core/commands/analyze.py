"""``lowrank analyze``: spectra of every layer, tokens along the top directions of one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_core.commands.shared import Stages, coverage_warnings, progress_line, reported
from lowrank_core.compression.pipeline import Pipeline
from lowrank_core.config import CalibrationConfig, ModelSource, TextConfig, to_mapping
from lowrank_core.config.directions import DirectionsConfig
from lowrank_core.coverage import coverage_lines
from lowrank_core.models import describe, load_model, notes_of
from lowrank_core.models.attention import find_heads
from lowrank_core.parameters import MatrixShape
from lowrank_core.spectra.spectrum import LayerSpectrum, effective_rank, participation_ratio, rank_for_energy, stable_rank
from lowrank_core.statistics.directions import top_directions
from lowrank_core.statistics.processes import end_helpers
from lowrank_core.statistics.spectra import spectra_of
from lowrank_core.statistics.weight_spectra import loaded_matrices, stored_matrices, weight_spectra
from lowrank_core.types import Result

__all__ = ["analyze", "analyze_weights"]


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
    pipeline = Pipeline(source, text, calibration=calibration, progress=Stages().stage)
    handle = pipeline.handle
    doubts, heads = coverage_warnings(handle), find_heads(handle)
    statistics = reported(pipeline.moments)
    end_helpers()
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


def analyze_weights(source: ModelSource, place: Path | None, shapes: Sequence[MatrixShape]) -> Result:
    """Return the metrics of every compressible weight; a line goes to stderr as soon as a block is done.

    Args:
        place: folder or file of the model, if it is on this machine; a folder's matrices are read one at a time, all others by loading it.
        shapes: of its matrices, as its headers tell them.

    Raises:
        ModelError: the model can't be read. NumericalError: a weight isn't finite.
    """
    stored = stored_matrices(place, shapes) if place is not None and place.is_dir() else None
    handle = None if stored is not None else load_model(source)
    matrices, total = (loaded_matrices(handle), len(handle.layers)) if handle is not None else (stored, len(shapes))
    spectra: tuple[LayerSpectrum, ...] = ()
    assert matrices is not None
    for spectra in weight_spectra(matrices, total=total):
        print(_block_line(spectra, total), file=sys.stderr, flush=True)
    rows = [_weight_row(spectrum) for spectrum in spectra]
    lines = [f"{'layer':42} {'shape':>12} {'break-even':>10} {'eff. rank W':>12} {'stable rank':>12} {'90 % of W':>10} {'99 % of W':>10}"]
    for row in rows:
        shape = f"{row['d_out']} x {row['d_in']}"
        lines.append(
            f"{row['name']:42} {shape:>12} {row['break_even_rank']:>10} {row['weight_effective_rank']:>12.1f} "
            f"{row['weight_stable_rank']:>12.1f} {row['weight_rank_for_90_percent']:>10} {row['weight_rank_for_99_percent']:>10}"
        )
    return {"model": source.reference, "read": "file" if handle is None else "loaded", "layers": rows, "text": "\n".join(lines)}


def _block_line(spectra: Sequence[LayerSpectrum], total: int) -> str:
    depth = spectra[-1].shape.depth
    shares = [effective_rank(s.weight_energy) / s.shape.max_rank for s in spectra if s.shape.depth == depth]
    return f"block {depth}: effective ranks {min(shares):.0%} to {max(shares):.0%} of full rank; {len(spectra)} of {total} matrices"


def _weight_row(spectrum: LayerSpectrum) -> Result:
    shape, weight = spectrum.shape, spectrum.weight_energy
    return {
        "name": shape.name,
        "kind": shape.kind,
        "depth": shape.depth,
        "d_out": shape.d_out,
        "d_in": shape.d_in,
        "break_even_rank": shape.break_even_rank,
        "weight_effective_rank": effective_rank(weight),
        "weight_stable_rank": stable_rank(weight),
        "weight_rank_for_90_percent": rank_for_energy(weight, 0.90),
        "weight_rank_for_99_percent": rank_for_energy(weight, 0.99),
    }


def _spectrum_row(spectrum: LayerSpectrum) -> Result:
    feature = spectrum.feature_eigenvalues
    return {
        **_weight_row(spectrum),
        "feature_effective_rank": effective_rank(feature),
        "feature_stable_rank": stable_rank(feature),
        "feature_participation_ratio": participation_ratio(feature),
        "feature_rank_for_90_percent": rank_for_energy(feature, 0.90),
        "feature_rank_for_99_percent": rank_for_energy(feature, 0.99),
    }
