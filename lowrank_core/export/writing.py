"""Writing the smaller model: a folder that ``from_pretrained`` and every command of ours read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lowrank_core.compression.build import CompressedModel
from lowrank_core.compression.quantization import Moments, grids_of, quantized
from lowrank_core.config import ExportConfig
from lowrank_core.errors import ConfigError
from lowrank_core.export.base_model import BaseModel, base_model_of
from lowrank_core.export.card import model_card
from lowrank_core.export.code import auto_map, forget_code, write_code
from lowrank_core.export.dense import merged
from lowrank_core.export.folder import whole_folder
from lowrank_core.export.manifest import ExportManifest, listed_files, versions
from lowrank_core.export.measuring import HeldOut, loaded_like, measured
from lowrank_core.export.plain import plainly, write_plain_code
from lowrank_core.export.precision import check_finite, written_dtype
from lowrank_core.files.weights import read_object
from lowrank_core.layers.stacked import StackedLinear
from lowrank_core.models.handle import auto_class_of
from lowrank_core.models.hf import compressed_modules, guard_names, mark_compressed
from lowrank_core.models.mapped import converted
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
    moments: Moments | None = None,
    progress: Progress | None = None,
) -> ExportManifest:
    """Write weights, tokenizer, model card and ``lowrank.json``: whole, or not at all.

    Weights are written in the dtype of the checkpoint that they came from, unless ``config`` says another, so that a folder of factors
    is never larger than the checkpoint was.

    Args:
        provenance: how the model was made; ``command`` in it is the command that makes it again.
        figures: other metrics for the card, such as ``metrics_of`` gives.
        test: text on which the folder is loaded and measured before it is in place; that is what ``verify`` measures again.
        moments: of the dense model's inputs, for rounding by GPTQ (``Pipeline.input_moment``).
        progress: called with the batches of that measurement; if it raises, nothing is left behind.

    Raises:
        RunError: the folder is taken, or the disk is full or read-only.
        ConfigError: there is nothing to quantise, or it is quantised already; or GPTQ without the moments.
        ModelError: the architecture has no place for what a dense or plain form holds.
        NumericalError: a weight or an output overflows in the dtype that is written, or a loss is not finite.
    """
    config, provenance, folder = config or ExportConfig(), provenance or {}, Path(folder)
    if config.quantizes:
        model = _rounded(model, config, moments)
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
            guards=_guards(model, config.form),
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


def _rounded(model: CompressedModel, config: ExportConfig, moments: Moments | None) -> CompressedModel:
    """Return the model on the grids of ``config``.

    Raises:
        ConfigError: as ``export``.
    """
    grids, gptq = grids_of(model.handle, config.quantization, config.dense_quantization), config.rounding == "gptq"
    if gptq and moments is None:
        raise ConfigError(
            "GPTQ needs the statistics of the inputs, which are not here. Write it by compress or export, or round to nearest."
        )
    return quantized(model, grids, scales=written_dtype(model.handle, config), moments=moments if gptq else None)


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
        module, dropped = merged(handle.module, drop_biases=config.drop_biases, settle=handle.settle)
        module = converted(module, stored, handle.weights)
    elif config.form == "plain":
        module = converted(plainly(handle.module, settle=handle.settle), stored, handle.weights)
    else:
        module = converted(handle.module, stored, handle.weights)
        mark_compressed(module, provenance, settle=handle.settle)
    check_finite(module, windows)
    forget_code(module.config)
    if config.form == "plain":
        write_plain_code(module, folder)
    if config.with_code:
        module.config.auto_map = auto_map(module)
        write_code(type(module).__name__, folder)
    module.save_pretrained(folder, max_shard_size=config.max_shard_size)
    _save_tokenizer(handle.tokenizer, folder)
    return str(stored).removeprefix("torch."), replace(handle, module=module, layers=()).parameters, dropped


def _guards(model: CompressedModel, form: str) -> int:
    if form == "plain":
        return sum(isinstance(child, StackedLinear) for _, child in compressed_modules(model.handle.module))
    return 0 if form == "dense" else len(guard_names(model.handle.module))


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
