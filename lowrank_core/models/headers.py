"""Check of a folder of factors before another program loads it: hashes, forms, and the shapes in the files' headers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig

from lowrank_core.errors import ModelError
from lowrank_core.files.weights import weight_files
from lowrank_core.models.foreign import foreign_config, foreign_folder
from lowrank_core.models.handle import auto_class_of
from lowrank_core.models.hf import METHOD, LowRankQuantizationConfig, LowRankQuantizer, compressed_modules

__all__ = ["check_headers"]


def check_headers(folder: Path) -> None:
    """Check a folder in our format, or another project's, without reading a weight into a model; others are passed over.

    Raises:
        ModelError: a file is damaged, a form or rank is not one that this version knows, or config.json and the files differ.
    """
    foreign = foreign_folder(str(folder))
    if foreign is not None:
        foreign_config(foreign)
        return
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    stated = getattr(config, "quantization_config", None)
    body: dict[str, Any] = {} if stated is None else dict(stated) if isinstance(stated, Mapping) else dict(vars(stated))
    if body.get("quant_method") != METHOD:
        return
    files = [folder / name for name in weight_files(folder).loaded]
    with torch.device("meta"):
        model = getattr(transformers, auto_class_of(config)).from_config(config)
    quantizer = LowRankQuantizer(LowRankQuantizationConfig(**body), pre_quantized=True)
    quantizer._process_model_before_weight_loading(model, [str(file) for file in files])
    stored = _shapes(files)
    for name, module in compressed_modules(model):
        for part, tensor in module.state_dict().items():
            shape = stored.get(f"{name}.{part}", tuple(tensor.shape))  # transformers stores some architectures under other names
            if shape != tuple(tensor.shape):
                raise ModelError(
                    f"model: {name}.{part} has the shape {shape}, and config.json says {tuple(tensor.shape)}. Export the model again."
                )


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    result: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as archive:
            result |= {name: tuple(archive.get_slice(name).get_shape()) for name in archive.keys()}  # noqa: SIM118  (no mapping)
    return result
