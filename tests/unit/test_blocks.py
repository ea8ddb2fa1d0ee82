"""Blocks run one by one give the bits of the whole pass, for every architecture here."""

from dataclasses import replace

import pytest
import torch
from checkpoints import VOCABULARY
from families import built
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lowrank_core.models import ModelHandle
from lowrank_core.models.blocks import BlockRunner
from lowrank_core.models.handle import blocks_of, find_layers

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LAYER_TYPES = ["sliding_attention", "full_attention"] * 2


def models() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    falcon = {name: value for name, value in SIZES.items() if name not in ("intermediate_size", "num_key_value_heads")}
    neox = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    return {
        "opt": OPTForCausalLM(
            OPTConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=64,
                word_embed_proj_dim=16,
            )
        ),
        "gemma2": Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, sliding_window=4, layer_types=LAYER_TYPES)),
        "gemma3": Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4, layer_types=LAYER_TYPES)),
        "qwen2 sliding": Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, layer_types=LAYER_TYPES)),
        "falcon": FalconForCausalLM(FalconConfig(**falcon)),
        "gpt-neox": GPTNeoXForCausalLM(GPTNeoXConfig(**neox)),
    }


def handled(module: PreTrainedModel, like: ModelHandle) -> ModelHandle:
    module.eval().requires_grad_(False)
    return replace(like, module=module, layers=find_layers(module))


@pytest.fixture(params=[*models()])
def other(request: pytest.FixtureRequest, llama: ModelHandle) -> ModelHandle:
    return handled(models()[request.param], llama)


def whole_pass(handle: ModelHandle, ids: Tensor) -> list[Tensor]:
    """Return what each block hands on in one plain pass."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, output: seen.append(output if isinstance(output, Tensor) else output[0]))
        for block in blocks_of(handle.module)[1]
    ]
    with torch.inference_mode():
        handle.module.base_model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def chained(handle: ModelHandle, ids: Tensor) -> list[Tensor]:
    runner, result = BlockRunner(handle), []
    with torch.inference_mode():
        for index in range(len(runner.names)):
            result.append(runner.run(index, ids, result[-1] if result else None))
    return result


def check(handle: ModelHandle) -> None:
    ids = torch.randint(0, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0))
    for one, all_ in zip(chained(handle, ids), whole_pass(handle, ids), strict=True):
        assert one.dtype == all_.dtype
        assert torch.equal(one, all_)


def test_chained_blocks_give_the_bits_of_the_whole_pass(any_handle: ModelHandle):
    check(any_handle)


def test_masks_that_differ_by_block_come_from_the_model(other: ModelHandle):
    check(other)


def test_hidden_states_stay_in_the_model_s_dtype(llama: ModelHandle):
    module = type(llama.module)(llama.module.config).to(torch.bfloat16)
    check(handled(module, llama))
    assert chained(handled(module, llama), torch.zeros(1, 4, dtype=torch.long))[0].dtype == torch.bfloat16


def test_a_block_with_replaced_layers_is_run_as_it_is(llama: ModelHandle):
    module = type(llama.module)(llama.module.config)
    module.load_state_dict(llama.module.state_dict())
    module.get_submodule("model.layers.0.mlp").down_proj = nn.Sequential(nn.Linear(80, 4), nn.Linear(4, 32))
    check(handled(module, llama))


def test_a_fresh_runner_goes_on_in_the_middle(any_handle: ModelHandle):
    ids = torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    first, second = whole_pass(any_handle, ids)
    kept = first.clone()
    assert torch.equal(BlockRunner(any_handle).run(1, ids, first), second)
    assert torch.equal(first, kept)


def test_blocks_that_return_tuples_are_met_in_their_own_form(llama: ModelHandle):
    """Some architectures return (hidden, None) from a block and take its first part."""
    module = type(llama.module)(llama.module.config)

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: tuple[Tensor, None] | Tensor, **options: object) -> tuple[Tensor, None]:
            return self.inner(hidden if isinstance(hidden, Tensor) else hidden[0], **options), None

    class Unwrapped(nn.Module):
        def forward(self, hidden: tuple[Tensor, None]) -> Tensor:
            assert isinstance(hidden, tuple)
            assert len(hidden) == 2
            return module.model.final(hidden[0])

    module.model.final = module.model.norm
    module.model.norm = Unwrapped()
    for index, block in enumerate(module.model.layers):
        module.model.layers[index] = Wrapped(block)
    handle = handled(module, llama)
    check(handle)
    ids = torch.zeros(1, 4, dtype=torch.long)
    first, second = whole_pass(handle, ids)
    assert torch.equal(BlockRunner(handle).run(1, ids, first), second)


def test_hooks_of_the_caller_see_the_block(any_handle: ModelHandle):
    ids = torch.zeros(1, 4, dtype=torch.long)
    layers = [layer for layer in any_handle.layers if layer.shape.depth == 1]
    seen: list[int] = []
    runner = BlockRunner(any_handle)
    hook = any_handle.module.get_submodule(layers[0].name).register_forward_pre_hook(lambda _, arguments: seen.append(1))
    runner.run(1, ids, runner.run(0, ids, None))
    hook.remove()
    assert seen == [1]


def test_the_model_is_left_as_it_was(any_handle: ModelHandle):
    def broken(*arguments: object) -> None:
        raise RuntimeError("a hook of the caller fails")

    runner, ids = BlockRunner(any_handle), torch.zeros(1, 4, dtype=torch.long)
    hidden = runner.run(0, ids, None)
    hook = any_handle.module.get_submodule(runner.names[1]).register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="hook of the caller"):
        runner.run(1, ids, hidden)
    hook.remove()
    for module in any_handle.module.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks


def with_a_state(llama: ModelHandle) -> ModelHandle:
    """The tiny Llama with a block that adds what the block before it left behind, as blocks that share keys and values do."""
    module = type(llama.module)(llama.module.config)
    left: list[Tensor] = []
    module.model.layers[0].mlp.register_forward_hook(lambda _, __, output: left.append(output))
    module.model.layers[1].mlp.register_forward_hook(lambda _, __, output: output + left[-1])
    return handled(module, llama)


class WithWeights(nn.Module):
    """A block that returns something before its hidden states, as BLOOM, MPT, GPT-Neo and GPT-1 return attention weights after them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor | tuple[Tensor | None, Tensor], **options: object) -> tuple[Tensor, Tensor]:
        return torch.ones(2), self.inner(hidden[1] if isinstance(hidden, tuple) else hidden, **options)


