"""Loading a causal language model from the bundle, a local folder or a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from lowrank_core.config import ModelSource
from lowrank_core.errors import ModelError
from lowrank_core.models import hf  # registers the low-rank format with transformers
from lowrank_core.models.handle import ModelHandle, find_layers
from lowrank_core.runs import bundled_path

__all__ = ["load_model", "resolve_reference"]

assert hf.METHOD  # the import is for its side effect: `from_pretrained` must know the format

# What transformers, tokenizers and safetensors raise for folders that are not there, not whole, or not what they claim.
_LIBRARY_ERRORS = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError)


def resolve_reference(reference: str) -> str:
    """Return the folder or hub id that ``reference`` names.

    Raises:
        ModelError: it looks like a path, and there is no such folder, or no checkpoint in it.
    """
    if reference == "demo":
        return str(bundled_path("assets", "demo-lm"))
    folder = Path(reference).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model: {folder} holds no config.json. Give a folder written by `save_pretrained`.")
        return str(folder.resolve())
    if folder.exists():
        raise ModelError(f"model: {folder} is a file. Give the folder of the checkpoint that holds it.")
    if reference.startswith((".", "/", "~")) or reference.count("/") > 1 or "\\" in reference:
        raise ModelError(f"model: there is no folder {folder}. Check the path; `demo` is the bundled model.")
    return reference


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device: {name!r} is no device. Give auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("device: this machine offers no CUDA device to torch. Use cpu or auto.")
    return device


def load_model(source: ModelSource) -> ModelHandle:
    """Load the model and tokenizer of ``source``, in eval mode, from safetensors only.

    Raises:
        ModelError: it is not there, is not a causal language model, or its files are damaged.
    """
    place = resolve_reference(source.reference)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = _device(source.device)
    _check_causal(place, source.reference)
    dtype: Any = "auto" if source.dtype == "auto" and device.type != "cpu" else getattr(torch, source.dtype, torch.float32)
    module = _load_module(place, source.reference, dtype)
    tokenizer = _load_tokenizer(place, source.reference)
    module = module.to(device).eval()  # type: ignore[arg-type]
    module.requires_grad_(False)
    _check_finite(module, source.reference)
    return ModelHandle(source.reference, module, tokenizer, find_layers(module))


def _check_causal(place: str, reference: str) -> None:
    try:
        config = AutoConfig.from_pretrained(place)
    except _LIBRARY_ERRORS as error:
        raise ModelError(_not_loaded(place, reference, error)) from error
    architectures = config.architectures or []
    known = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in ([names] if isinstance(names, str) else names)}
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (architectures and not known & set(architectures)):
        found = ", ".join(architectures) or config.model_type
        raise ModelError(
            f"model: {reference} is not a causal language model ({found}). Give a decoder-only one, such as a Llama or a GPT-2."
        )


def _load_module(place: str, reference: str, dtype: Any) -> PreTrainedModel:
    try:
        module, info = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except _LIBRARY_ERRORS as error:
        raise ModelError(_not_loaded(place, reference, error)) from error
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing or mismatched:
        names = ", ".join((missing + mismatched)[:3])
        raise ModelError(
            f"model: the weights of {reference} are incomplete or of the wrong shape (first: {names}). "
            "Save or download the checkpoint again."
        )
    return module


def _load_tokenizer(place: str, reference: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    except _LIBRARY_ERRORS as error:
        raise ModelError(
            f"model: {reference} has no tokenizer that can be read ({_first_line(error)}). Save it into the same folder."
        ) from error
    return tokenizer


def _check_finite(module: PreTrainedModel, reference: str) -> None:
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(f"model: {name} of {reference} holds NaN or Inf. The checkpoint is damaged; download or save it again.")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _not_loaded(place: str, reference: str, error: BaseException) -> str:
    if not Path(place).is_dir():
        return (
            f"model: {reference!r} is neither a local folder nor a hub id that could be fetched. "
            "Check the name and the connection; `demo` works offline."
        )
    broken = _damaged_file(Path(place))
    if broken:
        return f"model: {broken} is damaged or cut short. Save or download the checkpoint again."
    return f"model: {reference} can't be loaded: {_first_line(error)}. Give a folder written by `save_pretrained` with safetensors weights."


def _damaged_file(folder: Path) -> str | None:
    """Return the name of a file that can't be parsed, to name it in the message."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as handle:
                handle.keys()
        except (SafetensorError, OSError):
            return path.name
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return "config.json"
    return None
