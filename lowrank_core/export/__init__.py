"""Taking the smaller model away: a folder of its factors or of their products, its card, and the proof that it is what was measured."""

import sys
from types import ModuleType
from typing import Any

from lowrank_core.export.dense import biases_without_place, check_form
from lowrank_core.export.folder import check_free
from lowrank_core.export.healed import healed_model, write_healed
from lowrank_core.export.manifest import ExportManifest, Measurement, Protocol, read_manifest
from lowrank_core.export.measuring import HeldOut, held_out, metrics_of
from lowrank_core.export.precision import check_precision
from lowrank_core.export.rewriting import Rewritten, convert, rewrite
from lowrank_core.export.verification import Verification, verify
from lowrank_core.export.writing import export

__all__ = [
    "ExportManifest",
    "Measurement",
    "Protocol",
    "Rewritten",
    "HeldOut",
    "Verification",
    "biases_without_place",
    "check_form",
    "check_free",
    "convert",
    "check_precision",
    "export",
    "metrics_of",
    "healed_model",
    "held_out",
    "read_manifest",
    "rewrite",
    "verify",
    "write_healed",
]


class _Package(ModuleType):
    """The package, called like its function: ``lowrank_core.export`` is both."""

    def __call__(self, *arguments: Any, **options: Any) -> ExportManifest:
        return export(*arguments, **options)


sys.modules[__name__].__class__ = _Package