def test_what_a_block_adds_to_its_hidden_states_is_left_to_it(llama: ModelHandle):
    module = type(llama.module)(llama.module.config)
    module.model.layers[0] = WithWeights(module.model.layers[0])
    module.model.layers[1].register_forward_pre_hook(lambda _, arguments: (arguments[0][1], *arguments[1:]))
    runner = BlockRunner(handled(module, llama))
    ids = torch.zeros(1, 4, dtype=torch.long)
    first = runner.run(0, ids, None)
    assert runner.chained
    assert first.shape == (1, 4, 32)
    assert torch.equal(runner.run(1, ids, first), runner.run(1, ids, None))


def test_a_state_that_passes_by_the_blocks_is_noticed(llama: ModelHandle):
    """Even where the state of the pass before is still there: it is of other tokens."""
    runner = BlockRunner(with_a_state(llama))
    assert runner.obstacle == "model.layers.1 gives something else without the blocks before it"
    runner.run(1, torch.zeros(1, 4, dtype=torch.long), None)


def test_blocks_in_another_order_are_no_chain(llama: ModelHandle):
    module = type(llama.module)(llama.module.config)
    layers = module.model.layers
    module.model.layers = nn.ModuleList([*layers])
    module.model.layers.__class__ = type("Backwards", (nn.ModuleList,), {"__getitem__": lambda self, index: [*self][::-1][index]})
    assert BlockRunner(handled(module, llama)).obstacle == "its blocks are not run once each, in their order"


def test_a_model_that_never_gives_the_same_bits_twice_is_a_chain_up_to_rounding(llama: ModelHandle):
    """On a GPU the order of a sum may differ from pass to pass."""
    module = type(llama.module)(llama.module.config)
    calls = [0]
    module.model.layers[0].mlp.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    module.model.layers[1].mlp.register_forward_hook(lambda _, __, output: output * (1 + 1e-7 * calls[0]))
    assert BlockRunner(handled(module, llama)).chained


CHAINED = ("bloom", "mpt", "gpt_neo", "openai-gpt", "deepseek_v3", "mamba", "rwkv", "jamba", "xlstm", "recurrent_gemma", "zamba2")
WHOLE = ("gemma3n_text", "gemma4_text")


@pytest.mark.parametrize("name", CHAINED)
def test_families_whose_blocks_are_a_chain(name: str, llama: ModelHandle):
    handle = handled(built(name), llama)
    runner = BlockRunner(handle)
    assert runner.chained, runner.obstacle
    check(handle)


@pytest.mark.parametrize("name", WHOLE)
def test_families_that_share_keys_and_values_take_whole_passes(name: str, llama: ModelHandle):
    assert not BlockRunner(handled(built(name), llama)).chained
