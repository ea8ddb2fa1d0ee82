"""From factors to modules: in which form a compressed matrix is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lowrank_core.errors import ConfigError, NumericalError
from lowrank_core.layers.base import CompressedModule, Entry
from lowrank_core.layers.channels import KeptPairs, NarrowInput, NarrowOutput
from lowrank_core.layers.dense import DenseLinear
from lowrank_core.layers.factored import LowRankLinear
from lowrank_core.layers.heads import OutputHeads, ValueHeads
from lowrank_core.layers.pivoted import PivotedLinear
from lowrank_core.layers.pivoting import fix_gauge, pivot

__all__ = ["FORMS", "STORAGES", "AnyFactors", "Factors", "HeadFactors", "PairFactors", "WidthFactors", "build_layers", "form_of"]

_FACTORS: tuple[type[CompressedModule], ...] = (LowRankLinear, PivotedLinear, ValueHeads, OutputHeads, DenseLinear)
_CHANNELS: tuple[type[CompressedModule], ...] = (NarrowOutput, NarrowInput, KeptPairs)

FORMS: Mapping[str, type[CompressedModule]] = MappingProxyType({form.form: form for form in (*_FACTORS, *_CHANNELS)})
"""Name in ``config.json`` -> module."""


def form_of(entry: Entry) -> type[CompressedModule]:
    """Return the class of the module that an entry of ``config.json`` describes.

    Raises:
        ModelError: this version knows no form of that name.
    """
    form = entry.text("form", LowRankLinear.form)  # the only one of the first exports, which don't say it
    if form is None or form not in FORMS:
        entry.refuse("form", f"{form!r}; this version knows {', '.join(FORMS)}")
    return FORMS[form]


@dataclass(frozen=True)
class Factors:
    """One unit, a matrix or a stack, at one rank: W_i ~ ups[i] down; float64 on the CPU.

    Attributes:
        ups: (m_i, r) of each member.
        down: (r, n), shared.
        biases: (m_i,) of each member, or None.
    """

    ups: tuple[Tensor, ...]
    down: Tensor
    biases: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class HeadFactors:
    """The value and output projections of one attention at one rank per head; float64 on the CPU.

    Attributes:
        values: (groups, r, n), to r dimensions instead of head_dim.
        value_biases: (groups, r), or None.
        outputs: (heads, d_out, r): what each head adds from r dimensions.
        output_bias: (d_out,), or None.
        head_dim: of the dense layers.
    """

    values: Tensor
    value_biases: Tensor | None
    outputs: Tensor
    output_bias: Tensor | None
    head_dim: int

    def __post_init__(self) -> None:
        (groups, rank, n), (heads, _, read) = self.values.shape, self.outputs.shape
        if heads % groups or read != rank or not 1 <= rank <= min(self.head_dim, n):
            raise ConfigError(
                f"heads: {groups} groups of {rank} values and {heads} heads that read {read}, of head_dim {self.head_dim}, don't fit. "
                "Heads must be a multiple of the groups, and the rank at most head_dim."
            )


@dataclass(frozen=True)
class WidthFactors:
    """The layers of an MLP at k channels; float64 on the CPU.

    Attributes:
        firsts: (k, n) of each first layer, and biases (k,) or None; last: (d_out, k), and its bias.
    """

    firsts: tuple[tuple[Tensor, Tensor | None], ...]
    last: tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class PairFactors:
    """Query and key projections with p pairs of dimensions in each head; float64 on the CPU.

    Attributes:
        kept: (groups, p) numbers of the pairs, ascending.
        query, key: (heads or groups, size, p, n), and biases (heads or groups, size, p) or None.
        head_dim, pair: of the dense layers, as ``PairUnit`` has them.
    """

    kept: Tensor
    query: tuple[Tensor, Tensor | None]
    key: tuple[Tensor, Tensor | None]
    head_dim: int
    pair: str


AnyFactors = Factors | HeadFactors | WidthFactors | PairFactors


def _factored(name: str, factors: Factors, likes: Sequence[Tensor]) -> Sequence[nn.Module]:
    return LowRankLinear.stack(factors.ups, factors.down, factors.biases, likes)


def _pivoted(name: str, factors: Factors, likes: Sequence[Tensor]) -> Sequence[nn.Module]:
    return PivotedLinear.stack(pivot(factors.ups, factors.down, name), factors.biases, likes)


STORAGES = MappingProxyType({"factored": _factored, "pivoted": _pivoted})
"""Name -> how the modules of one unit are built."""


def _heads(name: str, factors: HeadFactors, likes: Sequence[Tensor]) -> Sequence[nn.Module]:
    value_like, output_like = likes
    gauged = fix_gauge(factors.values, factors.value_biases, factors.outputs, name)
    return (
        ValueHeads.from_gauged(gauged, factors.head_dim, like=value_like),
        OutputHeads.from_outputs(gauged.outputs, factors.output_bias, factors.head_dim, like=output_like),
    )


def _widths(name: str, factors: WidthFactors, likes: Sequence[Tensor]) -> Sequence[nn.Module]:
    *wide, last = likes
    firsts = [NarrowOutput.of(*first, like=like) for first, like in zip(factors.firsts, wide, strict=True)]
    return (*firsts, NarrowInput.of(*factors.last, like=last))


def _pairs(name: str, factors: PairFactors, likes: Sequence[Tensor]) -> Sequence[nn.Module]:
    about = {"head_dim": factors.head_dim, "pair": factors.pair}
    both = zip((factors.query, factors.key), likes, strict=True)
    return tuple(KeptPairs.of(*part, factors.kept, like=like, **about) for part, like in both)  # type: ignore[arg-type]


def _built(name: str, factors: AnyFactors, storage: str, likes: Sequence[Tensor]) -> Sequence[nn.Module]:
    if isinstance(factors, HeadFactors):
        return _heads(name, factors, likes)
    if isinstance(factors, WidthFactors):
        return _widths(name, factors, likes)
    return _pairs(name, factors, likes) if isinstance(factors, PairFactors) else STORAGES[storage](name, factors, likes)


def build_layers(names: Sequence[str], factors: AnyFactors, storage: str, likes: Sequence[Tensor]) -> dict[str, nn.Module]:
    """Return the modules of one unit by the names of the layers that they replace; the first leads a stack.

    Arguments:
        names: of the members; of heads, the value and the output projection.
        storage: of ``STORAGES``. Heads, widths and pairs have one form each, for which it is not read.
        likes: the dense weights, for dtype, device and whether they are trained.

    Raises:
        ConfigError: no such storage.
        RankError: a rank outside its limits.
        NumericalError: a factor that is not finite in the model's dtype; names the layer.
    """
    if isinstance(factors, Factors) and storage not in STORAGES:
        raise ConfigError(f"storage: {storage!r} is not known. Choose from {', '.join(STORAGES)}.")
    with torch.no_grad():
        built = _built(names[0], factors, storage, likes)
    layers = dict(zip(names, built, strict=True))
    for (name, layer), like in zip(layers.items(), likes, strict=True):
        if not all(torch.isfinite(parameter).all() for parameter in layer.parameters()):
            raise NumericalError(f"{name}: its factors overflow in {like.dtype}. Load the model in float32 or bfloat16.")
    return layers
