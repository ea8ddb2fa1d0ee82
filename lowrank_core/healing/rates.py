"""A learning rate from the model itself: Adam moves every number by about the rate, so the rate is measured in what such a step does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

__all__ = ["VALIDATIONS", "measured_rate"]

_FIRST = 1e-4
_ROUNDS = 4
VALIDATIONS = 1 + 2 * _ROUNDS
"""Measurements of the divergence that a rate takes."""
_SHARE = 0.1
"""Of the divergence, that a random step of the size ε adds."""
_OF_RANDOM = 0.05
"""Rate over ε: the steps of Adam agree with each other for a while, and random ones do not. Measured on the bundled model."""


@torch.no_grad()
def measured_rate(trained: Mapping[str, nn.Parameter], divergence: Callable[[], float], seed: int) -> float:
    """Return a twentieth of the ε at which a step θ ± ε s with random signs s raises the KL divergence by a tenth.

    The mean over both signs leaves the curvature, ΔKL ~ c ε², so that a few rounds of ε ← ε √(KL / (10 ΔKL)) find it. The size of
    Adam's steps hardly depends on the gradient: near to the dense model, a rate that suits a worse one would undo what one shot won.

    Args:
        trained: what would be trained; as before when this returns.
        divergence: measures the KL divergence to the dense model, in nats per token, as the numbers are.
        seed: of the signs.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = {name: torch.randint(0, 2, value.shape, generator=generator).mul_(2).sub_(1).to(value) for name, value in trained.items()}
    kept = {name: value.detach().clone() for name, value in trained.items()}
    start, rate = divergence(), _FIRST
    wanted = _SHARE * max(start, 1e-6)
    for _ in range(_ROUNDS):
        raised = (_moved(trained, kept, signs, rate, divergence) + _moved(trained, kept, signs, -rate, divergence)) / 2 - start
        factor = math.sqrt(wanted / raised) if 0 < raised < math.inf else (10.0 if raised <= 0 else 0.1)
        rate *= min(max(factor, 0.1), 10.0)
    return _OF_RANDOM * rate


def _moved(
    trained: Mapping[str, nn.Parameter],
    kept: Mapping[str, torch.Tensor],
    signs: Mapping[str, torch.Tensor],
    step: float,
    divergence: Callable[[], float],
) -> float:
    """Measure the divergence one step away, and come back."""
    try:
        for name, value in trained.items():
            value.copy_(kept[name] + step * signs[name])
        return divergence()
    finally:
        for name, value in trained.items():
            value.copy_(kept[name])
