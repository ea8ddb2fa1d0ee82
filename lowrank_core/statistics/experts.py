"""Moments of experts: few tokens reach each, so its own moments are mixed with those of its mixture.

Notation::

    n_e          tokens routed to expert e;  N  tokens of the text;  d  width of the input or output
    C_e, G_e     moments of the inputs, weighed by squared routing weights, and of the output gradients, of the tokens routed to e
    C̄, Ḡ         of the tokens of all experts of the mixture

    (n_e C_e + d C̄) / (n_e + d)        d tokens of the mixture's own distribution are added to those of the expert

Weighing by w² makes C_e ⊗ G_e the factored Fisher of the expert: its output, and so the gradient that comes back, has the factor w.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lowrank_core.errors import NumericalError
from lowrank_core.statistics.moments import InputStatistics, OutputStatistics

__all__ = ["mixed_inputs", "mixed_outputs"]


def mixed_inputs(experts: Mapping[str, InputStatistics]) -> dict[str, InputStatistics]:
    """Return the statistics of one input of all experts of a mixture, each mixed with those of all; counts stay those of the expert.

    Raises:
        NumericalError: no token reached any of them.
    """
    total = sum(entry.count for entry in experts.values())
    if not total:
        raise NumericalError(f"{next(iter(experts))}: no token reached any expert of its mixture. Calibrate on more text.")
    everyone = _union([(entry, entry.count / total) for entry in experts.values()])
    return {
        name: replace(
            _union([(entry, entry.count / (entry.count + entry.width)), (everyone, entry.width / (entry.count + entry.width))]),
            count=entry.count,
            group_counts=entry.group_counts,
            group_weights=entry.group_weights,
            group_traces=entry.group_traces,
            group_mean_shifts=entry.group_mean_shifts,
        )
        for name, entry in experts.items()
    }


def _union(parts: list[tuple[InputStatistics, float]]) -> InputStatistics:
    """Return the moments of tokens drawn from each part with its weight; the weights sum to 1."""
    first = parts[0][0]
    mean = _sum([(entry.mean, weight) for entry, weight in parts])
    between = _sum([(torch.outer(entry.mean - mean, entry.mean - mean), weight) for entry, weight in parts])
    return replace(
        first,
        mean=mean,
        absolute_mean=_sum([(entry.absolute_mean, weight) for entry, weight in parts]),
        pooled=_sum([(entry.pooled, weight) for entry, weight in parts]) + between,
        sample=_sum([(entry.sample, weight) for entry, weight in parts]) + between,
    )


def mixed_outputs(experts: Mapping[str, OutputStatistics], tokens: int) -> dict[str, OutputStatistics]:
    """Return the gradient moments of one layer of all experts of a mixture: mixed per routed token, then per token of the text.

    An expert that no token reached counts as if one had.

    Args:
        experts: moments normalised by ``tokens``.
        tokens: N.

    Raises:
        NumericalError: no gradient reached any of them.
    """
    total = sum(entry.count for entry in experts.values())
    if not total:
        raise NumericalError(f"{next(iter(experts))}: no gradient reached any expert of its mixture. Calibrate on more text.")
    gradient, rows = (_sum([(getattr(e, name), tokens / total) for e in experts.values()]) for name in ("gradient", "fisher_rows"))
    result = {}
    for name, entry in experts.items():
        own, others = 1 / (entry.count + entry.width), entry.width / (entry.count + entry.width) / tokens
        share = max(entry.count, 1)
        result[name] = OutputStatistics(
            entry.count,
            share * (entry.gradient * own + gradient * others),
            share * (entry.fisher_rows * own + rows * others),
        )
    return result


def _sum(parts: list[tuple[Tensor, float]]) -> Tensor:
    result = torch.zeros_like(parts[0][0])
    for value, weight in parts:
        result += weight * value
    return result
