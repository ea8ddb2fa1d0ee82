"""Fused projections, found by what they do: which rows of a matrix are queries, keys and values, or gate and up.

A layout proposes; two passes over random tokens decide. The first token attends to itself alone, so its value is what the output
projection reads there; keys of the first token, when disturbed, change what later tokens read and not what it reads itself; its
queries change nothing. An up projection is the half of the rows in which the input of the next layer is affine.

Notation::

    B, T        variants of one window in a pass, the first of them undisturbed; tokens
    M, w        outputs of a fused projection; inputs of the layer that reads what becomes of them
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import permutations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lowrank_core.layers.base import CompressedModule
from lowrank_core.models.fused import Layout, SplitProjection
from lowrank_core.models.handle import blocks_of, random_tokens, weight_of
from lowrank_core.models.unrolled import kept_in_memory, replace_module, roll_back
from lowrank_core.models.values import head_dim_of, repeats
from lowrank_core.models.walk import LinearMap, linear_maps

__all__ = ["LeftFused", "split_projections"]

_TOKENS = 8
_DISTURBANCE = 32.0
"""Of keys and queries, in root mean squares of the layer's outputs: attention moves well above the rounding of any dtype."""

_FACTOR = -2.0
"""By which a half of the rows is multiplied: bends any activation, and seldom reaches where a class clips its values."""

_AFFINE = 1e-2
"""Relative: activations bend by the size of their input."""

_GATED = ("gate_proj", "up_proj")
_UNKNOWN = "its rows are not recognised as queries, keys and values, nor as gate and up"
_WHOLE = "a run or an allocation file of an earlier version names it as one"
_INEXACT = "its parts don't give what it gives"
_USED_OTHERWISE = "the model gives something else with its parts"

Edit = tuple[Layout, str, Callable[[Tensor], Tensor]]
"""A layout, a part in it, and what is done to the outputs of that part (T, rows)."""


@dataclass(frozen=True)
class LeftFused:
    """Layers at one path of ``count`` blocks whose rows look like those of several projections, and that stay one matrix each."""

    layer: str
    count: int
    reason: str

    def __str__(self) -> str:
        others = f" (and {self.count - 1} more like it)" if self.count > 1 else ""
        return f"{self.layer}{others} is compressed as one matrix: {self.reason}."


@dataclass
class _Candidate:
    """A layer that may be fused, the layer that reads what becomes of its outputs, and the orders that its rows may have.

    Attributes:
        outputs: of the layer (T, M); inputs: of its reader (T, w), then in the variants of ``edits`` (B, T, w).
        first: whether it reads what its parent is given, so that it is the first of the parent's layers.
    """

    name: str
    module: nn.Module
    reader: nn.Module
    head_dim: int | None
    layouts: list[Layout]
    outputs: Tensor = field(default_factory=lambda: torch.empty(0))
    inputs: Tensor = field(default_factory=lambda: torch.empty(0))
    first: bool = False

    @property
    def edits(self) -> list[Edit]:
        """Edits of two variants of the window for each layout."""
        return [(layout, part, edit) for layout in self.layouts for part, edit in (_GATE_EDITS if _is_gated(layout) else _QUERY_EDITS)]


def _is_gated(layout: Layout) -> bool:
    return layout.names[0] in _GATED


def _disturbed(rows: Tensor) -> Tensor:
    """Return outputs (T, rows) with those of the first token changed."""
    noise = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
    return torch.cat([rows[:1] + _DISTURBANCE * rows.square().mean().sqrt() * noise, rows[1:]])


def _multiplied(rows: Tensor) -> Tensor:
    return _FACTOR * rows


_QUERY_EDITS = (("q_proj", _disturbed), ("k_proj", _disturbed))
_GATE_EDITS = (("up_proj", torch.zeros_like), ("up_proj", _multiplied))


