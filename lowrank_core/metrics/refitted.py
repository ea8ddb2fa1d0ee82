"""Block by block: factors that were fitted to the dense model's inputs, refitted to what the compressed blocks before really give."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.metrics.drift_aware import DriftAware

__all__ = ["REFITTED", "Refitted"]


@dataclass(frozen=True)
class Refitted(DriftAware):
    """M of MPIFA, arXiv 2501.19090: the inner basis' factors at their rank, refitted by least-squares turns, up first, then down.

    The target is W((1-β)x' + βx) from x', as in a drift-aware basis, whose closed form is what many turns come down to. ``drift_beta`` of
    the config is β: the paper's is 0.25.
    """

    title: str = "refitted"
    words: str = "Refitted"
    reference: str = "arXiv 2501.19090"
    beta: float = 0.25
    refit_steps: int = 2


REFITTED = Refitted()
