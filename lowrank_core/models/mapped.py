"""Weights in files that are mapped: memory holds those that are being used, and the system may take it back at any time.

A file has no name any more once it is mapped, so that nothing is left behind however the process ends.
"""

from __future__ import annotations

import copy
import ctypes
import mmap
import tempfile
from pathlib import Path
from shutil import disk_usage
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from lowrank_core.errors import ModelError
from lowrank_core.wording import amount

__all__ = ["MappedParameter", "WeightMap", "all_finite", "converted", "release"]

M = TypeVar("M", bound=nn.Module)

_LIBRARY = ctypes.CDLL(None) if hasattr(mmap, "MADV_DONTNEED") else None

_PART = 2**22

_LEAST_BYTES = 2**16
"""Smaller parameters, such as norms and biases, stay in memory."""


class MappedParameter(nn.Parameter):
    """A parameter whose values are in a file. Copies of a model share the values, and they can't be trained.

    Attributes:
        place: address that the file is mapped to; a cast gives the parameter other values, somewhere else.
    """

    place: int

    @classmethod
    def of(cls, values: Tensor, place: int) -> Self:
        result = cls(values, requires_grad=False)
        result.place = place
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        result: Self = memo.setdefault(id(self), self.of(self.detach(), self.place))
        return result

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Raises ModelError: training would change the values."""
        if requires_grad:
            raise ModelError("weights that are mapped from disk can't be trained. Use a machine with more memory, or a smaller model.")
        return self

    @property
    def changed(self) -> bool:
        """Whether they were written to: what was changed is in memory alone."""
        return self._version > 0

    def release(self) -> None:
        """Let the system take back the memory that the values take; they are read again when they are needed."""
        if _LIBRARY is not None and self.data_ptr() == self.place and not self.changed:
            _LIBRARY.madvise(ctypes.c_void_p(self.place), ctypes.c_size_t(self.nbytes), mmap.MADV_DONTNEED)


class WeightMap:
    """Nameless files under ``folder`` that the weights of one model, and of what is made of it, are mapped from."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError: it can't be written to."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError(f"weights are mapped from {folder}, and it can't be made ({error.strerror}). Set LOWRANK_HOME.") from error

    def held(self, values: Tensor) -> MappedParameter:
        """Return a parameter with these values, mapped from a new file.

        Raises:
            ModelError: the disk has no room for it.
        """
        free = disk_usage(self.folder).free
        if free < values.nbytes:
            raise ModelError(f"weights need {amount(values.nbytes)} in {self.folder}, and {amount(free)} are free. Make room.")
        raw = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder) as file:
                file.write(raw.data)
                file.flush()
                mapped = torch.from_file(file.name, shared=False, size=values.numel(), dtype=values.dtype)
        except OSError as error:
            raise ModelError(f"weights can't be written in {self.folder}: {error.strerror}. Make room.") from error
        return MappedParameter.of(mapped.reshape(values.shape), mapped.data_ptr())

    def settle(self, module: nn.Module) -> None:
        """Map the large parameters of ``module``, in place; one that several parts share is mapped once."""
        settled: dict[int, MappedParameter] = {}
        for part in module.modules():
            for name, parameter in list(part._parameters.items()):
                if parameter is not None and _is_large(parameter) and not isinstance(parameter, MappedParameter):
                    self.put(part, name, settled.setdefault(id(parameter), self.held(parameter)))

    def put(self, part: nn.Module, name: str, parameter: MappedParameter) -> None:
        """Make ``parameter`` a part of a module, which lets go of its memory after each call."""
        part._parameters[name] = parameter
        if _released not in part._forward_hooks.values():
            part.register_forward_hook(_released)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or Inf; of a large tensor, a part is looked at at a time."""
    return all(bool(torch.isfinite(part).all()) for part in torch.split(values.detach().reshape(-1), _PART))


def _is_large(parameter: Tensor) -> bool:
    return parameter.nbytes >= _LEAST_BYTES and parameter.device.type == "cpu"


def _released(module: nn.Module, *unused: object) -> None:
    release(module, recurse=False)


def release(module: nn.Module, *, recurse: bool = True) -> None:
    """Let go of the memory of all mapped parameters of a module; of one with none, nothing happens."""
    for parameter in module.parameters(recurse):
        if isinstance(parameter, MappedParameter):
            parameter.release()


def converted(model: M, dtype: torch.dtype, weights: WeightMap | None) -> M:
    """Return a copy of a model in another dtype; with ``weights``, its large parameters are mapped, one after the other."""
    result = copy.deepcopy(model)
    settled: dict[int, MappedParameter] = {}
    for part in result.modules() if weights is not None else ():
        for name, parameter in list(part._parameters.items()):
            if isinstance(parameter, MappedParameter) and parameter.is_floating_point() and parameter.dtype != dtype:
                assert weights is not None
                if id(parameter) not in settled:
                    settled[id(parameter)] = weights.held(parameter.to(dtype))
                    parameter.release()
                part._parameters[name] = settled[id(parameter)]
    return result.to(dtype)
