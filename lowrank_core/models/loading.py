"""Loading a causal language model from the bundle, a local folder or a hub."""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from lowrank_core.config import WORKING_SHARE, ModelSource, looks_like_path
from lowrank_core.errors import ModelError
from lowrank_core.files.checkpoints import check_reference, check_unquantized, dequantized_method, dequantized_note
from lowrank_core.files.gguf import GgufFile, is_gguf, read_gguf
from lowrank_core.files.weights import WeightFiles, read_object, weight_files
from lowrank_core.models import hf  # registers the low-rank format with transformers
from lowrank_core.models.experts import unroll_experts
from lowrank_core.models.foreign import foreign_config, foreign_folder, key_mapping
from lowrank_core.models.from_disk import device_map_of, mapped_from_disk
from lowrank_core.models.gguf import become_plain, check_complete, check_readable, dequantizing, gguf_arguments
from lowrank_core.models.handle import (
    LayerSpec,
    ModelHandle,
    auto_class_of,
    blocks_of,
    find_layers,
    positions_of,
    random_tokens,
    text_config_of,
)
from lowrank_core.models.integrity import check_weights
from lowrank_core.models.mapped import MappedParameter, WeightMap, all_finite
from lowrank_core.models.plain import become_factored, is_plain_form, plain_class
from lowrank_core.models.projections import split_projections
from lowrank_core.models.unrolled import kept_in_memory
from lowrank_core.runs import bundled_path, home

__all__ = ["load_model", "max_context", "notes_of", "resolve_reference"]

_LOGGER = logging.getLogger(__name__)
_CAUSAL_CLASSES = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in ([names] if isinstance(names, str) else names)}
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

assert hf.METHOD  # the import is for its side effect: `from_pretrained` must know the format

# What transformers, tokenizers and safetensors raise for folders that are not there, not whole, or not what they claim.
_LIBRARY_ERRORS = (ImportError, OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError)


def resolve_reference(reference: str) -> str:
    """Return the folder, GGUF file or hub id that ``reference`` names.

    Raises:
        ModelError: it looks like a path, and there is nothing there, or it is recognised as no plain language model.
    """
    if reference == "demo":
        return str(bundled_path("assets", "demo-lm"))
    place = Path(reference).expanduser()
    if place.is_dir():
        check_reference(reference)
        return str(place.resolve())
    if place.exists() and not is_gguf(place):
        raise ModelError(f"model: {place} is a file. Give the folder of the checkpoint that holds it.")
    if place.exists():
        return str(place.absolute())  # a link of the hub's cache keeps its name
    if looks_like_path(reference) or is_gguf(reference):
        kind = "GGUF file" if is_gguf(reference) else "folder"
        raise ModelError(f"model: there is no {kind} {place}. Check the path; `demo` is the bundled model.")
    return reference