def split_projections(
    model: PreTrainedModel, *, whole: Collection[str] = (), settle: Callable[[nn.Module], None] = kept_in_memory
) -> tuple[LeftFused, ...]:
    """Replace fused projections by linear layers, in place, and return those that look like one and stay.

    Args:
        whole: names of layers that stay one matrix each, whatever they hold.
        settle: is called with each module that was put in, before the next one is made.
    """
    ids = random_tokens(model, 1)[:, :_TOKENS]
    layouts, left, logits = _layouts(model, ids)
    left |= {name: _WHOLE for name in layouts if name in whole}
    split = [name for name, layout in layouts.items() if name not in left and _split(model, name, layout, settle)]
    left |= {name: _INEXACT for name in layouts if name not in left and name not in split}
    if split and not _gives(model, ids, logits):
        roll_back(model, keep=lambda unrolled: not isinstance(unrolled, SplitProjection) or not unrolled.dense, settle=settle)
        left |= dict.fromkeys(split, _USED_OTHERWISE)
    return _grouped(left)


def _layouts(model: PreTrainedModel, ids: Tensor) -> tuple[dict[str, Layout], dict[str, str], Tensor]:
    """Return the order of the rows of each fused projection, a reason for each layer that looks like one and is none, and the logits."""
    candidates = list(_candidates(model))
    if not candidates:
        return {}, {}, torch.empty(0)
    logits = _undisturbed(model, candidates, ids)
    for each in candidates:
        each.layouts = [layout for layout in each.layouts if _reads_values(each, layout)]
    _disturb(model, [each for each in candidates if each.layouts], ids)
    layouts = {each.name: layout for each in candidates if (layout := _layout(each)) is not None}
    layouts |= _agreed(candidates, layouts)
    return layouts, {each.name: _UNKNOWN for each in candidates if each.first and each.name not in layouts}, logits


