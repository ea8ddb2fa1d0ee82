"""A checkpoint whose blocks ``from_pretrained`` leaves on disk, so that a model larger than memory can be loaded."""

from __future__ import annotations

from collections.abc import Mapping

from accelerate.hooks import remove_hook_from_module
from accelerate.utils.offload import OffloadedWeightsLoader, PrefixedDataset
from safetensors import safe_open
from torch import Tensor, nn

from lowrank_core.models.mapped import MappedParameter, WeightMap

__all__ = ["device_map_of", "mapped_from_disk"]


def device_map_of(skeleton: nn.Module, blocks: str) -> dict[str, str]:
    """Return the ``device_map`` of ``from_pretrained`` that leaves matrices on disk, and all of the blocks at the dotted path ``blocks``.

    accelerate refuses a map with nothing in memory.
    """
    result: dict[str, str] = {}

    def assign(module: nn.Module, path: str) -> None:
        for name, _ in module.named_parameters(path, recurse=False):
            result[name] = "cpu"
        for name, child in module.named_children():
            place = f"{path}.{name}" if path else name
            if place == blocks:
                result.update({f"{place}.{index}": "disk" for index, _ in child.named_children()})
            elif blocks.startswith(f"{place}."):
                assign(child, place)
            else:
                result[place] = "disk" if any(parameter.ndim > 1 for parameter in child.parameters()) else "cpu"

    assign(skeleton, "")
    return result if "cpu" in result.values() else {**result, next(iter(result)): "cpu"}


def mapped_from_disk(model: nn.Module, weights: WeightMap) -> None:
    """Map all weights of a model whose blocks ``from_pretrained`` has left on disk, in place."""
    index = _offloaded(model)
    remove_hook_from_module(model, recurse=True)  # type: ignore[no-untyped-call]
    model.__dict__.pop("hf_device_map", None)
    settled: dict[int, MappedParameter] = {}
    for path, part in model.named_modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and parameter.device.type == "meta":
                if id(parameter) not in settled:
                    settled[id(parameter)] = weights.held(_values(index[f"{path}.{name}"]).to(parameter.dtype))
                weights.put(part, name, settled[id(parameter)])
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and buffer.device.type == "meta":
                part._buffers[name] = _values(index[f"{path}.{name}"]).to(buffer.dtype, copy=True)


def _offloaded(model: nn.Module) -> Mapping[str, Mapping[str, str]]:
    """Return name -> file and name in it of the weights that accelerate would read whenever they are needed."""
    for part in model.modules():
        read = getattr(getattr(part, "_hf_hook", None), "weights_map", None)
        if isinstance(read, PrefixedDataset):
            assert isinstance(read.dataset, OffloadedWeightsLoader)
            return dict(read.dataset.index)
    return {}


def _values(place: Mapping[str, str]) -> Tensor:
    with safe_open(place["safetensors_file"], framework="pt") as file:
        values: Tensor = file.get_tensor(place["weight_name"])
    return values
