"""The forms in which compressed matrices are stored: each behaves as a linear layer, and none loses what its factors hold."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from lowrank_core.errors import ConfigError, NumericalError
from lowrank_core.layers.base import CompressedModule
from lowrank_core.layers.forms import FORMS, STORAGES, Factors, HeadFactors, build_layers
from lowrank_core.layers.heads import OutputHeads, ValueHeads
from lowrank_core.layers.pivoted import PivotedLinear
from lowrank_core.layers.stacked import StackedLinear
from lowrank_core.models import LowRankLinear
from lowrank_core.models.unrolled import replace_module

N = 12
SIZES = {"single": (10,), "stack": (10, 4, 4), "uneven": (2, 11)}


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _factors(sizes: tuple[int, ...], rank: int, *, bias: bool, n: int = N) -> Factors:
    ups = tuple(_random(size, rank, seed=index) for index, size in enumerate(sizes))
    biases = tuple(_random(size, seed=10 + index) if bias else None for index, size in enumerate(sizes))
    return Factors(ups, _random(rank, n, seed=20), biases)


def _built(factors: Factors, storage: str, dtype: torch.dtype = torch.float64, *, trained: bool = False) -> list[StackedLinear]:
    likes = [torch.empty(len(up), N, dtype=dtype, requires_grad=trained) for up in factors.ups]
    names = [f"layer {index}" for index in range(len(likes))]
    layers = build_layers(names, factors, storage, likes)
    assert list(layers) == names
    assert all(isinstance(layer, FORMS[storage]) for layer in layers.values())
    return list(layers.values())  # type: ignore[arg-type]


def _heads(rank: int, *, bias: bool, groups: int = 2, heads: int = 4, head_dim: int = 5) -> HeadFactors:
    biases = (_random(groups, rank, seed=2), _random(9, seed=3)) if bias else (None, None)
    return HeadFactors(_random(groups, rank, N), biases[0], _random(heads, 9, rank, seed=1), biases[1], head_dim)


def _built_heads(factors: HeadFactors, dtype: torch.dtype = torch.float64, *, trained: bool = False) -> tuple[ValueHeads, OutputHeads]:
    like = torch.empty(1, dtype=dtype, requires_grad=trained)
    value, output = build_layers(("v", "o"), factors, "pivoted", (like, like)).values()
    assert isinstance(value, ValueHeads)
    assert isinstance(output, OutputHeads)
    return value, output


def _one_of_each(*, bias: bool, trained: bool = False) -> Iterator[CompressedModule]:
    for storage in STORAGES:
        yield _built(_factors((10,), 3, bias=bias), storage, trained=trained)[0]
        yield from _built(_factors((6, 4), 5, bias=bias), storage, trained=trained)
    yield from _built_heads(_heads(3, bias=bias), trained=trained)


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def modules(request: pytest.FixtureRequest) -> list[CompressedModule]:
    return list(_one_of_each(bias=request.param))


# --- nothing is lost, and this many numbers are stored ---------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rank", [1, 2, 5, 9, 10])
@pytest.mark.parametrize("storage", STORAGES)
def test_every_form_holds_its_factors_in_the_counted_numbers(storage: str, rank: int, sizes: tuple[int, ...], bias: bool):
    factors, inputs = _factors(sizes, rank, bias=bias), _random(7, N, seed=30)
    layers = _built(factors, storage)
    for layer, up, own in zip(layers, factors.ups, factors.biases, strict=True):
        assert (layer.in_features, layer.out_features, layer.rank) == (N, len(up), rank)
        torch.testing.assert_close(layer.weight, up @ factors.down)
        torch.testing.assert_close(layer(inputs), functional.linear(inputs, up @ factors.down, own))
        assert own is None or torch.equal(layer.bias, own)
    square = rank * rank if storage == "pivoted" else 0
    stored = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    assert stored == rank * (sum(sizes) + N) - square + (sum(sizes) if bias else 0)
    indices = [buffer for layer in layers for name, buffer in layer.state_dict().items() if name == "pivots"]
    assert sum(index.numel() for index in indices) == (rank if storage == "pivoted" else 0)
    assert all(index.dtype == torch.int32 for index in indices)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("heads", [2, 4])
def test_heads_hold_their_factors_in_the_counted_numbers(heads: int, rank: int, bias: bool):
    factors = _heads(rank, bias=bias, heads=heads)
    value, output = _built_heads(factors)
    inputs = _random(7, N, seed=30)
    values = value(inputs)
    assert values.shape == (7, 2 * 5)
    assert not values.reshape(7, 2, 5)[..., rank:].any()
    carried = values.reshape(7, 2, 5).repeat_interleave(heads // 2, dim=1).flatten(1)  # what attention to itself alone hands on
    expected = torch.zeros(7, 9, dtype=torch.float64)
    for head in range(heads):
        group = head // (heads // 2)
        own = None if factors.value_biases is None else factors.value_biases[group]
        expected += functional.linear(functional.linear(inputs, factors.values[group], own), factors.outputs[head])
    torch.testing.assert_close(output(carried), expected + (0 if factors.output_bias is None else factors.output_bias))
    torch.testing.assert_close(values, functional.linear(inputs, value.weight, value.bias))
    torch.testing.assert_close(output(carried), functional.linear(carried, output.weight, output.bias))
    assert sum(p.numel() for p in value.parameters()) == 2 * rank * (N - rank) + (2 * rank if bias else 0)
    assert sum(p.numel() for p in output.parameters()) == heads * 9 * rank + (9 if bias else 0)
    assert value.pivots.numel() == 2 * rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(64,), (32, 32)], ids=str)
def test_pivoting_adds_no_more_than_rounding(sizes: tuple[int, ...], dtype: torch.dtype):
    """As for factors with a decaying spectrum, at every rank; the reference is in float64."""
    left, values, right = torch.linalg.svd(_random(64, 48))
    left, right = left[:, :48] * values * torch.arange(1, 49) ** -0.5, right[:48]
    inputs = _random(100, 48, seed=3)
    for rank in range(1, 49):
        factors = Factors(left[:, :rank].split(sizes), right[:rank], (None,) * len(sizes))
        reference = inputs @ (left[:, :rank] @ right[:rank]).T
        errors = {}
        for storage in STORAGES:
            likes = [torch.empty(1, dtype=dtype) for _ in sizes]
            layers = build_layers([str(index) for index in range(len(sizes))], factors, storage, likes)
            outputs = torch.cat([layer(inputs.to(dtype)) for layer in layers.values()], dim=-1)
            errors[storage] = float((outputs - reference).norm() / reference.norm())
        assert errors["pivoted"] <= 3 * errors["factored"], rank
        assert errors["pivoted"] <= 8 * torch.finfo(dtype).eps, rank


def test_the_largest_coefficient_is_reported():
    layer = _built(_factors((10,), 3, bias=False), "pivoted")[0]
    assert isinstance(layer, PivotedLinear)
    assert layer.largest_coefficient == float(layer.coefficients.abs().max())
    assert _built(_factors((10,), 10, bias=False), "pivoted")[0].largest_coefficient == 0.0  # type: ignore[union-attr]


def test_layers_take_dtype_and_training_from_the_dense_ones_and_own_their_numbers():
    factors = _factors((6, 4), 3, bias=True)
    likes = (torch.empty(1, dtype=torch.bfloat16, requires_grad=True), torch.empty(1, dtype=torch.float64))
    for storage in STORAGES:
        first, second = build_layers(("a", "b"), factors, storage, likes).values()
        assert {(p.dtype, p.requires_grad) for p in first.parameters()} == {(torch.bfloat16, True)}
        assert {(p.dtype, p.requires_grad) for p in second.parameters()} == {(torch.float64, False)}
    untouched = factors.down.clone()
    layer = _built(factors, "factored")[0]
    with torch.no_grad():
        layer.down.zero_()
    assert torch.equal(factors.down, untouched)


def test_what_can_not_be_built_is_told():
    factors = _factors((6, 4), 3, bias=True)
    likes = (torch.empty(1),) * 2
    with pytest.raises(ConfigError, match=r"storage: 'sparse' is not known\. Choose from factored, pivoted"):
        build_layers(("a", "b"), factors, "sparse", likes)
    large = Factors(tuple(1e39 * up for up in factors.ups), 1e39 * factors.down, factors.biases)
    for storage in STORAGES:
        with pytest.raises(NumericalError, match=r"a: its factors overflow in torch\.float32"):
            build_layers(("a", "b"), large, storage, likes)
    for values, outputs in [((2, 3, 12), (3, 9, 3)), ((2, 3, 12), (4, 9, 2)), ((2, 6, 12), (4, 9, 6))]:
        with pytest.raises(ConfigError, match="don't fit"):
            HeadFactors(_random(*values), None, _random(*outputs), None, 5)


# --- as nn.Linear ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (5,), (2, 5), (2, 1, 5), (0,), (2, 0, 3)], ids=str)
def test_any_leading_shape(modules: list[CompressedModule], leading: tuple[int, ...]):
    for module in modules:
        inputs = _random(*leading, module.in_features)
        outputs = module(inputs)
        assert outputs.shape == (*leading, module.out_features)
        torch.testing.assert_close(outputs, functional.linear(inputs, module.weight, module.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_casts_leave_the_indices_alone(modules: list[CompressedModule], dtype: torch.dtype):
    whole = nn.ModuleList(modules)
    reference = [module(torch.eye(module.in_features, dtype=torch.float64)).detach() for module in modules]
    whole.to(dtype)
    for module, expected in zip(modules, reference, strict=True):
        assert {parameter.dtype for parameter in module.parameters()} == {dtype}
        outputs = module(torch.eye(module.in_features, dtype=dtype))
        assert outputs.dtype == dtype
        limit = 20 * torch.finfo(dtype).eps * float(expected.abs().max())
        torch.testing.assert_close(outputs.double(), expected, atol=limit, rtol=0)
        if hasattr(module, "pivots"):
            assert module.pivots.dtype == torch.int32


@pytest.mark.parametrize("assign", [True, False])
def test_state_round_trips_into_an_empty_copy(modules: list[CompressedModule], assign: bool):
    whole = nn.ModuleList(modules)
    assert not [name for name in whole.state_dict() if name.endswith("order")]
    empty = copy.deepcopy(whole).to("meta")
    if not assign:
        empty = empty.to_empty(device="cpu")
    empty.load_state_dict(whole.state_dict(), assign=assign)
    for module, other in zip(modules, empty, strict=True):
        if isinstance(module, PivotedLinear | ValueHeads) and assign:
            assert other.order.device.type == "cpu"
        inputs = _random(5, module.in_features)
        assert torch.equal(other(inputs), module(inputs))


def test_damaged_indices_are_not_loaded():
    layer = _built(_factors((10,), 3, bias=False), "pivoted")[0]
    state = layer.state_dict()
    for damaged in ([3, 3, 5], [5, 3, 1], [0, 1, 10], [-1, 0, 1]):
        with pytest.raises(RuntimeError, match="are damaged"):
            layer.load_state_dict(state | {"pivots": torch.tensor(damaged, dtype=torch.int32)})


def test_a_copy_stands_alone(modules: list[CompressedModule]):
    whole = nn.ModuleList(modules)
    twin = copy.deepcopy(whole)
    before = [module(_random(3, module.in_features)) for module in modules]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    for module, expected, other in zip(modules, before, twin, strict=True):
        inputs = _random(3, module.in_features)
        assert torch.equal(module(inputs), expected)
        assert not torch.allclose(other(inputs), expected)


def test_layers_work_without_memory_behind_them(modules: list[CompressedModule]):
    whole = nn.ModuleList(modules).to("meta")
    for module in whole:
        assert module(torch.empty(2, module.in_features, dtype=torch.float64, device="meta")).shape == (2, module.out_features)
        assert module.weight.shape == (module.out_features, module.in_features)


def test_gradients_are_right():
    for bias in (True, False):
        for module in _one_of_each(bias=bias, trained=True):
            names = [name for name, _ in module.named_parameters()]
            tensors = [parameter.detach().clone().requires_grad_() for _, parameter in module.named_parameters()]
            inputs = _random(2, module.in_features).requires_grad_()

            def call(x: Tensor, *values: Tensor, module: nn.Module = module, names: list[str] = names) -> Tensor:
                return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

            assert torch.autograd.gradcheck(call, (inputs, *tensors))


def test_a_stack_trains_its_shared_factor_once():
    for storage in STORAGES:
        factors = _factors((6, 4), 3, bias=False)
        leader, follower = _built(factors, storage, trained=True)
        inputs = _random(5, N)
        (leader(inputs).square().sum() + follower(inputs).square().sum()).backward()
        dense = [layer.weight.detach().requires_grad_() for layer in (leader, follower)]
        sum(functional.linear(inputs, weight).square().sum() for weight in dense).backward()
        if storage == "factored":
            expected = sum(up.T @ weight.grad for up, weight in zip(factors.ups, dense, strict=True))
            torch.testing.assert_close(leader.down.grad, expected)
        assert follower.down is None


def test_layers_compile_as_one_graph(modules: list[CompressedModule]):
    """Captured whole, and differentiated ahead of time."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList(modules)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [member(functional.pad(x, (0, member.in_features - N))) for member in self.members]

    whole, inputs = Whole(), _random(2, 3, N)
    torch.compiler.reset()
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            for ours, expected in zip(compiled(inputs), whole(inputs), strict=True):
                torch.testing.assert_close(ours, expected)