@contextmanager
def _told() -> Iterator[None]:
    """Begin what is raised with what it is about."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"model: {error}") from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device: {name!r} is no device. Give auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device: {name!r} is not supported. Give auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device: torch sees {torch.cuda.device_count()} CUDA devices on this machine. Use cpu or auto.")
    return device


def load_model(source: ModelSource | str, *, whole: Collection[str] = (), weights: WeightMap | None = None) -> ModelHandle:
    """Load the model and tokenizer of ``source``, in eval mode, from safetensors or a GGUF file only.

    Args:
        whole: names of layers that stay one matrix though they hold several projections, as an earlier version left them all.
        weights: where they are mapped from; without it, they are mapped if they leave too little of the memory of ``source``.

    Raises:
        ModelError: it is not there, is not a causal language model, or its files are damaged.
    """
    source = ModelSource(source) if isinstance(source, str) else source
    place = resolve_reference(source.reference)
    device = _device(source.device)
    config = _checked_config(place, source.reference)
    _check_files(place, config)
    dtype: Any = getattr(torch, source.dtype, torch.float32)
    if source.dtype == "auto" and device.type != "cpu":
        dtype = "auto" if _file_of(place) is None else _stored_dtype(place, config)
    if weights is None and device.type == "cpu" and _too_large(place, dtype, source.memory_bytes):
        weights = WeightMap(home() / "weights")
        _LOGGER.warning(
            "model: its weights stay on disk and are read block by block, which is slower: memory has too little room (--memory)"
        )
    module = _load_module(place, source.reference, config, dtype, weights)
    tokenizer = _load_tokenizer(place, source.reference, config)
    module = module.to(device).eval()  # type: ignore[arg-type]
    module.requires_grad_(False)
    _check_finite(module, source.reference)
    settle = kept_in_memory if weights is None else weights.settle
    unroll_experts(module, settle=settle)
    dtype = _stored_dtype(place, config) or module.dtype
    layers, left = _layers(module, source.reference, whole, settle)
    return ModelHandle(source.reference, module, tokenizer, layers, dtype, left, weights)


def _too_large(place: str, dtype: Any, memory: int | None) -> bool:
    """Whether the weights of safetensors files, as they are held, leave too little of the memory to work with them."""
    folder = _folder_of(place)
    if folder is None:
        return False  # a GGUF file is read whole, and of what is fetched first nothing is known yet
    try:
        held = sum(count * dtype.itemsize for count in _counts(folder).values())
    except (SafetensorError, OSError):
        return False  # loading names the file that is damaged
    return bool(held * WORKING_SHARE > (psutil.virtual_memory().available if memory is None else memory))


def _layers(
    module: PreTrainedModel, reference: str, whole: Collection[str], settle: Callable[[nn.Module], None]
) -> tuple[tuple[LayerSpec, ...], tuple[str, ...]]:
    """Return the compressible layers of a model that runs on text, and is causal; and sentences on layers that stay fused.

    Raises:
        ModelError: it is not.
    """
    try:
        leak = _leak(module)
        if leak > math.sqrt(torch.finfo(module.dtype).eps):
            raise ModelError(
                f"model: {reference} ({type(module).__name__}) is not causal: its logits depend on later tokens. "
                "Give a decoder-only model, such as a Llama or a GPT-2."
            )
        if any(isinstance(parameter, MappedParameter) and parameter.changed for parameter in module.parameters()):
            raise ModelError(
                f"model: {reference} ({type(module).__name__}) changes its weights while it runs, so that they can't stay on disk. "
                "Use a machine with more memory."
            )
        left = split_projections(module, whole=whole, settle=settle)
        return find_layers(module), tuple(map(str, left))
    except ModelError:
        raise
    except Exception as error:  # of the model's own code
        raise ModelError(
            f"model: {reference} ({type(module).__name__}) can't be run on text alone: {_first_line(error)}. "
            "Check its config.json, or give a decoder-only model."
        ) from error


@torch.no_grad()
def _leak(module: PreTrainedModel) -> float:
    """Return how far another last token moves the logits before it, in their standard deviations."""
    ids = random_tokens(module, 1).repeat(2, 1)
    ids[1, -1] = (ids[1, -1] + 1) % int(ids.max())
    logits = module(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return float((logits[0] - logits[1]).square().mean().sqrt() / logits.std())


def notes_of(reference: str) -> tuple[str, ...]:
    """Return what a user should know of the files of a model: which of several sets of weights is loaded, how a GGUF file is quantised.

    Raises:
        ModelError: as ``load_model``.
    """
    place = resolve_reference(reference)
    file = _file_of(place)
    if file is not None:
        return file.notes
    if not Path(place).is_dir():
        return ()
    config = read_object(Path(place) / "config.json")
    return tuple(filter(None, (_files_of(Path(place)).note, dequantized_note(config, place))))


def _file_of(place: str) -> GgufFile | None:
    """Return the header of a GGUF file; None for a folder or a hub id."""
    if not Path(place).is_file():
        return None
    with _told():
        return read_gguf(Path(place))


def _files_of(folder: Path) -> WeightFiles:
    with _told():
        return weight_files(folder)


def _check_files(place: str, config: PretrainedConfig) -> None:
    """Check what is about to be read, and tell of what is not."""
    for note in notes_of(place):
        _LOGGER.warning(f"model: {note}")
    if Path(place).is_dir() and getattr(config, "quantization_config", None) is None:  # else the quantizer looks: one reading is enough
        check_weights([Path(place) / name for name in _files_of(Path(place)).loaded])


def _stored_dtype(place: str, config: PretrainedConfig) -> torch.dtype | None:
    """Return the dtype that most floats of the files have; what config.json says of it need not be so. None where nothing says it."""
    file = _file_of(place)
    if file is not None:
        stated: torch.dtype = getattr(torch, file.stored_dtype)
        return stated
    folder = _folder_of(place)
    if folder is None:
        return config.dtype if isinstance(config.dtype, torch.dtype) else None
    counts = _counts(folder)
    return max(counts, key=lambda dtype: counts[dtype]) if counts else None


def _folder_of(place: str) -> Path | None:
    """Return the folder of a checkpoint's files, which the hub's cache may hold; None of a GGUF file, or of what is not there yet."""
    cached = None if Path(place).exists() else try_to_load_from_cache(place, "config.json")
    folder = Path(cached).parent if isinstance(cached, str) else Path(place)
    return folder if folder.is_dir() else None


def _counts(folder: Path) -> Counter[torch.dtype]:
    """Return how many floats of each dtype the safetensors files of a checkpoint hold."""
    counts: Counter[torch.dtype] = Counter()
    for name in _files_of(folder).loaded:
        with safe_open(folder / name, framework="pt") as archive:
            for key in archive.keys():  # noqa: SIM118  (the archive is no mapping)
                view = archive.get_slice(key)
                if key.endswith(".scales"):  # of int4, in float16 whatever the others are
                    continue
                counts[_FLOATS.get(view.get_dtype(), torch.int8)] += prod(view.get_shape())
    del counts[torch.int8]
    return counts


def _check_reachable(repository: str) -> None:
    """Ask the hub once, where nothing is in its cache: the library itself would retry for half a minute offline."""
    try:
        if try_to_load_from_cache(repository, "config.json") is None:
            get_hf_file_metadata(hf_hub_url(repository, "config.json"))
    except Exception as error:  # the hub's, the validator's and the connection's errors have no common base
        raise ModelError(
            f"model: {repository!r} is neither a local folder nor a hub id that could be fetched ({type(error).__name__}). "
            "Check the name and the connection; `demo` works offline."
        ) from error


def _arguments(place: str) -> AbstractContextManager[tuple[str, dict[str, Any]]]:
    """Give what every ``from_pretrained`` gets: no code of the checkpoint is run, nothing is fetched for what is local."""
    if Path(place).is_file():
        return gguf_arguments(Path(place))
    return nullcontext((place, {"trust_remote_code": False, "local_files_only": Path(place).is_dir()}))


def max_context(reference: str) -> int | None:
    """Return the positions that a model was made for, from its config alone; None if it does not say.

    Raises:
        ModelError: as ``load_model``.
    """
    place = resolve_reference(reference)
    file = _file_of(place)
    return positions_of(_checked_config(place, reference)) if file is None else file.number("context_length") or None


def _checked_config(place: str, reference: str) -> PretrainedConfig:
    """Return the config, if it is that of a causal language model; from here on the libraries are quiet."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it would tell of each retry
    file = _file_of(place)
    if file is not None:
        check_readable(file)
    elif not Path(place).is_dir():
        _check_reachable(place)
    foreign = foreign_folder(place)
    try:
        with _arguments(place) as (source, options):
            config: PretrainedConfig = AutoConfig.from_pretrained(source, **options) if foreign is None else foreign_config(foreign)
    except _LIBRARY_ERRORS as error:
        raise ModelError(_not_loaded(place, reference, error)) from error
    with _told():
        check_unquantized(config.to_dict(), reference)
    refusal = _refusal(config)
    if refusal:
        raise ModelError(f"model: {reference} {refusal}")
    return config


