"""So that ``import lowrank_core`` is all that ``from_pretrained`` needs to read our folders, and costs nothing until it does.

transformers looks a format up by its name when it loads a model. The name is entered as soon as its registry is imported, under
a stand-in; what is behind it, and torch with it, is imported when a folder asks for it. Torch-free: the dashboard imports this.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["METHOD", "announce"]

METHOD = "lowrank"
"""``quant_method`` in ``config.json``, as ``models.hf`` has it."""

_REGISTRY = "transformers.quantizers.auto"
_FORMAT = "lowrank_core.models.hf"  # by name: an import statement would take torch into every process


class _StandIn:
    """What the registry holds until a folder asks for the format; importing that replaces it."""

    @classmethod
    def from_dict(cls, values: Mapping[str, object], **options: object) -> object:
        return importlib.import_module(_FORMAT).LowRankQuantizationConfig.from_dict(values, **options)


class _AfterRegistry(MetaPathFinder):
    """Lets transformers import its registry as ever, and enters the name afterwards."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_enter(module: ModuleType) -> None:
                execute(module)
                _enter(module)

            spec.loader.exec_module = execute_and_enter  # type: ignore[method-assign]
        return spec


def _enter(registry: ModuleType) -> None:
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, _StandIn)


def announce() -> None:
    """Enter the format's name in transformers' registry, now or when that is imported."""
    registry = sys.modules.get(_REGISTRY)
    if registry is not None and hasattr(registry, "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        _enter(registry)
    elif not any(isinstance(finder, _AfterRegistry) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterRegistry())
