"""The compressed format as transformers sees it: after ``import lowrank_core.models.hf``, ``from_pretrained`` reads it.

A compressed checkpoint is a usual one whose ``config.json`` says, under ``quantization_config``, which linear layers
were replaced, in which form and at which rank. transformers calls the quantizer below to swap them before it loads the
weights, and to check what it loaded. Nothing in the file is trusted. This module and those that it imports are also what
a folder written with its code carries along (``export.code``).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank_core.errors import ModelError
from lowrank_core.files.weights import unguarded_note
from lowrank_core.layers.base import CompressedModule, Entry
from lowrank_core.layers.forms import form_of
from lowrank_core.layers.quantized import QuantizedMatrix
from lowrank_core.models.experts import unroll_experts
from lowrank_core.models.fused import Layout, layouts_of, split_fused
from lowrank_core.models.guard import guard_name, guard_pattern, guards, unguarded
from lowrank_core.models.handle import weight_of
from lowrank_core.models.integrity import check_weights
from lowrank_core.models.unrolled import kept_in_memory, replace_module, roll_back, stands_for

__all__ = [
    "CODE",
    "METHOD",
    "LowRankQuantizationConfig",
    "LowRankQuantizer",
    "compressed_modules",
    "guard_names",
    "loading_from_disk",
    "mark_compressed",
    "register",
    "settle_compressed",
]

_LOGGER = logging.getLogger(__name__)
_FROM_DISK: ContextVar[bool] = ContextVar("from_disk", default=False)

METHOD = "lowrank"
CODE = "modeling_lowrank"
"""Module of a folder that was written with our code: it imports this one."""


class LowRankQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Layer name -> the ``spec`` of the module that replaces it, and how they came about (free text).

    ``module_names`` says that tensors are stored under the names that they have in the model: transformers stores some architectures in
    another form, joining or splitting matrices, of which the replaced ones are no longer there. ``fused`` says of projections that the
    architecture holds in one matrix, and of which a part is compressed, how its rows are divided into layers of their own.

    Raises:
        ModelError: the layers are no mapping of names to mappings, or a division is none.
    """

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        provenance: Mapping[str, Any] | None = None,
        module_names: bool = False,
        fused: Mapping[str, object] | None = None,
        **unused: Any,
    ) -> None:
        if not isinstance(layers, Mapping) or not all(isinstance(entry, Mapping) for entry in layers.values()):
            raise ModelError("model: config.json doesn't say which layers are compressed. Export the model again.")
        self.quant_method = METHOD
        self.layers = {name: dict(entry) for name, entry in layers.items()}
        self.provenance = dict(provenance) if isinstance(provenance, Mapping) else {}
        self.module_names = module_names is True
        divided = fused if isinstance(fused, Mapping) else {}
        self.fused = {name: Layout.from_mapping(name, entry).to_mapping() for name, entry in divided.items()}


class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps linear layers for compressed ones before the weights are read; what is quantised has been so already."""

    requires_calibration = True  # only checkpoints that are compressed already

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        files = [Path(file) for file in checkpoint_files or ()]
        check_weights(files)
        layers: dict[str, dict[str, Any]] = self.quantization_config.layers
        _tell_of_missing_guards(layers, files)
        unroll_experts(model, holding=layers)
        split_fused(model, {name: Layout.from_mapping(name, entry) for name, entry in self.quantization_config.fused.items()})
        shapes = {name: _dense_shape(model, name) for name in layers}
        stack_rows: Counter[str] = Counter()
        for name, (rows, _columns) in shapes.items():
            stack_rows[str(layers[name].get("source", name))] += rows
        made: dict[str, CompressedModule] = {}
        for name in sorted(layers, key=lambda name: "source" in layers[name]):  # leaders first
            entry = Entry(name, layers[name], stack_rows[str(layers[name].get("source", name))])
            with torch.device("meta"):
                made[name] = form_of(entry).from_spec(entry, shapes[name], _leader_of(entry, layers, made))
        for name, module in made.items():
            replace_module(model, name, module)
        if layers:
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), guard_pattern(layers)}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if not _FROM_DISK.get():
            settle_compressed(model)
        if not model.is_remote_code():  # what `save_pretrained` writes then comes without the code
            _forget_code(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Return what ``save_pretrained`` writes: with a guard for each compressed layer; adapters are saved without the model."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        return {**model.state_dict(), **guards(guard_names(model), model.dtype)}, {}

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel | None = None) -> list[Any]:
        """Return how names in the files become names of the model, which transformers 5.19 doesn't give."""
        return [] if self.quantization_config.module_names else weight_conversions

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True


