"""Products of calibration passes in bfloat16: twice as fast on processors that have the instructions, sums in float32.

Only the operands of matrix products are rounded, to 8 bits: hidden states stay in float32, and the moments of inputs, whose small
eigenvalues count, are multiplied in float32. So is the drift-aware fit: the drift is no larger than that rounding. docs/results.md has
what it costs in KL, which is less than the interval of the measurement.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lowrank_core.config import CalibrationConfig
from lowrank_core.errors import ConfigError
from lowrank_core.models.handle import ModelHandle

__all__ = ["has_bfloat16", "products_in", "resolved_precision", "rounded"]

_FLAGS = {"float32": "ieee", "bfloat16": "bf16"}


def has_bfloat16() -> bool:
    """Return whether this processor has instructions for products in bfloat16."""
    return bool(torch.backends.mkldnn.is_available()) and torch.cpu._is_avx512_bf16_supported()  # type: ignore[no-untyped-call]


def resolved_precision(config: CalibrationConfig, handle: ModelHandle) -> str:
    """Return float32 or bfloat16, the precision of products in passes of ``handle``; models in another dtype than float32 keep theirs.

    Raises:
        ConfigError: bfloat16 is asked for where the processor has no instructions for it.
    """
    plain = handle.device.type != "cpu" or handle.module.dtype != torch.float32
    if config.precision == "float32" or (config.precision == "auto" and (plain or not has_bfloat16())):
        return "float32"
    if plain or not has_bfloat16():
        raise ConfigError(
            "products in bfloat16 need a float32 model on a processor with AVX-512 BF16 or AMX. Choose the precision auto or float32."
        )
    return "bfloat16"


def rounded(key: str, config: CalibrationConfig, handle: ModelHandle) -> str:
    """Return ``key`` with the precision that statistics are measured in, where it is not float32.

    Keys themselves leave it out: a run that was begun on one machine goes on on another, whose processor may have other instructions.
    """
    precision = resolved_precision(config, handle)
    return key if precision == "float32" else f"{key}-{precision}"


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Take matrix products of float32 tensors on the CPU in ``precision``: float32 or bfloat16."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = _FLAGS[precision]
    try:
        yield
    finally:
        matmul.fp32_precision = before
