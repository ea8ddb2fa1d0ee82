"""Report sections: model, text, calibration, spectra."""

from __future__ import annotations

import pandas as pd

from lowrank_core.config import TOKENS_PER_DIMENSION
from lowrank_core.runs import Run
from lowrank_core.spectra.spectrum import LayerSpectrum, load_spectra
from lowrank_core.studio.overview.calibration_quality import (
    CalibrationFacts,
    calibration_facts,
    inputs_spec,
    quality_table,
    quality_warnings,
)
from lowrank_core.studio.overview.text_facts import TextFacts, splits_spec, text_facts
from lowrank_core.studio.report.blocks import Block, Facts, Folded, Note, Section
from lowrank_core.studio.shared.chart_style import Chart
from lowrank_core.studio.shared.formatting import DASH, count, duration, number, percent, size
from lowrank_core.studio.shared.layer_map_chart import map_figure
from lowrank_core.studio.shared.model_facts import ModelFacts, model_facts, modules_spec
from lowrank_core.studio.shared.protocol import bos_words, spectra_protocol
from lowrank_core.studio.shared.summary import min_relative, type_table
from lowrank_core.studio.shared.table import Column, Table
from lowrank_core.studio.spectra.spectrum_chart import scree_figure
from lowrank_core.studio.spectra.spectrum_table import METRICS, SOURCES, atlas, atlas_spec, module_facts, scree_curves

__all__ = ["calibration_section", "model_section", "spectra_section", "text_section"]

_METRIC = "effective_rank"


def model_section(run: Run) -> Section:
    """Raises: RunError: model.json is damaged."""
    facts = model_facts(run)
    blocks: tuple[Block, ...] = (Note("missing", "The model was not read yet: model.json is written when it was."),)
    if facts is not None:
        warning = facts.coverage.warning()
        notes = [Note("warning", f"{warning[0].upper()}{warning[1:]}")] if warning else []
        notes += [Note("info", reason) for reason in facts.heads_dropped]
        blocks = (*notes, _model_facts(facts), Note("info", f"{facts.coverage.statement()}."), modules_spec(facts))
    return Section("model", "The model", "Architecture and compressible parameters.", blocks)


def _model_facts(facts: ModelFacts) -> Facts:
    tied = "tied: embedding and head share one matrix" if facts.tied_embeddings else "not tied: embedding and head are separate"
    return Facts(
        (
            ("Model", facts.reference, facts.architecture),
            ("Parameters", count(facts.parameters), f"{facts.parameters:,}"),
            ("Compressible", count(facts.compressible_parameters), f"{percent(facts.compressible_share)} of all; linears of the blocks"),
            ("Size of the checkpoint", size(facts.bytes), f"held as {facts.dtype} on {facts.device or 'cpu'}"),
            ("Blocks × hidden", f"{facts.blocks} × {facts.hidden:,}", f"context up to {facts.max_context or DASH} tokens"),
            ("Vocabulary", f"{facts.vocabulary:,}", f"embeddings {tied}"),
            ("Fingerprint", facts.fingerprint[:12] or DASH, "of the weights: equal hashes mean equal models"),
        )
    )


def text_section(run: Run) -> Section:
    """Raises: RunError: text.json is damaged."""
    facts = text_facts(run)
    blocks: tuple[Block, ...] = (Note("missing", "The text was not cut yet: text.json is written when it was."),)
    if facts is not None:
        blocks = (*(Note("warning", warning) for warning in facts.warnings), _text_facts(facts), splits_spec(facts))
    return Section("text", "The text and the protocol", "Data splits and their use.", blocks)


def _text_facts(facts: TextFacts) -> Facts:
    return Facts(
        (
            ("Text", facts.reference, ""),
            ("Context", f"{facts.context} tokens", "in a window; windows do not overlap"),
            ("Beginning of text", bos_words(facts.bos), "BOS is counted in the context, and never predicted"),
            ("Seed", str(facts.seed), "of the draw of calibration windows"),
        )
    )


