"""Our own code next to the weights: a folder that loads with ``trust_remote_code=True`` where this package is not installed.

transformers copies the file that ``auto_map`` names, and what it imports relatively, from one flat folder. So the module that
reads the format and all of ours that it needs are copied under flat names, with their imports of each other rewritten.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from lowrank_core import __version__
from lowrank_core.models import hf
from lowrank_core.models.handle import auto_class_of

__all__ = ["auto_map", "code_file", "forget_code", "is_ours", "write_code"]

_PACKAGE = "lowrank_core."
_NOTICE = f"""\
# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The lowrank-studio authors. Licensed under the Apache License, Version 2.0:
# http://www.apache.org/licenses/LICENSE-2.0. Written by lowrank-studio {__version__}; the weights have a licence of their own.
"""
_ENTRY = '''\
"""Loads this folder with ``trust_remote_code=True`` where lowrank-studio is not installed."""

import transformers

from .{format} import register


class {name}(transformers.{name}):
    """The architecture as transformers has it; some linear layers are replaced by smaller ones before weights are read."""

    @classmethod
    def from_pretrained(cls, *arguments, **options):
        register()
        return super().from_pretrained(*arguments, **options)
'''


def auto_map(module: PreTrainedModel) -> dict[str, str]:
    """Return the entry of ``config.json``. The class keeps its name, so that what it saves is known as what it is."""
    return {auto_class_of(module.config): f"{hf.CODE}.{type(module).__name__}"}


def forget_code(config: PretrainedConfig) -> None:
    """Drop the checkpoint's own ``auto_map``, of parts of the config, too: the class is transformers' own, and that code stays behind."""
    for part in (config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))):
        if "auto_map" in vars(part):
            del part.auto_map


def write_code(architecture: str, folder: Path) -> None:
    """Write the class that ``auto_map`` names, and every module that it needs."""
    entry = _ENTRY.format(format=_flat(hf.__name__), name=architecture)
    (folder / f"{hf.CODE}.py").write_text(code_file(entry), encoding="utf-8")
    for name, source in _needed(hf.__name__).items():
        (folder / f"{_flat(name)}.py").write_text(code_file(source), encoding="utf-8")


def code_file(source: str) -> str:
    """Return the text of a file of ours, with its licence."""
    return _NOTICE + source


def is_ours(path: Path) -> bool:
    """Return whether a file is one that ``write_code`` wrote."""
    if path.suffix != ".py" or not path.is_file():
        return False
    return path.read_text(encoding="utf-8", errors="replace").startswith(_NOTICE.partition("\n# http")[0])


def _flat(name: str) -> str:
    return "lowrank_" + name.removeprefix(_PACKAGE).replace(".", "_")


def _needed(start: str) -> dict[str, str]:
    """Return name -> rewritten source of ``start`` and all modules of ours that it reaches."""
    result: dict[str, str] = {}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in result:
            result[name], imported = _rewritten(name)
            waiting += imported
    return result


def _rewritten(name: str) -> tuple[str, list[str]]:
    """Return the source of a module with relative imports of ours, and the names that it imports."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    lines, imported = source.splitlines(), []
    for node in ast.walk(ast.parse(source)):
        assert not (isinstance(node, ast.Import) and any(f"{alias.name}.".startswith(_PACKAGE) for alias in node.names)), name
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(_PACKAGE):
            assert node.module is not None
            assert node.module.startswith(_PACKAGE), f"{name}: a module of a folder can't import a name of the package itself"
            index = node.lineno - 1
            lines[index] = lines[index].replace(f"from {node.module} import", f"from .{_flat(node.module)} import", 1)
            imported.append(node.module)
    return "\n".join(lines) + "\n", imported
