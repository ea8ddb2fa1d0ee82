"""Loading models, finding what can be compressed in them, and the layer that takes its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkpoints import save_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from lowrank_core.config import CalibrationConfig, ModelSource
from lowrank_core.errors import ModelError
from lowrank_core.models import LowRankLinear, ModelHandle, describe, load_model
from lowrank_core.models.handle import bias_of, blocks_of, find_layers, weight_of
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.text import WindowSet

SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0}


def _load(folder: Path | str) -> ModelHandle:
    return load_model(ModelSource(str(folder)))


@pytest.fixture(scope="module")
def qwen2(qwen2_checkpoint: Path) -> ModelHandle:
    return _load(qwen2_checkpoint)


@pytest.fixture(scope="module")
def gpt2(gpt2_checkpoint: Path) -> ModelHandle:
    return _load(gpt2_checkpoint)


@pytest.fixture
def broken(llama_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be damaged."""
    return Path(shutil.copytree(llama_checkpoint, tmp_path / "broken"))


# --- layers ----------------------------------------------------------------------------------------------------------


def _shapes(handle: ModelHandle) -> dict[str, tuple[int, int]]:
    return {layer.name: (layer.shape.d_out, layer.shape.d_in) for layer in handle.layers}


def test_llama_layers_with_grouped_queries(llama: ModelHandle):
    attention = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
    mlp = {"gate_proj": (80, 32), "up_proj": (80, 32), "down_proj": (32, 80)}
    expected = {f"model.layers.{depth}.self_attn.{kind}": shape for depth in (0, 1) for kind, shape in attention.items()}
    expected |= {f"model.layers.{depth}.mlp.{kind}": shape for depth in (0, 1) for kind, shape in mlp.items()}
    assert _shapes(llama) == expected
    assert {layer.shape.kind for layer in llama.layers} == set(attention) | set(mlp)
    assert [layer.shape.depth for layer in llama.layers] == [0] * 7 + [1] * 7
    assert not any(layer.shape.bias for layer in llama.layers)


def test_gpt2_layers_are_seen_as_d_out_by_d_in(gpt2: ModelHandle):
    shapes = {name.removeprefix("transformer.h.0."): shape for name, shape in _shapes(gpt2).items() if ".0." in name}
    attention = {f"attn.c_attn.{kind}_proj": (32, 32) for kind in "qkv"}
    assert shapes == {**attention, "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}
    assert {layer.shape.kind for layer in gpt2.layers} == {"q_proj", "k_proj", "v_proj", "attn.c_proj", "c_fc", "mlp.c_proj"}
    assert all(layer.shape.bias for layer in gpt2.layers)


def test_weight_and_bias_give_the_layers_own_output(any_handle: ModelHandle):
    generator = torch.Generator().manual_seed(0)
    for layer in any_handle.layers:
        module = any_handle.module.get_submodule(layer.name)
        inputs = torch.randn(3, layer.shape.d_in, generator=generator)
        outputs = nn.functional.linear(inputs, weight_of(module), bias_of(module))
        torch.testing.assert_close(outputs, module(inputs), atol=1e-5, rtol=1e-5)


def test_qwen2_biases_are_seen(qwen2: ModelHandle):
    with_bias = {layer.shape.kind for layer in qwen2.layers if layer.shape.bias}
    assert with_bias == {"q_proj", "k_proj", "v_proj"}


def _groups(handle: ModelHandle) -> set[frozenset[str]]:
    members: dict[str, set[str]] = {}
    for layer in handle.layers:
        members.setdefault(layer.input_group, set()).add(layer.name.rpartition(".")[2])
        assert layer.input_group.split(".")[:3] == layer.name.split(".")[:3]  # never across blocks
    return {frozenset(kinds) for kinds in members.values()}


def test_layers_that_read_one_input_share_a_group(llama: ModelHandle, qwen2: ModelHandle, gpt2: ModelHandle):
    llama_form = {
        frozenset({"q_proj", "k_proj", "v_proj"}),
        frozenset({"o_proj"}),
        frozenset({"gate_proj", "up_proj"}),
        frozenset({"down_proj"}),
    }
    assert _groups(llama) == llama_form
    assert _groups(qwen2) == llama_form
    assert _groups(gpt2) == {frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"c_proj"}), frozenset({"c_fc"})}
    for handle in (llama, qwen2, gpt2):
        widths = {layer.input_group: layer.shape.d_in for layer in handle.layers}
        assert all(widths[layer.input_group] == layer.shape.d_in for layer in handle.layers)


