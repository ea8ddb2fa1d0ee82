"""Passes of the model with one unit at a time cut: each begins at the block that is cut, with the dense hidden states before it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowrank_core.compression.decomposed import Decomposed
from lowrank_core.evaluation import DenseReference, WindowScores, score_windows
from lowrank_core.models.blocks import BlockRunner
from lowrank_core.text.windows import WindowSet

__all__ = ["CutPasses"]


class CutPasses:
    """The dense model, and its hidden states before the current block, batch by batch; cuts come in the order of the model.

    About half of the work of whole passes. Where blocks can't be chained, every pass begins with the tokens.
    """

    def __init__(self, decomposed: Decomposed, windows: WindowSet, batch_size: int, dense: DenseReference | None = None) -> None:
        """Run nothing yet; ``dense`` is of the same windows in batches of ``batch_size``, for divergences from it."""
        if dense is not None:
            dense.check_batches(windows, batch_size)
        self._decomposed, self._runner, self._block = decomposed, BlockRunner(decomposed.handle), 0
        self._batches = [replace(windows, ids=ids) for ids in torch.split(windows.ids, batch_size)]
        self._dense = [None if dense is None else dense.batch(index) for index in range(len(self._batches))]
        self._states: list[Tensor | None] = [None] * len(self._batches)
        self._depths = {unit.name: min(member.depth for member in unit.members) for unit in decomposed.units}

    def scores(self, unit: str, rank: int) -> list[WindowScores]:
        """Return the scores of every batch with ``unit`` alone at ``rank``.

        Raises:
            NumericalError: the model diverges.
        """
        self._advance(self._depths[unit])
        with self._decomposed.swapped({unit: rank}):
            return [self._scores(*of_batch) for of_batch in zip(self._batches, self._dense, self._states, strict=True)]

    def _scores(self, batch: WindowSet, dense: DenseReference | None, state: Tensor | None) -> WindowScores:
        with self._runner.beginning_at(self._block, state):
            return score_windows(self._decomposed.handle, batch, batch_size=batch.windows, dense=dense)[0]

    @torch.no_grad()
    def _advance(self, block: int) -> None:
        assert block >= self._block, "cuts come in the order of the model"
        for index in range(self._block, block) if self._runner.chained else ():
            for number, batch in enumerate(self._batches):
                self._states[number] = self._runner.run(index, batch.ids, self._states[number]).cpu()
        self._block = block
