"""Report sections: model, text, calibration, spectra."""

from __future__ import annotations

from lowrank_core.runs import Run
from lowrank_core.spectra.spectrum import LayerSpectrum, load_spectra
from lowrank_core.studio.overview.calibration_quality import (
    calibration_facts,
    inputs_spec,
    quality_metrics,
    quality_table,
    quality_warnings,
)
from lowrank_core.studio.overview.text_facts import splits_spec, text_facts
from lowrank_core.studio.report.blocks import Block, Facts, Folded, Note, Prose, Section
from lowrank_core.studio.shared.model_facts import model_facts, model_metrics, model_words, modules_spec
from lowrank_core.studio.shared.protocol import spectra_protocol
from lowrank_core.studio.shared.summary import min_relative, type_table
from lowrank_core.studio.shared.table import Column, Table
from lowrank_core.studio.spectra.spectrum_chart import metric_chart, scree_chart
from lowrank_core.studio.spectra.spectrum_table import METRICS, SOURCES, atlas, atlas_spec, module_facts, scree_curves

__all__ = ["calibration_section", "model_section", "spectra_section", "text_section"]

_METRIC = "effective_rank"
_WINDOWS = "Windows do not overlap; BOS is counted in the context, and never predicted. The seed draws the calibration windows."


def model_section(run: Run) -> Section:
    """Raises: RunError: model.json is damaged."""
    facts = model_facts(run)
    blocks: tuple[Block, ...] = (Note("missing", "The model was not read yet: model.json is written when it was."),)
    if facts is not None:
        warning = facts.coverage.warning()
        notes = [Note("warning", f"{warning[0].upper()}{warning[1:]}")] if warning else []
        reasons = (*facts.left_fused, *facts.heads_dropped, *filter(None, [facts.dense_merge_note]))
        notes += [Note("info", reason) for reason in reasons]
        blocks = (
            *notes,
            Prose(f"{facts.reference} · {model_words(facts)}"),
            Facts(model_metrics(facts)),
            Note("info", f"{facts.coverage.statement()}."),
            modules_spec(facts),
        )
    return Section("model", "The model", "Architecture and compressible parameters.", blocks)


def text_section(run: Run) -> Section:
    """Raises: RunError: text.json is damaged."""
    facts = text_facts(run)
    blocks: tuple[Block, ...] = (Note("missing", "The text was not cut yet: text.json is written when it was."),)
    if facts is not None:
        blocks = (*(Note("warning", warning) for warning in facts.warnings), Prose(f"{facts.words}. {_WINDOWS}"), splits_spec(facts))
    return Section("text", "The text and the protocol", "Data splits and their use.", blocks)


def calibration_section(run: Run) -> Section:
    """Raises: RunError: calibration.json is damaged."""
    facts = calibration_facts(run)
    blocks: tuple[Block, ...] = (Note("missing", "Not calibrated yet: calibration.json is written when the statistics are there."),)
    if facts is not None:
        warnings = [Note("warning", warning) for warning in quality_warnings(facts)]
        inputs = Folded(f"All {len(facts.inputs)} distinct inputs", (inputs_spec(quality_table(facts)),))
        blocks = (*(warnings or [Note("info", "No warning: every input saw enough tokens.")]), Facts(quality_metrics(facts)), inputs)
    return Section("calibration", "Calibration quality", "Quality of the statistics behind all results.", blocks)


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
    views = {source: atlas(spectra, _METRIC, source, relative=True) for source in SOURCES}
    return [metric_chart(view, _METRIC, source, protocol=protocol) for source, view in views.items()]


def _by_type(spectra: tuple[LayerSpectrum, ...]) -> Block:
    columns = [Column.text("type", "Module type"), Column.whole("modules", "Modules")]
    for source in SOURCES:
        columns += [Column.share(f"{source}_{end}", f"{source.capitalize()}, {end}") for end in ("least", "median", "most")]
    columns.append(Column.whole("below_even", "Below break-even", "Modules whose features' effective rank lies below the break-even rank."))
    caption = f"{METRICS[_METRIC].label} as a share of full rank (%), by module type"
    return Table(type_table(spectra, _METRIC), columns, caption, "spectra-by-type")


def _scree(spectra: tuple[LayerSpectrum, ...], protocol: str) -> Block:
    minimum = min_relative(spectra, _METRIC)
    words = "; ".join(f"{label.lower()} {words}" for label, (words, _) in module_facts(minimum).items())
    return scree_chart(scree_curves(minimum), ", the module with the lowest-rank features", f" Here: {words}.", protocol)
