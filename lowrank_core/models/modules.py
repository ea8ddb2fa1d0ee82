"""Modules of a block whose inner dimensions can be reduced: MLPs by channels, queries and keys by pairs of dimensions.

What looks like one is tried in passes over random tokens, by hooks that change no weight:

* Channels of an MLP's first layers that its last one does not read may be anything: with them at zero the logits stay what they are.
* q_i · s and k_i / s, the same s for all dimensions that a rotary embedding turns together, give the logits of the dense model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lowrank_core.models.attention import Heads, find_heads, logit_gap, logits_of, tolerance_of
from lowrank_core.models.handle import ModelHandle, random_tokens
from lowrank_core.parameters import PAIRS, HeadUnit, MatrixShape, PairUnit, Unit, WidthUnit

__all__ = ["Modules", "find_modules"]

_WINDOWS = 2
_SEED = 0

Edit = Callable[[Tensor], Tensor]

U = TypeVar("U", bound=Unit)


@dataclass(frozen=True)
class Modules:
    """Units of modules, per-head ones included, and in words what looked like one and is none."""

    units: tuple[Unit, ...]
    dropped: tuple[str, ...]

    def describe(self) -> dict[str, object]:
        """Return what ``Heads.describe`` does not tell, ready for JSON."""
        return {
            "widths": [unit.describe() for unit in self.units if isinstance(unit, WidthUnit)],
            "pairs": [unit.describe() for unit in self.units if isinstance(unit, PairUnit)],
            "modules_dropped": list(self.dropped),
        }


def find_modules(handle: ModelHandle, heads: Heads | None = None) -> Modules:
    """Return the MLPs, the query and key projections and the value and output projections of a model as units.

    Args:
        heads: of ``find_heads``, where that was called before.
    """
    heads = heads or find_heads(handle)
    trial = _Trial(handle)
    pairs, dropped = _pairs(trial, heads.units)
    taken = {member.name for unit in (*heads.units, *pairs) for member in unit.members}
    widths = trial.kept(_width_candidates(handle.shapes, taken), trial.independent)
    order = {shape.name: index for index, shape in enumerate(handle.shapes)}
    units = sorted((*heads.units, *pairs, *widths), key=lambda unit: order[unit.members[0].name])
    return Modules(tuple(units), dropped)


def _width_candidates(shapes: Sequence[MatrixShape], taken: set[str]) -> list[WidthUnit]:
    """Return each layer with those before it in its block that read one input and give as many channels as it reads."""
    free = [shape for shape in shapes if shape.expert is None and shape.name not in taken]
    result = []
    for index, last in enumerate(free):
        before = [shape for shape in free[:index] if shape.depth == last.depth and shape.d_out == last.d_in]
        for group in dict.fromkeys(shape.input_group for shape in before):
            result.append(WidthUnit((*(shape for shape in before if shape.input_group == group), last)))
    return result


def _pairs(trial: _Trial, heads: Sequence[HeadUnit]) -> tuple[list[PairUnit], tuple[str, ...]]:
    """Return the query and key projections next to the values, with what is turned together, and those that nothing fits."""
    left = [unit for unit in (_pair_candidate(trial.handle.shapes, each) for each in heads) if unit is not None]
    result: list[PairUnit] = []
    for pair in reversed(list(PAIRS)):  # single dimensions first: without a rotary embedding they may be scaled in pairs, too
        tried = [PairUnit(unit.members, heads=unit.heads, groups=unit.groups, head_dim=unit.head_dim, pair=pair) for unit in left]
        kept = trial.kept([unit for unit in tried if unit.head_dim % unit.size == 0], trial.scaled)
        result += kept
        left = [unit for unit in left if unit.name not in {other.name for other in kept}]
    reason = "their dimensions can't be scaled against each other: a norm, or an embedding that turns a part of them, is between"
    return result, tuple(f"{' and '.join(m.name for m in unit.members)} stay dense: {reason}." for unit in left)


def _pair_candidate(shapes: Sequence[MatrixShape], head: HeadUnit) -> PairUnit | None:
    value = head.members[0]
    wide, narrow = head.heads * head.head_dim, head.groups * head.head_dim
    others = [s for s in shapes if s.input_group == value.input_group and s.depth == value.depth and s.name != value.name]
    queries = [shape for shape in others if shape.d_out == wide]
    keys = [shape for shape in others if shape.d_out == narrow and shape.name != (queries[0].name if queries else "")]
    if len(queries) != (2 if wide == narrow else 1) or len(keys) != 1:
        return None
    return PairUnit((queries[0], keys[0]), heads=head.heads, groups=head.groups, head_dim=head.head_dim)


class _Trial:
    """Passes of a model with changed inputs and outputs of layers."""

    def __init__(self, handle: ModelHandle) -> None:
        self.handle = handle
        self._ids = random_tokens(handle.module, _WINDOWS, seed=_SEED)
        self._dense = logits_of(handle, self._ids)

    def kept(self, units: Sequence[U], holds: Callable[[Sequence[U]], bool]) -> list[U]:
        """Return the units that pass: all at once, and one by one only where that fails."""
        if not units or holds(units):
            return list(units)
        return [unit for unit in units if holds([unit])] if len(units) > 1 else []

    def independent(self, units: Sequence[WidthUnit]) -> bool:
        """Return whether half of the channels are of no account where the last layers don't read them."""
        generator = torch.Generator().manual_seed(_SEED)
        inputs: dict[str, Edit] = {}
        outputs: dict[str, Edit] = {}
        for unit in units:
            *firsts, last = unit.members
            mask = torch.rand(last.d_in, generator=generator) < 0.5
            inputs[last.name] = _times(mask)
            outputs |= {first.name: _times(mask) for first in firsts}
        return self._same(self._logits(inputs, {}), self._logits(inputs, outputs))

    def scaled(self, units: Sequence[PairUnit]) -> bool:
        """Return whether scaling pairs of queries against those of keys changes nothing."""
        generator = torch.Generator().manual_seed(_SEED)
        outputs: dict[str, Edit] = {}
        for unit in units:
            query, key = unit.members
            powers = torch.randint(-1, 2, (unit.groups, unit.max_rank), generator=generator)
            whole = powers.repeat_interleave(unit.size, 1) if unit.pair == "neighbours" else powers.repeat(1, unit.size)
            outputs[key.name] = _times(2.0 ** whole.flatten())
            outputs[query.name] = _times(2.0 ** -whole.repeat_interleave(unit.heads // unit.groups, 0).flatten())
        return self._same(self._dense, self._logits({}, outputs))

    def _same(self, one: Tensor, other: Tensor) -> bool:
        gap = logit_gap(one, other)
        return math.isfinite(gap) and gap <= tolerance_of(self.handle)

    def _logits(self, inputs: Mapping[str, Edit], outputs: Mapping[str, Edit]) -> Tensor:
        with _edited(self.handle.module, inputs, outputs):
            return logits_of(self.handle, self._ids)


def _times(factors: Tensor) -> Edit:
    return lambda value: value * factors.to(value)


@contextmanager
def _edited(module: nn.Module, inputs: Mapping[str, Edit], outputs: Mapping[str, Edit]) -> Iterator[None]:
    """Change what layers read, and what they give."""
    hooks = [
        module.get_submodule(n).register_forward_pre_hook(lambda _, given, e=edit: (e(given[0]), *given[1:])) for n, edit in inputs.items()
    ]
    hooks += [module.get_submodule(n).register_forward_hook(lambda _, given, result, e=edit: e(result)) for n, edit in outputs.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
