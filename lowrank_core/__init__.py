"""lowrank_core: see where a language model is low-rank, search how to spend a parameter budget, keep a smaller model.

::

    import lowrank_core as lr

    pipeline = lr.Pipeline("demo", "python-stdlib")
    for ratio in (0.2, 0.4):
        model = pipeline.compress(ratio)
        print(lr.evaluate(model.handle, pipeline.windows.test, against=pipeline.handle))
        lr.export(model, f"demo-{ratio}")

The names of ``__all__`` are imported when they are first used, so ``import lowrank_core`` imports neither torch nor transformers: the
dashboard depends on that. ``import lowrank_core.models.hf``, or anything here that loads a model, registers the format of our folders
with transformers; where transformers is imported already, ``import lowrank_core`` does.
"""

import sys
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "allocation": ("ALLOCATORS", "RankAllocation", "allocation_from_ranks", "read_allocation"),
    "compression.build": ("CompressedModel",),
    "compression.pipeline": ("Pipeline",),
    "config": ("CalibrationConfig", "CompressionConfig", "ExportConfig", "ModelSource", "RunConfig", "SearchConfig", "TextConfig"),
    "config.healing": ("HealingConfig",),
    "errors": ("LowRankError",),
    "evaluation": ("EvaluationReport", "evaluate"),
    "export": ("export", "held_out", "verify"),
    "healing.trainer": ("heal",),
    "metrics": ("METRICS",),
    "models": ("ModelHandle", "load_model"),
    "presets.recipes": ("PRESETS",),
    "runs": ("create_run", "list_runs", "open_run"),
    "statistics.calibration": ("collect_statistics",),
    "studies.records": ("best_trial", "read_trials"),
    "text": ("load_text", "load_windows"),
    "worker.main": ("run_worker",),
}
_HOMES = {name: f"lowrank_core.{place}" for place, names in _PLACES.items() for name in names}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lowrank_core' has no attribute {name!r}")
    # `export` is a package and a function: importing the package has bound it here, and it can be called.
    return globals().setdefault(name, getattr(import_module(_HOMES[name]), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if sys.modules.get("transformers"):  # so torch is here, or wanted
    import_module("lowrank_core.models.hf")
