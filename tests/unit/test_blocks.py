"""Blocks run one by one give the bits of the whole pass, for every architecture here."""

from dataclasses import replace

import pytest
import torch
from checkpoints import VOCABULARY
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

from lowrank_core.errors import ModelError
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
    hook = any_handle.module.get_submodule(layers[0].name).register_forward_pre_hook(lambda _, arguments: seen.append(1))
    runner = BlockRunner(any_handle)
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


def test_blocks_that_pass_on_more_are_refused(llama: ModelHandle):
    module = type(llama.module)(llama.module.config)
    module.model.layers[0].register_forward_hook(lambda _, __, output: (output, torch.ones(1)))
    with pytest.raises(ModelError, match=r"model\.layers\.0 passes on more than hidden states"):
        BlockRunner(handled_without_layers(module, llama)).run(0, torch.zeros(1, 4, dtype=torch.long), None)


def handled_without_layers(module: PreTrainedModel, like: ModelHandle) -> ModelHandle:
    return replace(like, module=module.eval(), layers=())
