"""Models in GGUF files, by transformers' own reader: dequantised while they are loaded, plain models afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import transformers
from transformers import PreTrainedModel, modeling_gguf_pytorch_utils

from lowrank_core.errors import ModelError
from lowrank_core.files.gguf import GgufFile

__all__ = ["become_plain", "check_complete", "check_readable", "dequantizing", "gguf_arguments"]

# Its bar is tqdm's, which the library's own switch does not reach: with None it is drawn on terminals alone.
modeling_gguf_pytorch_utils.tqdm = partial(modeling_gguf_pytorch_utils.tqdm, disable=None)

_QUANTIZER = ("hf_quantizer", "quantization_method", "is_quantized")
_OF_THE_FILE = ("quantization_config", "_model_name_or_path")  # the second: the file's general.name, which config.json would keep


@contextmanager
def gguf_arguments(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give what ``from_pretrained`` takes to read a file.

    The folder is an empty one: next to the file, transformers would take an adapter or a tokenizer of the file's folder, and weights of a
    file of the same name in the current one.
    """
    with TemporaryDirectory() as empty:
        yield empty, {"gguf_file": str(path.absolute()), "local_files_only": True, "trust_remote_code": False}


def dequantizing(method: str) -> dict[str, Any]:
    """Return what makes transformers dequantise a model of ``method``, where it could compute with the blocks on some GPUs.

    Earlier versions than 5.24 have no choice for GGUF: they dequantise. Without a method, nothing.
    """
    config = getattr(transformers, {"gguf": "GgufConfig", "fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}.get(method, ""), None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def check_readable(file: GgufFile) -> None:
    """Raise unless transformers can read the file, before it tries.

    Raises:
        ModelError: a package is missing, or the architecture or a quantisation is not supported.
    """
    name = file.path.name
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise ModelError(f"model: reading {name} needs {' and '.join(missing)}. Install: pip install 'lowrank-studio[gguf]'.")
    if _simplified(file.architecture) not in {_simplified(known) for known in _architectures()}:
        raise ModelError(
            f"model: {name} is of the architecture {file.architecture!r}, which transformers {transformers.__version__} does not read from "
            "GGUF. Give the original model as a folder or a hub id."
        )
    unread = [kind for kind in file.types if not _dequantises(kind)]
    if unread:
        raise ModelError(
            f"model: {name} holds weights as {', '.join(unread)}, which the gguf package can't dequantise. Give a file in another "
            "quantisation, such as Q8_0 or Q4_K_M, or the original model."
        )


def _architectures() -> list[str]:
    known: list[str] = list(modeling_gguf_pytorch_utils.GGUF_SUPPORTED_ARCHITECTURES)
    with suppress(ImportError):  # a second reader, which earlier versions than 5.24 lack
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

        known += GGUF_CONFIG_ARCHS
    return known


def _simplified(architecture: str) -> str:
    """Return a name without its separators: gpt-oss in files is gpt_oss in transformers, qwen2moe is qwen2_moe."""
    return re.sub(r"[^a-z0-9]", "", architecture.lower())


def _dequantises(kind: str) -> bool:
    """Return whether the gguf package turns blocks of a type into floats: it lists types that it can't."""
    import gguf

    number = getattr(gguf.GGMLQuantizationType, kind, None)
    if number is None:
        return False
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except NotImplementedError:
        return False
    return True


def check_complete(file: GgufFile, module: PreTrainedModel) -> None:
    """Raise unless every weight of the file went into the model: transformers passes over names that it has no place for.

    Raises:
        ModelError: the numbers of parameters differ.
    """
    read = sum(parameter.numel() for parameter in module.parameters())
    head = sum(tensor.elements for tensor in file.weights if tensor.name == "output.weight")
    if read not in (file.parameters, file.parameters - head):  # without the head, where transformers ties it to the embedding
        raise ModelError(
            f"model: {file.path.name} holds {file.parameters:,} parameters, and transformers reads {read:,} of {type(module).__name__} "
            "from it: some weights have no place there. Give the original model as a folder or a hub id."
        )


def become_plain(module: PreTrainedModel) -> None:
    """Forget that a model was quantised, so that it can be saved as the plain one that it is."""
    for holder, names in ((module, _QUANTIZER), (module.config, _OF_THE_FILE)):
        for name in names:
            if name in vars(holder):
                delattr(holder, name)
