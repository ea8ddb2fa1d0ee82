"""``lowrank analyze``: spectra of every layer, tokens along the top directions of one."""

from __future__ import annotations

from lowrank_core.commands.shared import Stages, coverage_warnings, progress_line, reported
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


def analyze(source: ModelSource, text: TextConfig, calibration: CalibrationConfig, *, directions: tuple[str, str] | None = None) -> Result:
    """Calibrate, and return the metrics of every compressible layer, with the top ``directions`` (module, side) if given."""
    config = DirectionsConfig(*directions, batch_size=calibration.batch_size) if directions else None
    pipeline = Pipeline(source, text, calibration=calibration, progress=Stages().stage)
    handle = pipeline.handle
    doubts, heads = coverage_warnings(handle), find_heads(handle)
    statistics = reported(pipeline.moments)
    spectra = spectra_of(handle, statistics, progress=progress_line("Spectra"))
    rows = [_spectrum_row(spectrum) for spectrum in spectra]
    lines = [f"{'layer':42} {'shape':>12} {'break-even':>10} {'eff. rank W':>12} {'eff. rank y':>12} {'90 % of y':>10} {'99 % of y':>10}"]
    for spectrum, row in zip(spectra, rows, strict=True):
        lines.append(
            f"{spectrum.shape.name:42} {f'{spectrum.shape.d_out} x {spectrum.shape.d_in}':>12} {row['break_even_rank']:>10} "
            f"{row['weight_effective_rank']:>12.1f} {row['feature_effective_rank']:>12.1f} "
            f"{row['feature_rank_for_90_percent']:>10} {row['feature_rank_for_99_percent']:>10}"
        )
    summary = {**describe(handle), **heads.describe()}
    del summary["layers"]
    lines += ["", *coverage_lines(handle.coverage), *map(str, heads.dropped)]
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