def test_heads_and_embeddings_are_never_listed(any_handle: ModelHandle):
    blocks = any_handle.layers[0].name.split(".0.")[0]
    assert all(layer.name.startswith(f"{blocks}.") for layer in any_handle.layers)
    assert any_handle.module.get_output_embeddings() not in [any_handle.module.get_submodule(layer.name) for layer in any_handle.layers]


def test_tied_weights_within_the_blocks_are_left_out():
    model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=64))
    names = {layer.name for layer in find_layers(model)}
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    tied = {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}
    assert {layer.name for layer in find_layers(model)} == names - tied


def test_compressible_parameters_are_those_of_the_blocks_linears(any_handle: ModelHandle):
    modules = [any_handle.module.get_submodule(layer.name) for layer in any_handle.layers]
    assert any_handle.linear_parameters == sum(p.numel() for module in modules for p in module.parameters())
    assert any_handle.linear_parameters == sum(shape.dense_parameters for shape in any_handle.shapes)


def test_tied_embeddings_are_counted_once(llama: ModelHandle, qwen2: ModelHandle):
    rest = 2 * 2 * 32 + 32  # norms
    assert llama.parameters == llama.linear_parameters + 300 * 32 + rest
    assert qwen2.parameters == qwen2.linear_parameters + 2 * 300 * 32 + rest


def _opt() -> PreTrainedModel:
    return OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, pad_token_id=1, **TOKENS))


def _neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=64, **TOKENS))


