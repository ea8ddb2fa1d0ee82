"""The plain form: two ordinary linear layers for each compressed one, and a module of a few lines, for runtimes that don't know us.

What another form saves is multiplied out as far as that is exact: stacks hold their shared factor once for each member, pivoted layers
their pivot rows as rows of the identity, heads zeros in a dense matrix.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank_core.errors import ModelError
from lowrank_core.export.code import code_file
from lowrank_core.export.dense import dense_layer, empty_model
from lowrank_core.layers import plain as module_source
from lowrank_core.layers.base import CompressedModule
from lowrank_core.layers.plain import PlainFactors
from lowrank_core.layers.stacked import StackedLinear
from lowrank_core.models.gguf import become_plain
from lowrank_core.models.handle import bias_of
from lowrank_core.models.hf import compressed_modules
from lowrank_core.models.plain import ARCHITECTURE, architectures_of, plain_class
from lowrank_core.models.unrolled import kept_in_memory, roll_back, stands_for

__all__ = ["plainly", "write_plain_code"]

_CODE = "modeling_lowrank_plain"
_BASE = "LowRankModel"
_ENTRY = '''

class {name}(WithFactors, transformers.{architecture}):
    """The architecture as transformers has it, with factors in place of some linear layers."""
'''


def plainly(module: PreTrainedModel, *, settle: Callable[[nn.Module], None] = kept_in_memory) -> PreTrainedModel:
    """Return a copy of the model in the plain form; it computes the same.

    Args:
        settle: is called with each layer that is made, before the next one is.

    Raises:
        ModelError: a layer has no place in this form.
    """
    compressed = dict(compressed_modules(module))
    _check_layers(module, compressed)
    skeleton = empty_model(module, module.config)
    memo: dict[int, nn.Module] = {}
    for name, child in compressed.items():
        if isinstance(child, StackedLinear):
            memo[id(child)] = _factors(child)
        else:
            memo[id(child)] = dense_layer(child, skeleton.get_submodule(name), keep_bias=True)
        settle(memo[id(child)])
    plain = copy.deepcopy(module, dict[int, Any](memo))
    roll_back(plain, settle=settle)
    become_plain(plain)
    layers = {name: plain.get_submodule(name) for name in compressed}
    plain.config.lowrank_ranks = {name: child.rank for name, child in compressed.items() if isinstance(child, StackedLinear)}
    plain.config.lowrank_biases = [name for name, layer in layers.items() if _needs_bias(layer, skeleton.get_submodule(name))]
    plain.__class__ = plain_class(plain.config)
    plain._weight_conversions = []  # stored as the modules have them: transformers converts no names for classes that it does not have
    return plain


def _check_layers(module: PreTrainedModel, compressed: dict[str, CompressedModule]) -> None:
    parts = [name for name in compressed if stands_for(module, name) is not None]
    if parts:
        raise ModelError(
            f"plain: {type(module).__name__} holds {len(parts)} of the compressed layers in a matrix that they share with others "
            f"(the first: {parts[0]}); linear layers of their own have no place there. Write the form compressed, which vLLM reads with "
            "this package, or dense."
        )
    if not any(isinstance(child, StackedLinear) for child in compressed.values()):
        raise ModelError("plain: no layer of this model has two factors. Write the form dense, which loses nothing here.")
    if any(child.grid is not None for child in compressed.values()):
        raise ModelError("plain: quantised layers would be rounded again. Write the form compressed, or the plain form of the float model.")


def _factors(child: StackedLinear) -> PlainFactors:
    down = child.shared_down.detach()
    with torch.device("meta"):
        layer = PlainFactors(child.in_features, child.out_features, child.rank, bias=child.bias is not None)
    with torch.no_grad():
        up = child.expanded(torch.eye(child.rank, dtype=down.dtype, device=down.device)).T  # each entry is one of the factor's, 1 or 0
    layer.down.weight = nn.Parameter(down.clone(), requires_grad=False)
    layer.up.weight = nn.Parameter(up.contiguous(), requires_grad=False)
    layer.weight = nn.Parameter(torch.empty(0, dtype=down.dtype, device=down.device), requires_grad=False)
    if child.bias is not None:
        layer.up.bias = nn.Parameter(child.bias.detach().clone(), requires_grad=False)
    return layer


def _needs_bias(layer: nn.Module, dense: nn.Module) -> bool:
    """Return whether the config has to speak of a layer's bias: that of factors, or one that the architecture doesn't have."""
    if isinstance(layer, PlainFactors):
        return layer.up.bias is not None
    return bias_of(layer) is not None and bias_of(dense) is None


def write_plain_code(module: PreTrainedModel, folder: Path) -> None:
    """Write the module of a plain model, which imports torch and transformers alone, and name it in the model's config."""
    module.config.auto_map = {"AutoModel": f"{_CODE}.{_BASE}", "AutoModelForCausalLM": f"{_CODE}.{ARCHITECTURE}"}
    classes = zip((ARCHITECTURE, _BASE), architectures_of(module.config), strict=True)
    entries = "".join(_ENTRY.format(name=name, architecture=architecture) for name, architecture in classes)
    source = inspect.getsource(module_source).replace("import torch\n", "import torch\nimport transformers\n", 1)
    (folder / f"{_CODE}.py").write_text(code_file(source + entries), encoding="utf-8")
