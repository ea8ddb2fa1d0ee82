"""Training each block's factors to give the dense block's output from what the compressed blocks before it hand on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_core.config.healing import HealingConfig
from lowrank_core.errors import ModelError
from lowrank_core.healing.base import Healer, Student
from lowrank_core.healing.distill import trained_factors
from lowrank_core.models.blocks import hidden_after
from lowrank_core.models.handle import blocks_of

__all__ = ["BlockwiseRefinement"]


class BlockwiseRefinement(Healer):
    """Σ_b ‖h'_b − h_b‖² / ‖h_b − h_{b−1}‖², with h'_b computed from h'_{b−1} as a constant, so that each block learns for itself.

    All blocks learn in the same pass: a block sees its input drift while the blocks before it learn, instead of waiting for them.
    """

    name: ClassVar[str] = "blockwise"
    reference: ClassVar[str] = "this project"

    def student(self, module: PreTrainedModel, config: HealingConfig) -> Student:
        return Student(module, trained_factors(module), lambda: module)

    def loss(self, student: PreTrainedModel, dense: PreTrainedModel, ids: Tensor, config: HealingConfig) -> Tensor:
        with torch.no_grad(), _hidden_states(dense, cut=False) as target:
            dense.base_model(input_ids=ids, use_cache=False)
        with _hidden_states(student, cut=True) as result:
            student.base_model(input_ids=ids, use_cache=False)
        terms = []
        for index, output in enumerate(result.outputs):
            wanted = target.outputs[index].float()
            added = wanted - target.inputs[index].float()
            terms.append((output.float() - wanted).square().sum() / added.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
        return torch.stack(terms).mean()


class _States:
    """Hidden states (B, T, d) before and after every block, in order."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []


@contextmanager
def _hidden_states(module: PreTrainedModel, *, cut: bool) -> Iterator[_States]:
    """Note what every block reads and returns; ``cut`` ends the gradient's way at its input."""
    states = _States()

    def before(block: nn.Module, arguments: tuple[object, ...], options: dict[str, object]) -> tuple[object, dict[str, object]]:
        given = options.get("hidden_states", arguments[0] if arguments else None)
        if not isinstance(given, Tensor):
            raise ModelError("the blocks of this model get no hidden states, so it can't be healed block by block. Use distill.")
        hidden = given.detach() if cut else given
        states.inputs.append(hidden)
        if "hidden_states" in options:
            return arguments, {**options, "hidden_states": hidden}
        return (hidden, *arguments[1:]), options

    def after(block: nn.Module, arguments: object, output: object) -> None:
        hidden = hidden_after(output, states.inputs[-1])
        if hidden is None:
            raise ModelError("the blocks of this model return no hidden states, so it can't be healed block by block. Use distill.")
        states.outputs.append(hidden)

    _, blocks = blocks_of(module)
    hooks = [
        hook for block in blocks for hook in (block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after))
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
