"""Less compression in blocks that change the hidden states more.

Notation::

    BI_b   1 - E[cos(x, x')] of the hidden states before and after block b, over tokens: its influence
    φ_b    fraction removed from block b: B · R · softmax(-BI/ε)_b, over the B blocks with free units; its mean is R
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowrank_core.allocation.base import Ranks
from lowrank_core.allocation.problem import AllocationProblem, Allocator
from lowrank_core.allocation.projection import project
from lowrank_core.errors import ConfigError
from lowrank_core.parameters import Unit

__all__ = ["BlockInfluence"]

_MIN_KEPT = 0.01
"""Of the parameters, where the formula asks for less, or for nothing at all."""


@dataclass(frozen=True)
class BlockInfluence(Allocator):
    """Influence of ShortGPT, arXiv 2403.03853; sparsity of MoDeGPT, arXiv 2408.09632, §3.3. All units of a block keep the same fraction.

    A stack across blocks keeps the mean of theirs. What is kept is clipped to (0, 1] and scaled onto the budget.

    Attributes:
        epsilon: ε, in units of BI, which lies in [0, 2] and mostly below 0.5. The larger, the more even: as ε grows, every block is
            compressed alike.
    """

    name: str = "block_influence"
    label: str = "Block influence (MoDeGPT)"
    reference: str = "arXiv 2408.09632, with the influence of 2403.03853"
    needs_influence = True
    epsilon: float = 0.1

    def ranks(self, problem: AllocationProblem) -> Ranks:
        blocks = sorted({member.depth for unit in problem.without_alternatives() for member in unit.members})
        removed = self._removed(problem, blocks)

        def target(unit: Unit) -> float:
            return max(_MIN_KEPT, 1 - sum(removed[member.depth] for member in unit.members) / len(unit.members))

        return project(problem, {unit.name: target(unit) for unit in problem.free})

    def _removed(self, problem: AllocationProblem, blocks: list[int]) -> dict[int, float]:
        """Return φ of each block."""
        known = len(problem.influence)
        if not known or max(blocks, default=0) >= known:
            raise ConfigError(
                f"the allocation {self.name} needs the influence of {1 + max(blocks, default=0)} blocks, and {known} are known. "
                "Calibrate again, or allocate by another rule."
            )
        scores = -np.array([problem.influence[block] for block in blocks]) / self.epsilon
        shares = np.exp(scores - scores.max(initial=-np.inf))
        shares *= (1 - problem.kept_share) / shares.mean() if blocks else 1.0
        return dict(zip(blocks, shares.tolist(), strict=True))
