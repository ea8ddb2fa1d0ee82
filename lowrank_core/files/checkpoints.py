"""Recognition of folders that hold something else than the weights of a plain language model. Torch-free, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from lowrank_core.errors import ModelError
from lowrank_core.files.gguf import is_gguf, read_gguf
from lowrank_core.files.weights import read_object

__all__ = ["check_folder_kind", "check_reference", "check_unquantized", "dequantized_method", "dequantized_note", "quantization_of"]

_OWN_METHOD = "lowrank"
_DEQUANTIZED_SINCE = (5, 24)
"""Version of transformers that dequantises fp8 and mxfp4, and saves the result under the names of the plain model; 5.13 garbles them."""
_BITS = ("bits", "num_bits", "nbits", "w_bit", "weight_bits", "bits_per_weight")
_BITS_BY_WORD = {"fp4": 4, "nf4": 4, "mxfp4": 4, "nvfp4": 4, "int4": 4, "uint4": 4, "int8": 8, "fp8": 8, "float8": 8, "e4m3": 8, "int2": 2}
_LEGACY = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files of AutoGPTQ, AutoAWQ and NVIDIA's ModelOpt, next to a config.json that need not say it."""


def check_reference(reference: str) -> None:
    """Raise where a local folder or GGUF file is recognised as no plain language model; before torch is imported.

    Raises:
        ModelError: as ``check_folder_kind`` and ``read_gguf``; begins with what it is about.
    """
    place = Path(reference).expanduser()
    try:
        if place.is_dir():
            check_folder_kind(place)
        elif place.is_file() and is_gguf(place):
            read_gguf(place)
    except ModelError as error:
        raise ModelError(f"model: {error}") from error


def check_folder_kind(folder: Path) -> None:
    """Raise where ``folder`` is recognised as something else than a checkpoint of a plain language model.

    Raises:
        ModelError: an adapter, a pipeline, GGUF files, original weights of a vendor, a quantised model, or no model at all.
    """
    present = {path.name for path in folder.iterdir()}
    if "adapter_config.json" in present:
        raise ModelError(
            f"{folder} holds a PEFT adapter (adapter_config.json){_base_of(folder)}, which is loaded on top of a model, or not, by what is "
            "installed. Merge it (`merge_and_unload`), save the merged model, and give that folder."
        )
    if "model_index.json" in present:
        raise ModelError(f"{folder} holds a diffusers pipeline (model_index.json), no language model. Give a causal language model.")
    if "config.json" not in present:
        raise ModelError(f"{folder} holds no config.json. {_instead(folder, present)}")
    for name in (name for name in _LEGACY if name in present):
        _refuse(str(folder), quantization_of({"quantization_config": {"quant_method": _method_of(name), **_readable(folder / name)}}))
    check_unquantized(_readable(folder / "config.json"), str(folder))


def check_unquantized(config: Mapping[str, object], name: str) -> None:
    """Raise if the config of the model ``name`` is that of a quantised one.

    Raises:
        ModelError: it is; with the method, and the bits where they are said.
    """
    words = quantization_of(config)
    if words and not dequantized_method(config):
        _refuse(name, words)


def dequantized_method(config: Mapping[str, object]) -> str:
    """Return the method of a quantised model that transformers dequantises when it reads it; empty for all others."""
    stated = config.get("quantization_config")
    if not isinstance(stated, dict) or tuple(map(int, version("transformers").split(".")[:2])) < _DEQUANTIZED_SINCE:
        return ""
    method = str(stated.get("quant_method"))
    blocks = isinstance(stated.get("weight_block_size"), list)  # others of the same name have one scale a tensor, in another place
    return method if method == "mxfp4" or (method == "fp8" and blocks) else ""


def dequantized_note(config: Mapping[str, object], name: str) -> str:
    """Return what a user should know of a model that is dequantised when it is read, in a line; empty for a plain one."""
    if not dequantized_method(config):
        return ""
    return (
        f"{name} is quantised ({quantization_of(config)}): dequantised when it is read; what is counted and written is the dequantised "
        "model, larger than these files."
    )


def _refuse(name: str, words: str) -> None:
    raise ModelError(
        f"{name} is quantised ({words}): its weights are no plain matrices. Give the original model that it was quantised from, "
        "in bfloat16 or float16."
    )


def quantization_of(config: Mapping[str, object]) -> str:
    """Return method and bits, such as ``awq, 4 bits``; empty for a plain model, and for our own format."""
    for part in (config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            stated = part.get(key)
            if isinstance(stated, dict) and stated.get("quant_method") != _OWN_METHOD:
                return _words(stated, "compressed-tensors" if key == "compression_config" else "unknown method")
    return ""


def _words(stated: Mapping[str, object], otherwise: str) -> str:
    loaded = {4: stated.get("load_in_4bit") or stated.get("_load_in_4bit"), 8: stated.get("load_in_8bit") or stated.get("_load_in_8bit")}
    method = str(stated.get("quant_method") or ("bitsandbytes" if any(loaded.values()) else otherwise))
    bits = next((count for count, flag in loaded.items() if flag), None) or _bits(stated) or _BITS_BY_WORD.get(method.lower())
    return f"{method}, {bits} bits" if bits else method


def _bits(stated: Mapping[str, object]) -> int | None:
    """Return the first number of bits in a quantisation config, however deep; compressed-tensors and hqq nest it."""
    entries = list(_entries(stated))
    numbers = (value for key, value in entries if key in _BITS and isinstance(value, int | float) and not isinstance(value, bool))
    words = (str(value).lower() for key, value in entries if key in ("weights", "quant_type", "quant_algo", "quantization_type", "fmt"))
    named = (bits for word in words for name, bits in _BITS_BY_WORD.items() if name in word)
    return next((int(value) for value in numbers), None) or next(named, None)


def _entries(value: object) -> Iterator[tuple[str, object]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield str(key), child
        yield from _entries(child)


def _method_of(file: str) -> str:
    return {"quantize_config.json": "gptq", "quant_config.json": "awq"}.get(file, "modelopt")


def _readable(path: Path) -> Mapping[str, object]:
    """Return a JSON object; empty where it can't be read: the reader that needs it says so."""
    try:
        return read_object(path)
    except ModelError:
        return {}


def _base_of(folder: Path) -> str:
    named = _readable(folder / "adapter_config.json").get("base_model_name_or_path")
    return f" of {named}" if isinstance(named, str) and named else ""


def _instead(folder: Path, present: set[str]) -> str:
    """Return what to give instead of a folder without config.json."""
    models = sorted(name for name in present if is_gguf(name))
    if models:
        others = f" and {len(models) - 1} more" if len(models) > 1 else ""
        return f"It holds GGUF files ({models[0]}{others}): give one by its name, --model {folder / models[0]}."
    if "params.json" in present:
        return "It holds the vendor's original weights (params.json): give the model as transformers saves it."
    inside = sorted(path.parent for pattern in ("*/config.json", "snapshots/*/config.json") for path in folder.glob(pattern))
    return f"The model may be in {inside[0]}: give that folder." if inside else "Give a folder written by `save_pretrained`."