def _refusal(config: PretrainedConfig) -> str:
    """Return what a model is that is no decoder, and what to give instead; empty for one that transformers loads as a causal one.

    Encoders and encoder-decoders are loaded by transformers, too, as something that they were not trained to be.
    """
    architectures = config.architectures or []
    name = ", ".join(architectures) or config.model_type
    if any(entry in _CAUSAL_CLASSES for entry in architectures):
        return ""
    if any(re.search(r"Classification$|QuestionAnswering$|MultipleChoice$", entry) for entry in architectures):
        return f"is not a causal language model ({name}). Give one with a language head, such as the checkpoint that it was trained from."
    if config.is_encoder_decoder:
        return f"is not a causal language model ({name}): an encoder-decoder. Give a decoder-only one, such as a Llama or a GPT-2."
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        return f"is not a causal language model ({name}): an encoder. Give a decoder-only one, such as a Llama or a GPT-2."
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return ""
    text = text_config_of(config)
    if text is config:
        return f"is not a causal language model ({name}). Give a decoder-only one, such as a Llama or a GPT-2."
    if config.model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        return ""
    return f"is not a causal language model ({name}). Give its text part ({text.model_type}) as a checkpoint of its own."


def _load_module(place: str, reference: str, config: PretrainedConfig, dtype: Any, weights: WeightMap | None) -> PreTrainedModel:
    file = _file_of(place)
    method = "gguf" if file is not None else dequantized_method(config.to_dict())
    foreign = foreign_folder(place)
    try:
        loader = plain_class(config) if is_plain_form(config) else getattr(transformers, auto_class_of(config))
        with _arguments(place) as (source, options), _from_disk(loader, config, weights) as left_on_disk:
            module, info = loader.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                key_mapping=None if foreign is None else key_mapping(foreign),
                **options,
                **left_on_disk,
                **dequantizing(method),
            )
            if weights is not None:
                mapped_from_disk(module, weights)
                hf.settle_compressed(module)
    except _LIBRARY_ERRORS as error:
        raise ModelError(_not_loaded(place, reference, error)) from error
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(key[0]) for key in info.get("mismatched_keys", ()))
    if missing or mismatched:
        names = ", ".join((missing + mismatched)[:3])
        raise ModelError(
            f"model: the weights of {reference} are incomplete or of the wrong shape (first: {names}). "
            "Save or download the checkpoint again."
        )
    if file is not None:
        check_complete(file, module)
    if method:
        become_plain(module)
    if is_plain_form(config):
        become_factored(module)
        vars(module).pop("_weight_conversions", None)  # else what is saved again would have the names of the folder
    if weights is not None:
        weights.settle(module)
    return module


