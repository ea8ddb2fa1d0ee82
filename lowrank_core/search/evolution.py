"""CMA-ES with a safe state: Optuna pickles it in the study, which may come from anywhere."""

from __future__ import annotations

import io
import pickle
from typing import Any

import optuna
from optuna.samplers import CmaEsSampler

from lowrank_core.errors import RunError

__all__ = ["SafeCmaEsSampler"]

_ALLOWED = frozenset(
    {
        ("cmaes._cma", "CMA"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    }
)
"""All that a state is made of, by module and name; whatever else a pickle names could be called by loading it."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class SafeCmaEsSampler(CmaEsSampler):
    """Optuna's CMA-ES with a restricted unpickler."""

    def _restore_optimizer(self, completed_trials: list[optuna.trial.FrozenTrial]) -> Any:
        prefix = self._attr_key_optimizer
        for trial in reversed(completed_trials):
            state = {name: value for name, value in trial.system_attrs.items() if name.startswith(prefix)}
            if state:
                return _restored(bytes.fromhex(self._concat_optimizer_attrs(state)), trial.number)
        return None


def _restored(state: bytes, number: int) -> object:
    """Return the optimiser.

    Raises:
        RunError: the bytes are damaged, or hold anything else.
    """
    try:
        return _Unpickler(io.BytesIO(state)).load()
    except (pickle.UnpicklingError, ValueError, TypeError, AttributeError, ImportError, EOFError, IndexError, KeyError) as error:
        raise RunError(
            f"the state of CMA-ES in trial {number} of the study is not one: {error}. "
            "Go on with another sampler (--sampler), or start a new run."
        ) from error
