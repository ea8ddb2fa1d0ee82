"""The influence of a block, streamed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank_core.statistics.influence import InfluenceAccumulator


class Adding(nn.Module):
    """A block that adds to its input in place, as the careless do."""

    def forward(self, hidden_states: Tensor | None = None, *, ids: Tensor | None = None) -> Tensor:
        assert hidden_states is not None
        hidden_states[..., 0] += 3.0
        return hidden_states


def influence(batches: list[Tensor], *, named: bool = False) -> float | None:
    block, accumulator = Adding(), InfluenceAccumulator("block")
    with accumulator.watching(block):
        for batch in batches:
            _ = block(hidden_states=batch.clone()) if named else block(batch.clone())
    assert not block._forward_pre_hooks
    assert not block._forward_hooks
    return accumulator.finish()


@pytest.mark.parametrize("named", [False, True])
def test_it_is_one_minus_the_mean_cosine_however_it_is_given(named: bool):
    states = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
    after = states.double()
    after[..., 0] = (states[..., 0] + 3.0).double()
    expected = 1 - torch.cosine_similarity(states.double(), after, dim=-1).mean()
    assert influence([states], named=named) == pytest.approx(float(expected), rel=1e-12)


def test_batches_of_any_size_give_the_same_bits():
    states = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
    assert influence([states]) == influence(list(states.split(1))) == influence(list(states.split(4)))


def test_a_token_of_zeros_has_no_direction():
    assert influence([torch.zeros(1, 4, 8)]) == 1.0


def test_any_axes_may_lie_between_window_and_token():
    """Gemma 3n hands on four hidden states for each token."""
    states = torch.randn(6, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    assert influence([states]) == pytest.approx(influence([states.flatten(1, 2)]), rel=1e-12)


def test_a_block_that_is_given_no_hidden_states_has_none():
    block, accumulator = nn.Identity(), InfluenceAccumulator("block")
    with accumulator.watching(block):
        block("no tensor")
    assert accumulator.finish() is None
