"""Compressed forms in a checkpoint: what was saved is what is loaded, and what is damaged or impossible is reported."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import assert_cache_changes_nothing
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank_core.config import ModelSource
from lowrank_core.errors import ModelError
from lowrank_core.layers.base import CompressedModule
from lowrank_core.layers.forms import Factors, HeadFactors, build_layers
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.models.handle import find_layers, weight_of
from lowrank_core.models.hf import mark_compressed
from lowrank_core.models.unrolled import replace_module

IDS = torch.tensor([range(24)])
ATTENTION = "model.layers.{}.self_attn.{}_proj".format
MLP = "model.layers.{}.mlp.{}_proj".format

UNITS = {
    "factored": [(ATTENTION(0, "o"),), tuple(ATTENTION(0, kind) for kind in "qkv"), (MLP(0, "gate"), MLP(1, "gate"))],
    "pivoted": [
        (MLP(0, "down"),),
        tuple(ATTENTION(1, kind) for kind in "qk"),
        (MLP(1, "up"), MLP(0, "up")),  # the leader stands in the later block
    ],
    "heads": [(ATTENTION(1, "v"), ATTENTION(1, "o"))],
}


def _factors(model: PreTrainedModel, names: tuple[str, ...], rank: int) -> Factors:
    modules = [model.get_submodule(name) for name in names]
    left, values, right = torch.linalg.svd(torch.cat([weight_of(module).double() for module in modules]), full_matrices=False)
    biases = tuple(None if module.bias is None else module.bias.detach().double() for module in modules)
    ups = (left[:, :rank] * values[:rank]).split([len(weight_of(module)) for module in modules])
    return Factors(tuple(ups), right[:rank], biases)


def _heads(model: PreTrainedModel, names: tuple[str, ...], rank: int, head_dim: int = 8) -> HeadFactors:
    value, output = (model.get_submodule(name) for name in names)
    return HeadFactors(
        values=value.weight.double().reshape(-1, head_dim, 32)[:, :rank],
        value_biases=None if value.bias is None else value.bias.double().reshape(-1, head_dim)[:, :rank],
        outputs=output.weight.double().reshape(32, -1, head_dim).transpose(0, 1)[..., :rank],
        output_bias=None,
        head_dim=head_dim,
    )


def _compressed(dense: PreTrainedModel) -> PreTrainedModel:
    """A copy with every form in it: single matrices, stacks within a block and across blocks, heads; some stay dense."""
    model = copy.deepcopy(dense)
    for storage, units in UNITS.items():
        for names in units:
            factors = _heads(model, names, 6) if storage == "heads" else _factors(model, names, 12)
            likes = [weight_of(model.get_submodule(name)) for name in names]
            for name, layer in build_layers(names, factors, "factored" if storage == "heads" else storage, likes).items():
                replace_module(model, name, layer)
    mark_compressed(model, {"made": "here"})
    return model


@pytest.fixture(scope="module")
def export(llama: ModelHandle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    _compressed(llama.module).save_pretrained(folder)
    llama.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def broken(export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "broken"))


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def _layers(folder: Path) -> dict[str, dict[str, Any]]:
    layers: dict[str, dict[str, Any]] = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    return layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_what_is_loaded_computes_what_was_saved(name: str, dtype: torch.dtype, request: pytest.FixtureRequest, tmp_path: Path):
    dense = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(f"{name}_checkpoint"), dtype=dtype).eval()
    model = _compressed(dense)
    expected = _logits(model)
    assert not torch.equal(expected, _logits(dense))
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        assert torch.equal(_logits(model), expected)
        assert {p.dtype for module in model.modules() if isinstance(module, CompressedModule) for p in module.parameters()} == {dtype}
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert _layers(folders[0]) == _layers(folders[1])


def test_entries_say_how_layers_are_built(export: Path):
    layers, weights = _layers(export), load_file(export / "model.safetensors")
    assert set(layers) == {name for units in UNITS.values() for names in units for name in names}
    assert layers[ATTENTION(0, "q")] == {"form": "factored", "rank": 12, "bias": False}
    assert layers[ATTENTION(0, "k")] == {"form": "factored", "rank": 12, "bias": False, "source": ATTENTION(0, "q")}
    assert layers[MLP(0, "up")].keys() == {"form", "rank", "bias", "source", "own", "offset"}
    assert layers[MLP(1, "up")]["own"] + layers[MLP(0, "up")]["own"] == 12
    assert layers[ATTENTION(1, "v")] == {"form": "value_heads", "rank": 6, "bias": False, "groups": 2, "head_dim": 8}
    assert layers[ATTENTION(1, "o")] == {"form": "output_heads", "rank": 6, "bias": False, "heads": 4, "head_dim": 8}
    assert f"{ATTENTION(0, 'q')}.down" in weights
    assert f"{ATTENTION(0, 'k')}.down" not in weights
    assert weights[f"{MLP(0, 'down')}.pivots"].dtype == torch.int32
    assert not [name for name in weights if name.endswith("order")]


def test_copies_and_casts_of_a_loaded_model_are_whole(export: Path):
    model = AutoModelForCausalLM.from_pretrained(export).eval()
    twin = copy.deepcopy(model)
    for module, other in zip(model.modules(), twin.modules(), strict=True):
        if hasattr(module, "leader"):
            assert other.leader in set(twin.modules())
            assert other.leader not in set(model.modules())
    assert torch.equal(_logits(twin), _logits(model))
    torch.testing.assert_close(_logits(twin.double()).float(), _logits(model), rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # where stacks share their products
        torch.testing.assert_close(model(input_ids=IDS).logits, _logits(model).clone())


def test_generation_with_a_cache_equals_without(export: Path):
    assert_cache_changes_nothing(load_model(ModelSource(str(export))).module)


def test_a_loaded_export_counts_every_number_once_and_offers_its_dense_layers(export: Path, llama: ModelHandle):
    loaded = load_model(ModelSource(str(export)))
    assert {layer.name for layer in loaded.layers} == {layer.name for layer in llama.layers} - set(_layers(export))
    assert loaded.parameters - loaded.linear_parameters == llama.parameters - llama.linear_parameters
    factored = 12 * (32 + 32) + 12 * (32 + 16 + 16 + 32) + 12 * (80 + 80 + 32)
    pivoted = 12 * (32 + 80 - 12) + 12 * (32 + 16 + 32 - 12) + 12 * (80 + 80 + 32 - 12)
    heads = 2 * 6 * (32 - 6) + 4 * 32 * 6
    indices = 3 * 12 + 2 * 6
    left = sum(layer.shape.dense_parameters for layer in loaded.layers)
    assert loaded.linear_parameters == factored + pivoted + heads + indices + left
    assert len(loaded.fingerprint) == 64


def test_exports_without_a_form_are_factored(broken: Path):
    expected = _logits(load_model(ModelSource(str(broken))).module)
    _edit(broken, lambda layers: [entry.pop("form") for entry in layers.values() if entry["form"] == "factored"])
    assert torch.equal(_logits(load_model(ModelSource(str(broken))).module), expected)


def test_a_stack_without_its_leader_is_not_written(llama: ModelHandle):
    model = _compressed(llama.module)
    name = ATTENTION(0, "q")
    replace_module(model, name, nn.Linear(32, 32, bias=False))
    with pytest.raises(ModelError, match=rf"{ATTENTION(0, 'k')}: the leader of its stack is not part of the model"):
        mark_compressed(model, {})


def test_layers_of_a_stack_are_found_as_linears_of_the_blocks(llama: ModelHandle):
    layers = [layer.name for layer in find_layers(_compressed(llama.module))]
    assert layers == sorted(layers, key=[layer.name for layer in llama.layers].index)
    assert all(first != second for first, second in pairwise(layers))


# --- damages ---------------------------------------------------------------------------------------------------------


def _edit(folder: Path, change: Callable[[dict[str, dict[str, Any]]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"]["layers"])
    path.write_text(json.dumps(config))


def _set(name: str, **values: object) -> Callable[[Path], None]:
    return lambda folder: _edit(folder, lambda layers: layers[name].update(values))


def _drop(name: str, key: str) -> Callable[[Path], None]:
    return lambda folder: _edit(folder, lambda layers: layers[name].pop(key))


def _weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def _whole_config(value: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["layers"] = value
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def _repeat(weights: dict[str, Tensor], name: str) -> None:
    weights[name][..., 1] = weights[name][..., 0]


Q, K, V, OUT = (ATTENTION(layer, kind) for layer, kind in [(0, "q"), (0, "k"), (1, "v"), (1, "o")])
DOWN, UP, LEADER = MLP(0, "down"), MLP(0, "up"), MLP(1, "up")
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "layers of a list": (_whole_config([]), "doesn't say which layers"),
    "no layers": (_whole_config(None), "doesn't say which layers"),
    "an entry of a number": (_whole_config({Q: 3}), "doesn't say which layers"),
    "an unknown form": (_set(Q, form="sparse"), f"{Q}' no valid form .'sparse'; this version knows factored, pivoted"),
    "a form of a list": (_set(Q, form=["factored"]), f"{Q}' no valid form"),
    "a form of null": (_set(Q, form=None), f"{Q}' no valid form"),
    "no rank": (_drop(DOWN, "rank"), f"{DOWN}' no valid rank .None; 1 to 32"),
    "a rank of true": (_set(DOWN, rank=True), f"{DOWN}' no valid rank .True"),
    "a rank of text": (_set(V, rank="6"), f"{V}' no valid rank .'6'; 1 to 8"),
    "a rank above the matrix": (_set(DOWN, rank=33), f"{DOWN}' no valid rank"),
    "a rank above the heads": (_set(OUT, rank=9), f"{OUT}' no valid rank"),
    "a bias of a number": (_set(V, bias=0), f"{V}' no valid bias"),
    "another bias": (_set(V, bias=True), f"incomplete .*{V}.biases"),
    "another rank": (_set(V, rank=5), "wrong shape|damaged"),
    "another rank of the output": (_set(OUT, rank=5), f"wrong shape .first: {OUT}"),
    "an unknown source": (_set(K, source="model.brain"), f"{K}' no valid source .'model.brain' is not compressed"),
    "a source of a number": (_set(K, source=3), f"{K}' no valid source"),
    "a source of a list": (_set(K, source=[Q]), f"{K}' no valid source"),
    "a source of itself": (_set(K, source=K), f"{K}' no valid source .* has a source itself"),
    "a chain of sources": (_set(ATTENTION(0, "v"), source=K), "no valid source .* has a source itself"),
    "a source of another form": (_set(K, source=DOWN), f"{K}' no valid source .it has another form"),
    "a source of another rank": (_set(Q, rank=11), "no valid source .it has another form, rank"),
    "a source of another width": (_set(K, source=ATTENTION(1, "q"), form="pivoted", own=0, offset=0), "wrong shape|incomplete"),
    "no source": (_drop(K, "source"), f"incomplete .*{K}.down"),
    "a leader less": (lambda folder: _edit(folder, lambda layers: layers.pop(Q)), "is not compressed"),
    "no count of pivots": (_drop(UP, "own"), f"{UP}' no valid own"),
    "too many pivots": (_set(UP, own=13), f"{UP}' no valid own .13; 0 to 12"),
    "another count of pivots": (_set(DOWN, own=11), "damaged|wrong shape"),
    "an impossible offset": (_set(DOWN, offset=1), f"{DOWN}' no valid offset .1; 0 to 0"),
    "a negative offset": (_set(UP, offset=-1), f"{UP}' no valid offset"),
    "no groups": (_drop(V, "groups"), f"{V}' no valid groups"),
    "groups that don't fit": (_set(V, groups=3), f"{V}' no valid groups and head_dim .3 times 8; the layer is 16 wide"),
    "heads that don't fit": (_set(OUT, head_dim=16), f"{OUT}' no valid heads and head_dim"),
    "other heads": (_set(OUT, heads=2, head_dim=16), f"wrong shape .first: {OUT}"),
    "a layer that is none": (
        lambda folder: _edit(folder, lambda layers: layers.update({"model.norm": layers[Q]})),
        "'model.norm', which is no linear layer",
    ),
    "an unknown layer": (
        lambda folder: _edit(folder, lambda layers: layers.update({"model.brain": layers[Q]})),
        "'model.brain', which this architecture has not",
    ),
    "pivots that repeat": (_weights(lambda weights: _repeat(weights, f"{DOWN}.pivots")), f"pivots of the layer '{DOWN}' are damaged"),
    "pivots out of range": (_weights(lambda weights: weights[f"{LEADER}.pivots"].add_(80)), f"pivots of the layer '{LEADER}' are damaged"),
    "pivots of heads that repeat": (_weights(lambda weights: _repeat(weights, f"{V}.pivots")), f"pivots of the layer '{V}' are damaged"),
    "no pivots": (_weights(lambda weights: weights.pop(f"{DOWN}.pivots")), "damaged|incomplete"),
    "coefficients of NaN": (
        _weights(lambda weights: weights[f"{DOWN}.coefficients"].fill_(torch.nan)),
        f"{DOWN}.coefficients of .* holds NaN or Inf",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_forms_are_told(damage: str, broken: Path):
    spoil, message = DAMAGES[damage]
    spoil(broken)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(ModelSource(str(broken)))
    assert "\n" not in str(caught.value)
