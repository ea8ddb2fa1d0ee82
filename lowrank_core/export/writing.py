"""Writing the smaller model: a folder that ``from_pretrained`` and every command of ours read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lowrank_core.compression.build import CompressedModel
from lowrank_core.compression.quantization import quantized
from lowrank_core.config import ExportConfig
from lowrank_core.export.base_model import BaseModel, base_model_of
from lowrank_core.export.card import model_card
from lowrank_core.export.code import auto_map, forget_code, write_code
from lowrank_core.export.dense import merged
from lowrank_core.export.folder import whole_folder
from lowrank_core.export.manifest import ExportManifest, listed_files, versions
from lowrank_core.export.measuring import HeldOut, loaded_like, measured
from lowrank_core.export.precision import check_finite, written_dtype
from lowrank_core.files.weights import read_object
from lowrank_core.models.handle import auto_class_of
from lowrank_core.models.hf import guard_names, mark_compressed
from lowrank_core.models.mapped import converted
from lowrank_core.models.unrolled import kept_in_memory
from lowrank_core.text import WindowSet
from lowrank_core.types import Progress

__all__ = ["export"]


def export(
    model: CompressedModel,
    folder: Path | str,
    *,
    provenance: Mapping[str, object] | None = None,
    config: ExportConfig | None = None,
    figures: Mapping[str, object] | None = None,
    test: HeldOut | None = None,
    progress: Progress | None = None,
) -> ExportManifest:
    """Write weights, tokenizer, model card and ``lowrank.json``: whole, or not at all.

    Weights are written in the dtype of the checkpoint that they came from, unless ``config`` says another, so that a folder of factors
    is never larger than the checkpoint was.

    Args:
        provenance: how the model was made; ``command`` in it is the command that makes it again.
        figures: other metrics for the card, such as ``metrics_of`` gives.
        test: text on which the folder is loaded and measured before it is in place; that is what ``verify`` measures again.
        progress: called with the batches of that measurement; if it raises, nothing is left behind.

    Raises:
        RunError: the folder is taken, or the disk is full or read-only.
        ConfigError: int8 for a model without float factors.
        ModelError: a dense merge that the architecture has no place for.
        NumericalError: a weight or an output overflows in the dtype that is written, or a loss is not finite.
    """
    config, provenance, folder = config or ExportConfig(), provenance or {}, Path(folder)
    if config.quantization != "none":
        model = quantized(model, scales=written_dtype(model.handle, config))
    base = base_model_of(model.handle.reference)
    with whole_folder(folder) as temporary:
        dtype, parameters, dropped = _write_model(model, temporary, config, provenance, None if test is None else test.windows)
        base.copy_licence(temporary)
        manifest = ExportManifest(
            made_from=model.handle.reference,
            form=config.form,
            stored_dtype=dtype,
            with_code=config.with_code,
            files=listed_files(temporary),
            written_parameters=parameters,
            guards=0 if config.form == "dense" else len(guard_names(model.handle.module)),
            auto_class=auto_class_of(model.handle.module.config),
            details={
                **provenance,
                **({"base_file": base.file} if base.file else {}),
                **_counts(model),
                **({"dropped_biases": _cost_of_biases(model, dropped, test)} if dropped else {}),
            },
            measured=None if test is None else measured(loaded_like(model.handle, temporary), test, progress=progress),
            figures=dict(figures or {}),
            versions=versions(),
        )
        _describe(temporary, manifest, model, base)
    return manifest


def _describe(folder: Path, manifest: ExportManifest, model: CompressedModel, base: BaseModel) -> None:
    manifest.write(folder)
    (folder / "README.md").write_text(model_card(manifest, model.report, base), encoding="utf-8")


def _write_model(
    model: CompressedModel, folder: Path, config: ExportConfig, provenance: Mapping[str, object], windows: WindowSet | None
) -> tuple[str, int, tuple[str, ...]]:
    """Write weights, config, tokenizer and code; return the dtype that was written, how many numbers, and layers without their bias."""
    handle, stored = model.handle, written_dtype(model.handle, config)
    dropped: tuple[str, ...] = ()
    if config.form == "dense":
        module, dropped = merged(handle.module, drop_biases=config.drop_biases, weights=handle.weights)
        module = module.to(stored) if handle.weights is None else converted(module, stored, handle.weights)
    else:
        module = converted(handle.module, stored, handle.weights)
        mark_compressed(module, provenance, settle=kept_in_memory if handle.weights is None else handle.weights.settle)
    check_finite(module, windows)
    forget_code(module.config)
    if config.with_code:
        module.config.auto_map = auto_map(module)
        write_code(type(module).__name__, folder)
    module.save_pretrained(folder, max_shard_size=config.max_shard_size)
    _save_tokenizer(handle.tokenizer, folder)
    return str(stored).removeprefix("torch."), replace(handle, module=module, layers=()).parameters, dropped


def _cost_of_biases(model: CompressedModel, dropped: Sequence[str], test: HeldOut | None) -> dict[str, object]:
    """Return how many layers lost their bias, and what the model measures with it; the folder's own measurement is without."""
    kept = None if test is None else measured(model.handle, test)
    return {"layers": len(dropped), "perplexity_with_them": None if kept is None else kept.perplexity}


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer; it was loaded without code of its checkpoint, so what is written names none."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    body = read_object(path) if path.is_file() else {}
    if body.pop("auto_map", None) is not None:
        path.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _counts(model: CompressedModel) -> dict[str, object]:
    report = model.report
    ratios = {"compression_ratio": report.compression_ratio, "model_compression_ratio": report.model_compression_ratio}
    return asdict(report) | ratios
