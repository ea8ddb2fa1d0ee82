"""Check of a folder of factors before another program loads it: hashes, forms, and the shapes in the files' headers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig

from lowrank_core.config import ModelSource
from lowrank_core.errors import ConfigError, ModelError
from lowrank_core.files.weights import weight_files
from lowrank_core.layers.channels import REDUCED_FORMS
from lowrank_core.models.foreign import foreign_config, foreign_folder
from lowrank_core.models.handle import auto_class_of
from lowrank_core.models.hf import METHOD, LowRankQuantizationConfig, LowRankQuantizer, compressed_modules
from lowrank_core.models.plain import is_plain_form

__all__ = ["check_headers", "vllm_dtype"]


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


def vllm_dtype(place: str, source: ModelSource) -> str:
    """Return the dtype in which vLLM runs a model: without a GPU in float32, as we do.

    Raises:
        ConfigError: vLLM doesn't take the model, or not by us.
    """
    if Path(place).is_file():
        raise ConfigError("vLLM reads no GGUF file by our means. Leave --engine out, or give the folder of an export.")
    if (foreign := foreign_folder(place)) is not None:
        raise ConfigError(f"vLLM reads no factors of {foreign.project}. Leave --engine out, or: lowrank export --from {place} --out NEW")
    if Path(place).is_dir():
        _check_for_vllm(place, AutoConfig.from_pretrained(place, local_files_only=True))
    if source.device != "auto":
        raise ConfigError("vLLM chooses the device by its build. Leave --device out.")
    return "float32" if source.dtype == "auto" and not torch.cuda.is_available() else source.dtype


def _check_for_vllm(place: str, config: PretrainedConfig) -> None:
    """Raise for a folder that vLLM does not read, or not by us.

    Raises:
        ConfigError: it is one.
    """
    if is_plain_form(config):
        raise ConfigError(
            f"vLLM would run the module that the plain form brings. Leave --engine out, or run: vllm serve {place} --trust-remote-code"
        )
    stated = getattr(config, "quantization_config", None)
    layers = stated.get("layers") if isinstance(stated, Mapping) else getattr(stated, "layers", None)
    if isinstance(layers, Mapping) and any(entry.get("form") in REDUCED_FORMS for entry in layers.values()):
        raise ConfigError(
            "vLLM does not read layers with fewer channels than the architecture (--modules). Leave --engine out, or take the form dense."
        )


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    result: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as archive:
            result |= {name: tuple(archive.get_slice(name).get_shape()) for name in archive.keys()}  # noqa: SIM118  (no mapping)
    return result
