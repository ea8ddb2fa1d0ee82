"""Where model and text come from."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.config.checks import check_choice, check_min
from lowrank_core.errors import ConfigError

__all__ = ["BOS_RULES", "DTYPES", "ModelSource", "TextConfig", "looks_like_path"]

DTYPES = ("auto", "float32", "bfloat16")
BOS_RULES = ("auto", "window", "none")


@dataclass(frozen=True)
class ModelSource:
    """Where a causal language model comes from, and how to hold it.

    Attributes:
        reference: ``demo`` (the bundled model), a local folder, or a hub id.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto`` (float32 on a CPU, the checkpoint's own on an accelerator), ``float32`` or ``bfloat16``.
    """

    reference: str = "demo"
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not self.reference.strip():
            raise ConfigError("model: give `demo`, a local folder, or a hub id.")
        check_choice("dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class TextConfig:
    """Which text, and how it is cut into windows.

    Attributes:
        reference: ``python-stdlib``, ``file:PATH``, ``wikitext-2``, ``c4``, ``ptb``, or ``NAME:FOLDER`` for a local copy of those.
        context: tokens in a window, BOS included.
        calibration_windows: windows that the statistics are measured on, drawn at random with ``seed``.
        validation_windows: windows that a search sees in each trial, evenly spaced over the split.
        test_windows: windows that final figures are measured on, evenly spaced over the split.
        bos: ``window`` puts BOS first in every window, ``none`` nowhere, ``auto`` does as the tokenizer does.
        seed: of the draw of calibration windows.
    """

    reference: str = "python-stdlib"
    context: int = 256
    calibration_windows: int = 256
    validation_windows: int = 24
    test_windows: int = 128
    bos: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.reference.strip():
            raise ConfigError("text: give `python-stdlib`, `file:PATH`, `wikitext-2`, `c4` or `ptb`.")
        check_min(2, context=self.context)
        check_min(
            1,
            calibration_windows=self.calibration_windows,
            validation_windows=self.validation_windows,
            test_windows=self.test_windows,
        )
        check_choice("bos", self.bos, BOS_RULES)
        check_min(0, seed=self.seed)


def looks_like_path(reference: str) -> bool:
    """Return whether ``reference`` can only be a path, there or not: a hub id is ``name`` or ``owner/name``."""
    return reference.startswith((".", "/", "~")) or reference.count("/") > 1 or "\\" in reference