def test_layers_work_under_autocast_and_vmap(modules: list[CompressedModule]):
    for module in nn.ModuleList(modules).float():
        inputs = torch.randn(4, module.in_features)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            outputs = module(inputs)
        assert outputs.dtype == torch.bfloat16
        expected = module(inputs)
        torch.testing.assert_close(outputs.float(), expected, atol=0.1 * float(expected.detach().abs().max()), rtol=0)
        with torch.no_grad():
            torch.testing.assert_close(torch.vmap(module)(inputs), expected.detach())


def test_layers_tell_what_they_are(modules: list[CompressedModule]):
    for module in modules:
        assert f"rank={module.rank}" in repr(module)
        assert type(module).__name__ in repr(module)


# --- stacks: one factor, one product ---------------------------------------------------------------------------------


@pytest.fixture(params=list(STORAGES))
def stack(request: pytest.FixtureRequest) -> Iterator[list[StackedLinear]]:
    with torch.no_grad():
        yield _built(_factors((6, 4, 5), 3, bias=False), request.param)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The widths of the matrices that inputs are multiplied by, in order."""
    widths: list[int] = []
    linear = functional.linear

    def counted(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        widths.append(weight.shape[1])
        return linear(input, weight, bias)

    monkeypatch.setattr(functional, "linear", counted)
    return widths


def _call(stack: list[StackedLinear], inputs: Tensor) -> list[Tensor]:
    return [layer(inputs) for layer in stack]


def test_a_shared_factor_is_held_once(stack: list[StackedLinear]):
    whole = nn.ModuleList(stack)
    assert [name for name in whole.state_dict() if name.endswith("down")] == ["0.down"]
    assert len(list(whole.modules())) == 1 + len(stack)
    twin = copy.deepcopy(whole)
    assert all(layer.leader is twin[0] for layer in twin)
    assert twin[0] is not whole[0]
    assert pickle.loads(pickle.dumps(whole))[1].leader.rank == 3


def test_one_input_is_multiplied_once(stack: list[StackedLinear], products: list[int]):
    inputs = _random(7, N)
    _call(stack, inputs)
    assert products.count(N) == 1
    _call(stack, inputs)
    assert products.count(N) == 2
    _call(stack, inputs.clone()[:])
    assert products.count(N) == 3


def test_other_inputs_are_multiplied_anew(stack: list[StackedLinear], products: list[int]):
    for layer in stack:
        inputs = _random(7, N)
        torch.testing.assert_close(layer(inputs), functional.linear(inputs, layer.weight))
    assert products.count(N) == 2 * len(stack)


def _inputs_in_place(stack: list[StackedLinear], inputs: Tensor) -> None:
    inputs.mul_(2)


def _inputs_exchanged(stack: list[StackedLinear], inputs: Tensor) -> None:
    inputs.data = 3 * inputs


def _factor_in_place(stack: list[StackedLinear], inputs: Tensor) -> None:
    stack[0].down.mul_(2)


def _factor_exchanged(stack: list[StackedLinear], inputs: Tensor) -> None:
    stack[0].down.data = 2 * stack[0].down.data


def _factor_replaced(stack: list[StackedLinear], inputs: Tensor) -> None:
    stack[0].down = nn.Parameter(2 * stack[0].down, requires_grad=False)


def _state_loaded(stack: list[StackedLinear], inputs: Tensor) -> None:
    stack[0].load_state_dict({name: value * 2 if name == "down" else value for name, value in stack[0].state_dict().items()})


CHANGES: list[Callable[[list[StackedLinear], Tensor], None]] = [
    _inputs_in_place,
    _inputs_exchanged,
    _factor_in_place,
    _factor_exchanged,
    _factor_replaced,
    _state_loaded,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_no_stale_product_is_read(stack: list[StackedLinear], change: Callable[[list[StackedLinear], Tensor], None]):
    inputs = _random(7, N)
    first = stack[0](inputs)
    change(stack, inputs)
    torch.testing.assert_close(stack[1](inputs), functional.linear(inputs, stack[1].weight))
    assert not torch.allclose(stack[0](inputs), first)


def test_nothing_is_shared_where_gradients_are_recorded(stack: list[StackedLinear], products: list[int]):
    inputs = _random(7, N)
    stack[0](inputs)
    with torch.enable_grad():
        assert stack[1](inputs.requires_grad_()).requires_grad
        _call(stack, inputs)
    assert stack[0]._memory.empty
    assert products.count(N) == 2 + len(stack)


def test_tensors_without_versions_are_not_remembered(stack: list[StackedLinear]):
    with torch.inference_mode():
        inputs = _random(7, N).clone()
        stack[0](inputs)
        inputs.mul_(2)
        torch.testing.assert_close(stack[1](inputs), functional.linear(inputs, stack[1].weight))
    assert stack[0]._memory.empty


def test_products_are_not_kept_alive(stack: list[StackedLinear]):
    inputs = _random(7, N)
    _call(stack, inputs)
    assert stack[0]._memory.empty  # the last follower took it
    stack[0](inputs)
    assert not stack[0]._memory.empty
    assert copy.deepcopy(stack[0])._memory.empty
    gone = weakref.ref(inputs)
    del inputs
    gc.collect()
    assert gone() is None
    assert stack[0]._memory.empty  # nobody can ask for it any more


def test_a_single_layer_remembers_nothing():
    for storage in STORAGES:
        layer = _built(_factors((6,), 3, bias=False), storage)[0]
        with torch.no_grad():
            layer(inputs := _random(7, N))
        assert layer._memory.empty
        assert inputs is not None


# --- heads in real models --------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


def _llama(groups: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=groups))


def _llama_with_biases(groups: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=groups, attention_bias=True, head_dim=8))


def _qwen2(groups: int) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=groups))


def _dense_heads(model: PreTrainedModel, attention: nn.Module, rank: int) -> HeadFactors:
    """The heads of an attention as they are, truncated to their first dimensions."""
    head_dim, groups = attention.head_dim, model.config.num_key_value_heads
    value, output = attention.v_proj, attention.o_proj
    return HeadFactors(
        values=value.weight.detach().double().reshape(groups, head_dim, -1)[:, :rank],
        value_biases=None if value.bias is None else value.bias.detach().double().reshape(groups, head_dim)[:, :rank],
        outputs=output.weight.detach().double().reshape(len(output.weight), -1, head_dim).transpose(0, 1)[..., :rank],
        output_bias=None if output.bias is None else output.bias.detach().double(),
        head_dim=head_dim,
    )


def _with_heads(model: PreTrainedModel, dropped: int = 0) -> PreTrainedModel:
    model = copy.deepcopy(model)
    for depth, block in enumerate(model.model.layers):
        names = [f"model.layers.{depth}.self_attn.{kind}" for kind in ("v_proj", "o_proj")]
        likes = [model.get_submodule(name).weight for name in names]
        factors = _dense_heads(model, block.self_attn, block.self_attn.head_dim - dropped)
        for name, module in build_layers(names, factors, "factored", likes).items():
            replace_module(model, name, module)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("make", [_llama, _llama_with_biases, _qwen2], ids=lambda make: make.__name__[1:])
def test_whole_heads_give_the_dense_logits(make: Callable[[int], PreTrainedModel], groups: int, attention: str, dtype: torch.dtype):
    torch.manual_seed(0)
    model = make(groups).to(dtype).eval()
    model.set_attn_implementation(attention)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    ids = torch.tensor([[3, 9, 27, 41, 5, 8], [2, 4, 8, 16, 32, 7]])
    with torch.no_grad():
        dense, ours = model(input_ids=ids).logits, _with_heads(model)(input_ids=ids).logits
        torch.testing.assert_close(ours, dense, atol=1e3 * torch.finfo(dtype).eps, rtol=0)
        narrower = _with_heads(model, dropped=1)(input_ids=ids).logits
    assert (narrower - dense).abs().max() > 1e-4


def test_the_first_exported_form_is_still_the_default():
    assert next(iter(FORMS)) == LowRankLinear.form == "factored"