OTHERS: dict[str, tuple[Callable[[], PreTrainedModel], set[str]]] = {
    "opt": (_opt, {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    "gpt-neox": (_neox, {"q_proj", "k_proj", "v_proj", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_load_without_a_word_about_them(name: str, tmp_path: Path, sample_text: str, windows: WindowSet):
    make, kinds = OTHERS[name]
    torch.manual_seed(0)
    handle = _load(save_checkpoint(tmp_path, make(), sample_text))
    assert {layer.shape.kind for layer in handle.layers} == kinds
    assert len(handle.layers) == 2 * len(kinds)
    assert describe(handle)["blocks"] == 2
    # OPT hands its feed-forward layers (tokens, n) instead of (windows, context, n): groups are of windows all the same
    statistics = collect_statistics(handle, windows, CalibrationConfig(group_size=8, batch_size=6))
    assert [inputs.group_counts.tolist() for inputs in statistics.inputs.values()] == [[8 * 16] * 5] * len(statistics.inputs)


def test_a_model_without_blocks_is_told():
    class Bare(nn.Module):
        pass

    with pytest.raises(ModelError, match="no list of decoder blocks"):
        find_layers(Bare())  # type: ignore[arg-type]


def test_description_is_json_and_complete(any_handle: ModelHandle):
    body = json.loads(json.dumps(describe(any_handle)))
    assert body["parameters"] == any_handle.parameters
    assert [layer["name"] for layer in body["layers"]] == [layer.name for layer in any_handle.layers]
    assert sum(layer["parameters"] for layer in body["layers"]) == body["compressible_parameters"]


# --- fingerprint -----------------------------------------------------------------------------------------------------


def test_fingerprint_depends_on_content_alone(llama: ModelHandle, broken: Path):
    assert _load(broken).fingerprint == llama.fingerprint  # another folder, the same model
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert _load(broken).fingerprint != llama.fingerprint


def test_fingerprint_tells_architectures_with_equal_weights_apart(llama: ModelHandle, broken: Path):
    _edit_config(broken, rms_norm_eps=1e-2)
    assert _load(broken).fingerprint != llama.fingerprint


# --- LowRankLinear ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def layer(request: pytest.FixtureRequest) -> LowRankLinear:
    torch.manual_seed(0)
    made = LowRankLinear(6, 4, 3, bias=request.param)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def _as_linear(layer: LowRankLinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    with torch.no_grad():
        linear.weight.copy_(layer.up @ layer.down)
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
    return linear


@pytest.mark.parametrize("leading", [(), (5,), (2, 5), (2, 1, 5), (0,), (2, 0, 3)])
def test_low_rank_linear_takes_any_leading_shape(layer: LowRankLinear, leading: tuple[int, ...]):
    inputs = torch.randn(*leading, 6)
    torch.testing.assert_close(layer(inputs), _as_linear(layer)(inputs))
    assert layer(inputs).shape == (*leading, 4)


def test_low_rank_linear_round_trips_its_state(layer: LowRankLinear):
    names = {"down", "up"} | ({"bias"} if layer.bias is not None else set())
    assert set(layer.state_dict()) == names
    other = LowRankLinear(6, 4, 3, bias=layer.bias is not None)
    other.load_state_dict(layer.state_dict())
    inputs = torch.randn(5, 6)
    assert torch.equal(other(inputs), layer(inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_low_rank_linear_casts_as_a_whole(layer: LowRankLinear, dtype: torch.dtype):
    reference = _as_linear(layer)
    cast = layer.to(dtype)
    assert {parameter.dtype for parameter in cast.parameters()} == {dtype}
    inputs = torch.randn(5, 6)
    outputs = cast(inputs.to(dtype))
    assert outputs.dtype == dtype
    precision = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(outputs.float(), reference(inputs), atol=20 * precision, rtol=20 * precision)


def test_low_rank_linear_has_the_gradients_of_its_matrix(layer: LowRankLinear):
    inputs = torch.randn(5, 6)
    linear = _as_linear(layer)
    layer(inputs).square().sum().backward()
    linear(inputs).square().sum().backward()
    tolerances = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(layer.up.grad, linear.weight.grad @ layer.down.T, **tolerances)
    torch.testing.assert_close(layer.down.grad, layer.up.T @ linear.weight.grad, **tolerances)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, linear.bias.grad, **tolerances)


def test_low_rank_linear_shows_its_matrix_and_stores_the_factors(layer: LowRankLinear):
    torch.testing.assert_close(layer.weight, layer.up @ layer.down)
    assert sum(p.numel() for p in layer.parameters()) == 3 * (6 + 4) + (4 if layer.bias is not None else 0)
    assert "rank=3" in repr(layer)


def test_factors_take_the_dtype_of_the_layer_that_they_replace():
    like = nn.Linear(6, 4, dtype=torch.bfloat16).weight
    made = LowRankLinear.from_factors(torch.randn(4, 2, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64), None, like=like)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    assert made.bias is None


def test_conv1d_is_turned_to_d_out_by_d_in():
    module = Conv1D(5, 3)  # 5 outputs of 3 inputs, stored (3, 5)
    assert weight_of(module).shape == (5, 3)


# --- what can't be loaded --------------------------------------------------------------------------------------------


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _scramble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 20)


def _drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _spoil_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut short": (_cut, "model.safetensors is damaged or cut short"),
    "weights of noise": (_scramble, "model.safetensors is damaged or cut short"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no .safetensors file. Save the model again"),
    "a missing weight": (_drop_weight, "first: model.layers.1.mlp.up_proj.weight"),
    "a weight of NaN": (_spoil_weight, "model.layers.1.mlp.up_proj.weight of .* holds NaN or Inf"),
    "weights of another shape": (lambda folder: _edit_config(folder, intermediate_size=96), "wrong shape .first: model.layers.0.mlp"),
    "config cut short": (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged or cut short"),
    "config of a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json is damaged or cut short"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "an unknown architecture": (lambda folder: _edit_config(folder, model_type="future"), "can't be loaded: .*`future`"),
    "code of its own": (
        lambda folder: _edit_config(
            folder, model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
        ),
        "can't be loaded: .*custom code",
    ),
    "no tokenizer": (_drop_tokenizer, "has no tokenizer"),
    "tokenizer cut short": (lambda folder: (folder / "tokenizer.json").write_text('{"a'), "has no tokenizer that can be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_told(damage: str, broken: Path):
    spoil, message = DAMAGES[damage]
    spoil(broken)
    with pytest.raises(ModelError, match=message) as caught:
        _load(broken)
    assert "\n" not in str(caught.value)


def test_gpt2_without_tokenizer_is_told(gpt2_checkpoint: Path, tmp_path: Path):
    folder = Path(shutil.copytree(gpt2_checkpoint, tmp_path / "copy"))
    _drop_tokenizer(folder)  # transformers makes an empty tokenizer of it
    with pytest.raises(ModelError, match="has no tokenizer"):
        _load(folder)


def test_places_without_a_checkpoint_are_told(tmp_path: Path, broken: Path):
    with pytest.raises(ModelError, match="there is no folder"):
        _load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"is a file\. Give the folder"):
        _load(broken / "config.json")
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        _load(tmp_path)


def test_models_that_are_not_causal_are_told(tmp_path: Path, sample_text: str):
    config = BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    save_checkpoint(tmp_path, BertForMaskedLM(config), sample_text)
    with pytest.raises(ModelError, match=r"not a causal language model \(BertForMaskedLM\)"):
        _load(tmp_path)


@pytest.mark.parametrize("reference", ["nobody/nothing", "nothing", "not a name"])
def test_unknown_hub_ids_offline_are_told(reference: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="neither a local folder nor a hub id that could be fetched"):
        _load(reference)


@pytest.mark.parametrize(
    ("device", "message"),
    [("abacus", "is no device"), ("meta", "is not supported"), ("cuda:99", "torch sees . CUDA devices")],
)
def test_devices_that_are_not_there_are_told(llama_checkpoint: Path, device: str, message: str):
    with pytest.raises(ModelError, match=message):
        load_model(ModelSource(str(llama_checkpoint), device=device))


def test_windows_that_do_not_fit_are_told(llama: ModelHandle):
    llama.check_tokens(torch.tensor([[0, 299]]))
    with pytest.raises(ModelError, match="gives token 300, and the model knows 300 tokens"):
        llama.check_tokens(torch.tensor([[0, 300]]))
    with pytest.raises(ModelError, match=r"windows have 65 tokens, and .* takes 64"):
        llama.check_tokens(torch.zeros(1, 65, dtype=torch.long))


def test_a_loaded_model_is_ready_to_measure(llama: ModelHandle):
    assert not llama.module.training
    assert not any(parameter.requires_grad for parameter in llama.module.parameters())
    assert llama.module.dtype == torch.float32


def test_dtype_is_as_asked(llama_checkpoint: Path):
    handle = load_model(ModelSource(str(llama_checkpoint), dtype="bfloat16"))
    assert {parameter.dtype for parameter in handle.module.parameters()} == {torch.bfloat16}


def test_blocks_are_the_list_of_modules_with_parts_also_where_their_factors_are_in_8_bits():
    """Gemma 3n has lists of single layers outside its blocks, and int8 factors are no parameters."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projections = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])
            self.extras = nn.ModuleList([nn.Sequential(nn.Linear(16, 16)) for _ in range(3)])
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(32, 32)) for _ in range(2)])
            for block in self.layers:
                block[0].register_buffer("values", torch.zeros(32, 32, dtype=torch.int8))
                block[0].weight = None

    assert blocks_of(Decoder())[0] == "layers"