def mark_compressed(model: PreTrainedModel, provenance: Mapping[str, Any], *, settle: Callable[[nn.Module], None] = kept_in_memory) -> None:
    """Write into the model's config which of its layers are compressed, and how, so that ``save_pretrained`` keeps it.

    A mixture whose experts are all dense, or a fused projection whose parts are, becomes the architecture's own module again; where one
    is compressed, all of its layers are stored.

    Args:
        settle: as of ``roll_back``.

    Raises:
        ModelError: a layer belongs to a stack whose leader is not part of the model.
    """
    roll_back(model, keep=lambda unrolled: not unrolled.dense, settle=settle)
    names = {child: name for name, child in model.named_modules()}
    layers = {name: {**child.spec(names), **_guard_entry(model, name)} for name, child in compressed_modules(model)}
    converted = any(isinstance(entry, WeightConverter) for entry in get_model_conversion_mapping(model, add_legacy=False))
    fused = {name: layout.to_mapping() for name, layout in layouts_of(model).items()}
    config = LowRankQuantizationConfig(layers, provenance, module_names=converted, fused=fused)
    model.config.quantization_config = config
    if converted:
        model._weight_conversions = []
    model.hf_quantizer = LowRankQuantizer(config, pre_quantized=True)


@contextmanager
def loading_from_disk() -> Iterator[None]:
    """Let ``from_pretrained`` leave compressed layers on disk; call ``settle_compressed`` once their weights are there."""
    token = _FROM_DISK.set(True)
    try:
        yield
    finally:
        _FROM_DISK.reset(token)


def settle_compressed(model: PreTrainedModel) -> None:
    """Check the compressed layers of a model whose weights are loaded.

    Raises:
        ModelError: a layer was offloaded, its stack lies on several devices, or its indices are none.
    """
    for name, module in compressed_modules(model):
        _check_place(name, module)
        module.settle(name)
        for _part, factor in module.stored_factors():
            if isinstance(factor, QuantizedMatrix):
                factor.scales = factor.scales.to(model.dtype)  # those of int4 come in float16, and are exact in any dtype


def compressed_modules(model: nn.Module) -> Iterator[tuple[str, CompressedModule]]:
    """Yield dotted path and module of each compressed layer."""
    for name, child in model.named_modules():
        if isinstance(child, CompressedModule):
            yield name, child


def guard_names(model: nn.Module) -> set[str]:
    """Return the names of the empty tensors that guard the compressed layers; layers that replace parts of one parameter share one."""
    return {guard_name(name, _guard_entry(model, name)) for name, _ in compressed_modules(model)}


def _guard_entry(model: nn.Module, layer: str) -> dict[str, str]:
    """Return what ``config.json`` says of the parameter that a layer of an expert or a fused projection replaces; nothing for others."""
    guarded = stands_for(model, layer)
    return {} if guarded is None else {"guard": guarded}


def _tell_of_missing_guards(layers: Mapping[str, Mapping[str, object]], files: Sequence[Path]) -> None:
    """Warn of a folder that loads with random weights, and without an error, where nobody imported us."""
    if files and unguarded(layers, files):
        _LOGGER.warning(unguarded_note(files[0].parent))


def _forget_code(model: PreTrainedModel) -> None:
    named = getattr(model.config, "auto_map", None) or {}
    if any(str(value).split("--")[-1].startswith(f"{CODE}.") for value in named.values()):
        del model.config.auto_map


def _check_place(name: str, module: CompressedModule) -> None:
    """Refuse what ``device_map`` may have done to a layer: a follower reads its leader's factor without its hooks.

    Raises:
        ModelError: the layer was offloaded, or its stack lies on several devices.
    """
    leader = getattr(module, "leader", module)
    places = {tensor.device for part in (module, leader) for tensor in part.state_dict().values()}
    if len(places) > 1 or any(place.type == "meta" for place in places):
        raise ModelError(
            f"model: device_map offloads the compressed layer {name!r}, or puts its stack on several devices. "
            'Give a device_map that keeps the model on one device, such as "cuda:0" or "cpu".'
        )


def _dense_shape(model: nn.Module, name: str) -> tuple[int, int]:
    """Return (d_out, d_in) of the linear layer that the architecture has at ``name``."""
    try:
        old = model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"model: config.json names the compressed layer {name!r}, which this architecture has not.") from error
    if not isinstance(old, nn.Linear | Conv1D):
        raise ModelError(f"model: config.json names the compressed layer {name!r}, which is no linear layer of this architecture.")
    d_out, d_in = weight_of(old).shape
    return d_out, d_in


def _leader_of(entry: Entry, layers: Mapping[str, Mapping[str, Any]], made: Mapping[str, CompressedModule]) -> CompressedModule | None:
    source = entry.text("source")
    if source is None:
        return None
    if source not in layers:
        entry.refuse("source", f"{source!r} is not compressed")
    if "source" in layers[source]:
        entry.refuse("source", f"{source!r} has a source itself")
    return made[source]


def register() -> None:
    """Tell transformers of the format. A copy that came along with a folder leaves it to the package where that is imported."""
    known = AUTO_QUANTIZATION_CONFIG_MAPPING.get(METHOD)
    if __name__.startswith("lowrank_core.") or known is None or not known.__module__.startswith("lowrank_core."):
        for registry in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
            registry.pop(METHOD, None)  # of another folder's copy: transformers refuses a name twice
        register_quantization_config(METHOD)(LowRankQuantizationConfig)
        register_quantizer(METHOD)(LowRankQuantizer)


register()