@contextmanager
def _from_disk(loader: Any, config: PretrainedConfig, weights: WeightMap | None) -> Iterator[dict[str, Any]]:
    """Give the arguments of ``from_pretrained`` that leave the blocks on disk, in files that are there as long as it reads."""
    if weights is None:
        yield {}
        return
    with torch.device("meta"):
        skeleton = (loader._from_config if is_plain_form(config) else loader.from_config)(config)
    with tempfile.TemporaryDirectory(dir=weights.folder) as folder, hf.loading_from_disk():
        yield {"device_map": device_map_of(skeleton, blocks_of(skeleton)[0]), "offload_folder": folder, "offload_buffers": True}


def _load_tokenizer(place: str, reference: str, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    own = {} if foreign_folder(place) is None else {"config": config}  # the folder's names a class of its own
    try:
        with _arguments(place) as (source, options):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **own, **options)
    except _LIBRARY_ERRORS as error:
        raise ModelError(
            f"model: {reference} has no tokenizer that can be read ({_first_line(error)}). Save it into the same folder."
        ) from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # transformers makes an empty one where the files are missing
        raise ModelError(f"model: {reference} has no tokenizer. Save it into the same folder.")
    return tokenizer


def _check_finite(module: PreTrainedModel, reference: str) -> None:
    for name, parameter in module.named_parameters():
        if not all_finite(parameter):
            raise ModelError(f"model: {name} of {reference} holds NaN or Inf. The checkpoint is damaged; download or save it again.")
        if isinstance(parameter, MappedParameter):
            parameter.release()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200].strip(" .:!") or type(error).__name__


def _not_loaded(place: str, reference: str, error: BaseException) -> str:
    broken = _damaged_file(Path(place))
    if broken:
        return f"model: {broken} is damaged or cut short. Save or download the checkpoint again."
    return f"model: {reference} can't be loaded: {_first_line(error)}. Give a folder written by `save_pretrained` with safetensors weights."


def _damaged_file(folder: Path) -> str | None:
    """Return the name of a file that can't be parsed, to name it in the message."""
    try:
        loaded = weight_files(folder).loaded if folder.is_dir() else ()
    except ModelError:
        loaded = ()
    for name in loaded:
        try:
            with safe_open(folder / name, framework="pt") as handle:
                handle.keys()
        except (SafetensorError, OSError):
            return name
    config = folder / "config.json"
    try:
        return None if not config.exists() or isinstance(json.loads(config.read_text(encoding="utf-8")), dict) else config.name
    except ValueError:
        return config.name