def calibration_section(run: Run) -> Section:
    """Raises: RunError: calibration.json is damaged."""
    facts = calibration_facts(run)
    blocks: tuple[Block, ...] = (Note("missing", "Not calibrated yet: calibration.json is written when the statistics are there."),)
    if facts is not None:
        warnings = [Note("warning", warning) for warning in quality_warnings(facts)]
        inputs = Folded(f"All {len(facts.inputs)} distinct inputs", (inputs_spec(quality_table(facts)),))
        blocks = (*(warnings or [Note("info", "No warning: every input saw enough tokens.")]), _quality(facts), inputs)
    return Section("calibration", "Calibration quality", "Quality of the statistics behind all results.", blocks)


def _quality(facts: CalibrationFacts) -> Facts:
    took = "taken from the cache" if facts.cached else f"measured in {duration(facts.seconds)}"
    minimum = number(facts.min_tokens_per_dimension)
    return Facts(
        (
            ("Calibration tokens", f"{facts.tokens:,}", f"{facts.windows} windows, {took}"),
            ("Tokens per dimension", minimum, f"minimum over all inputs; below {TOKENS_PER_DIMENSION}, small eigenvalues are noisy"),
            ("Worst condition", facts.condition_words, "largest over smallest eigenvalue of an input's covariance, the largest"),
            ("Groups × windows", f"{facts.groups} × {facts.group_size}", f"weights: {facts.group_weights}; pooled within groups"),
        )
    )


def spectra_section(run: Run) -> Section:
    """Raises: RunError: spectra.npz is damaged."""
    path = run.path / "spectra.npz"
    blocks: tuple[Block, ...] = (Note("missing", "No spectra yet: they are computed when the calibration is done."),)
    if path.exists():
        spectra = load_spectra(path)
        blocks = (
            *_maps(spectra, spectra_protocol(run)),
            _by_type(spectra),
            _scree(spectra, spectra_protocol(run)),
            Folded(f"All {len(spectra)} modules", (atlas_spec(spectra, _METRIC),)),
        )
    return Section("spectra", "Where the model is low-rank", "Ranks of weights and features.", blocks)


def _maps(spectra: tuple[LayerSpectrum, ...], protocol: str) -> list[Block]:
    metric, result = METRICS[_METRIC], []
    for source, label in SOURCES.items():
        view = atlas(spectra, _METRIC, source, relative=True)
        kind = label.split(" ")[0].lower()
        result.append(
            Chart(
                map_figure(view),
                view.frame,
                name=f"map-{source}",
                title=f"{metric.label} of every module's {kind}, as a share of full rank (%)",
                how=f"{metric.meaning}; dark cells are low-rank. Columns are blocks, rows module types.",
                alt=f"Map of the {metric.label.lower()} of {kind} by block and module type; the table below has the same by type",
                protocol=protocol,
            )
        )
    return list(result)


def _by_type(spectra: tuple[LayerSpectrum, ...]) -> Block:
    columns = [Column.text("type", "Module type"), Column.whole("modules", "Modules")]
    for source in SOURCES:
        columns += [Column.share(f"{source}_{end}", f"{source.capitalize()}, {end}") for end in ("least", "median", "most")]
    columns.append(Column.whole("below_even", "Below break-even", "Modules whose features' effective rank lies below the break-even rank."))
    caption = f"{METRICS[_METRIC].label} as a share of full rank (%), by module type"
    return Table(type_table(spectra, _METRIC), columns, caption, "spectra-by-type")


def _scree(spectra: tuple[LayerSpectrum, ...], protocol: str) -> Block:
    minimum = min_relative(spectra, _METRIC)
    curves = scree_curves(minimum)
    data = pd.DataFrame({"rank": curves.ranks, "weights": curves.weights, "features": curves.features})
    words = "; ".join(f"{label.lower()} {words}" for label, (words, _) in module_facts(minimum).items())
    return Chart(
        scree_figure(curves),
        data,
        name="scree",
        title=f"Spectra of {minimum.shape.name}, the module with the lowest-rank features",
        how=f"a curve that falls fast is low-rank; left of the break-even rank two factors are smaller than the matrix. Here: {words}.",
        alt=f"Singular values of the weight and square roots of feature eigenvalues of {minimum.shape.name} over rank, log axes",
        protocol=protocol,
    )