def _agreed(candidates: Sequence[_Candidate], layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    """Return the layout of layers that did not show one, if it is that of all others at their path and agrees with their own values.

    Attention that hardly depends on its keys, as in a first block or in half precision, does not tell queries from keys.
    """
    known: dict[tuple[str, ...], set[Layout]] = {}
    for name, layout in layouts.items():
        known.setdefault(_kind(name), set()).add(layout)
    unsure = [each for each in candidates if each.name not in layouts and len(known.get(_kind(each.name), ())) == 1]
    return {each.name: layout for each in unsure for layout in known[_kind(each.name)] if layout in each.layouts}


def _kind(name: str) -> tuple[str, ...]:
    """Return a dotted path without its numbers, which blocks of one kind share."""
    return tuple(part for part in name.split(".") if not part.isdigit())


def _split(model: PreTrainedModel, name: str, layout: Layout, settle: Callable[[nn.Module], None]) -> bool:
    """Replace one layer, if its parts give what it gives; one at a time, so that no two models are in memory."""
    native = model.get_submodule(name)
    split = SplitProjection(native, layout)
    same = _reproduces(split, native)
    if same:
        settle(split)
        replace_module(model, name, split)
    return same


def _candidates(model: PreTrainedModel) -> Iterator[_Candidate]:
    """Yield pairs of layers with one parent: from a width to more rows than the second reads, as an order explains, and back."""
    prefix, blocks = blocks_of(model)
    children: dict[str, list[LinearMap]] = {}
    for linear in linear_maps(model, blocks):
        children.setdefault(f"{prefix}.{linear.depth}.{linear.path}".rpartition(".")[0], []).append(linear)
    for parent, linears in children.items():
        for fused in (linear for linear in linears if linear.kind == "linear"):
            rows, columns = weight_of(fused.module).shape
            head_dim = head_dim_of(model, fused.depth)
            for reader in linears:
                given, width = _size(reader.module)
                layouts = [*_attention_layouts(rows, width, head_dim), *_gated_layouts(rows, width)] if given == columns else []
                if layouts:
                    yield _Candidate(f"{parent}.{fused.path.rpartition('.')[2]}", fused.module, reader.module, head_dim, layouts)


def _size(module: nn.Module) -> tuple[int, int]:
    """Return (d_out, d_in) of a dense or low-rank layer."""
    d_out, d_in = (module.out_features, module.in_features) if isinstance(module, CompressedModule) else weight_of(module).shape
    return int(d_out), int(d_in)


def _attention_layouts(rows: int, width: int, head_dim: int | None) -> Iterator[Layout]:
    """Yield orders of (heads + 2 groups) · head_dim rows, of which ``width`` are queries."""
    surplus = rows - width
    if head_dim is None or surplus <= 0 or surplus % (2 * head_dim) or width % head_dim:
        return
    groups = surplus // (2 * head_dim)
    if (width // head_dim) % groups:
        return
    sizes = {"q_proj": width, "k_proj": groups * head_dim, "v_proj": groups * head_dim}
    for chunks in (count for count in range(1, groups + 1) if groups % count == 0):
        for order in permutations(sizes):
            yield Layout(tuple((name, sizes[name]) for name in order), chunks)


def _gated_layouts(rows: int, width: int) -> Iterator[Layout]:
    """Yield orders of gate and up, each with ``width`` rows: one after the other, or in turns."""
    if rows == 2 * width:
        for chunks in (1, width):
            for order in (_GATED, _GATED[::-1]):
                yield Layout(tuple((name, width) for name in order), chunks)


@torch.no_grad()
def _undisturbed(model: PreTrainedModel, candidates: Sequence[_Candidate], ids: Tensor) -> Tensor:
    """Run a pass, note what the candidates give and their readers read, and return the logits.

    A pair is none if one of the two is not called with every token, or both read the same.
    """
    calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    given: dict[nn.Module, set[int]] = {}

    def note(module: nn.Module, arguments: tuple[object, ...], result: object) -> None:
        if arguments and isinstance(arguments[0], Tensor) and isinstance(result, Tensor):
            calls[module] = arguments[0], result

    def note_given(module: nn.Module, arguments: tuple[object, ...], options: dict[str, object]) -> None:
        given[module] = {id(value) for value in (*arguments, *options.values())}

    parents = {each.name: model.get_submodule(each.name.rpartition(".")[0]) for each in candidates}
    hooks = [layer.register_forward_hook(note) for layer in {layer for each in candidates for layer in (each.module, each.reader)}]
    hooks += [parent.register_forward_pre_hook(note_given, with_kwargs=True) for parent in set(parents.values())]
    with _removed(hooks):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    for each in candidates:
        (own, outputs), (read, _) = (calls.get(module, (ids, ids)) for module in (each.module, each.reader))
        each.outputs, each.inputs = outputs.flatten(0, -2), read.flatten(0, -2)
        each.first = id(own) in given.get(parents[each.name], set())
        if own is read or not len(each.outputs) == len(each.inputs) == ids.numel():
            each.layouts, each.first = [], False
    return logits


@contextmanager
def _removed(hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _reads_values(each: _Candidate, layout: Layout) -> bool:
    """Whether the reader reads the rows of v at the first token; true of layouts without any."""
    if "v_proj" not in layout.names or each.head_dim is None:
        return True
    return repeats(each.inputs[0], layout.divided(each.outputs[0])["v_proj"], each.head_dim)


@torch.no_grad()
def _disturb(model: PreTrainedModel, candidates: Sequence[_Candidate], ids: Tensor) -> None:
    """Run a pass in which each edit of a layer is done in a variant of the window, and note what the readers would read.

    They read what they do undisturbed, so that all layers are tried at once.
    """
    edits: dict[nn.Module, list[Edit]] = {}
    places = []
    for each in candidates:
        mine = edits.setdefault(each.module, [])
        places.append(range(len(mine) + 1, len(mine) + 1 + len(each.edits)))
        mine += each.edits
    variants = 1 + max(map(len, edits.values()), default=0)
    reads: dict[nn.Module, Tensor] = {}

    def edit(module: nn.Module, _: object, result: Tensor) -> Tensor:
        plain = result.reshape(variants, ids.shape[1], -1)[0]
        rows = [plain, *(_edited(plain, *each) for each in edits[module])]
        return torch.stack([*rows, *[plain] * (variants - len(rows))]).reshape(result.shape)

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        reads[module] = arguments[0].reshape(variants, ids.shape[1], -1)
        return reads[module][:1].repeat(variants, 1, 1).reshape(arguments[0].shape), *arguments[1:]

    hooks: list[RemovableHandle] = [module.register_forward_hook(edit) for module in edits]
    hooks += [reader.register_forward_pre_hook(note) for reader in {each.reader for each in candidates}]
    with _removed(hooks):
        if candidates:
            model(input_ids=ids.repeat(variants, 1), use_cache=False)
    for each, place in zip(candidates, places, strict=True):
        each.inputs = reads[each.reader][[0, *place]]


def _edited(rows: Tensor, layout: Layout, part: str, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """Return outputs (T, M) with those of a part edited."""
    parts = {name: own.T for name, own in layout.divided(rows.T).items()}
    parts[part] = edit(parts[part])
    return layout.joined([parts[name] for name in layout.names], -1)


def _layout(each: _Candidate) -> Layout | None:
    """Return the order of rows that the passes showed, if they showed one."""
    if not each.layouts:
        return None
    plain, variants = each.inputs[0], iter(each.inputs[1:])
    gaps: list[tuple[float, Layout]] = []
    for layout in each.layouts:
        first, second = next(variants), next(variants)
        if _is_gated(layout):
            gaps.append((_bend(plain, first, second), layout))
        elif _are_queries_and_keys(plain, first, second):
            return layout
    gap, closest = min(gaps, key=lambda entry: entry[0], default=(math.inf, None))
    return closest if gap <= max(_AFFINE, 4 * torch.finfo(plain.dtype).eps) else None


def _bend(plain: Tensor, without: Tensor, multiplied: Tensor) -> float:
    """Return how far inputs (T, w) are from affine in rows that were zero, as they are, and multiplied; relative to what the rows do.

    Infinite where they do nothing.
    """
    effect = (plain - without).float()
    if float(effect.norm()) <= _AFFINE * float(plain.float().norm()):
        return math.inf
    return float((multiplied.float() - without - _FACTOR * effect).norm() / effect.norm())


def _are_queries_and_keys(plain: Tensor, queries: Tensor, keys: Tensor) -> bool:
    """Whether inputs (T, w) of the output projection say so, given those with queries and with keys of the first token disturbed."""
    noise = 8 * torch.finfo(plain.dtype).eps * float(plain.abs().max())
    unmoved, held, moved = (
        (after - before).abs().max() for after, before in ((queries, plain), (keys[0], plain[0]), (keys[1:], plain[1:]))
    )
    return bool(unmoved <= noise and held <= noise < moved)


@torch.no_grad()
def _reproduces(split: SplitProjection, native: nn.Module) -> bool:
    """Whether both give the same on random rows, but for the order of sums."""
    rows = torch.randn(_TOKENS, weight_of(native).shape[1], generator=torch.Generator().manual_seed(0)).to(weight_of(native))
    expected, result = native(rows), split(rows)
    return bool((result - expected).float().norm() <= 4 * torch.finfo(result.dtype).eps * expected.float().norm())


@torch.no_grad()
def _gives(model: PreTrainedModel, ids: Tensor, logits: Tensor) -> bool:
    """Whether the model still gives these logits: a class may do more with a layer than to call it."""
    try:
        again: Tensor = model(input_ids=ids, use_cache=False).logits
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AttributeError, TypeError):
        return False
    return float((again - logits).float().norm()) <= math.sqrt(torch.finfo(logits.dtype).eps) * float(logits.float().norm())


def _grouped(left: Mapping[str, str]) -> tuple[LeftFused, ...]:
    """Return an entry for each path but for the number of the block, and reason."""
    kinds: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for name, reason in left.items():
        kinds.setdefault((_kind(name), reason), []).append(name)
    return tuple(LeftFused(names[0], len(names), reason) for (_, reason), names in kinds.items())
