"""The tokens along a direction are those that an independent computation finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import load_family

from lowrank_core.config import CalibrationConfig
from lowrank_core.config.directions import SIDES, DirectionsConfig
from lowrank_core.errors import ConfigError, ModelError
from lowrank_core.models import ModelHandle
from lowrank_core.models.experts import Routed
from lowrank_core.models.handle import weight_of
from lowrank_core.statistics.calibration import LayerStatistics, collect_statistics
from lowrank_core.statistics.directions import top_directions
from lowrank_core.text import WindowSet


def _statistics(handle: ModelHandle, windows: WindowSet) -> LayerStatistics:
    return collect_statistics(handle, windows, CalibrationConfig(group_size=8))


def _inputs(handle: ModelHandle, windows: WindowSet, name: str) -> torch.Tensor:
    seen = []
    hook = handle.module.get_submodule(name).register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        handle.module(input_ids=windows.ids, use_cache=False)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double()


@pytest.mark.parametrize("side", SIDES)
def test_tokens_are_those_of_largest_projection_in_standard_deviations(any_handle: ModelHandle, windows: WindowSet, side: str) -> None:
    layer = any_handle.layers[-1]
    statistics = _statistics(any_handle, windows)
    config = DirectionsConfig(layer.name, side, directions=3, tokens=4, windows=windows.windows, batch_size=7)
    result = top_directions(any_handle, windows, statistics, config)

    inputs = statistics.inputs[layer.input_group]
    rows = _inputs(any_handle, windows, layer.name) - inputs.mean
    covariance = inputs.pooled
    if side == "output":
        weight = weight_of(any_handle.module.get_submodule(layer.name)).detach().double()
        rows, covariance = rows @ weight.T, weight @ covariance @ weight.T
    values, vectors = np.linalg.eigh(covariance.numpy())
    assert [direction.share for direction in result.directions] == pytest.approx(list(values[::-1][:3] / values.sum()))
    for index, direction in enumerate(result.directions, start=1):
        projections = np.abs(rows.numpy() @ vectors[:, -index]) / np.sqrt(values[-index])
        best: dict[int, float] = {}
        for token, value in zip(windows.ids.flatten().tolist(), projections, strict=True):
            best[token] = max(best.get(token, 0.0), value)
        ranked = sorted(best, key=lambda token: -best[token])[:4]
        assert [hit.token for hit in direction.tokens] == [any_handle.tokenizer.decode([token]) for token in ranked]
        assert [abs(hit.projection) for hit in direction.tokens] == pytest.approx([best[token] for token in ranked], rel=1e-4)
        assert direction.tokens[0].projection > 0


def test_the_context_is_what_stands_around_the_token(llama: ModelHandle, windows: WindowSet) -> None:
    config = DirectionsConfig(llama.layers[0].name, directions=1, tokens=1)
    result = top_directions(llama, windows, _statistics(llama, windows), config)
    (hit,) = result.directions[0].tokens
    texts = [llama.tokenizer.decode(row.tolist(), clean_up_tokenization_spaces=False) for row in windows.first(32).ids]
    assert any(hit.before + hit.token + hit.after in text for text in texts)
    assert "32 windows of 16 tokens, 512 tokens, float32" in result.protocol


def test_the_tokens_of_an_expert_are_those_that_are_routed_to_it(tmp_path: Path, sample_text: str, windows: WindowSet) -> None:
    handle = load_family(tmp_path, sample_text, "mixtral")
    statistics = _statistics(handle, windows)
    name = next(layer.name for layer in handle.layers if layer.shape.expert == 1)
    result = top_directions(handle, windows, statistics, DirectionsConfig(name, directions=1, tokens=5, windows=windows.windows))
    reached: list[torch.Tensor] = []
    owner = handle.module.get_submodule(name.rpartition(".")[0])
    hook = handle.module.get_submodule(name).register_forward_pre_hook(lambda *_: reached.append(owner.routed.tokens))
    with torch.no_grad():
        handle.module(input_ids=windows.ids, use_cache=False)
    hook.remove()
    texts = {handle.tokenizer.decode([token]) for token in windows.ids.flatten()[reached[0]].tolist()}
    assert 0 < len(reached[0]) < windows.ids.numel()
    assert {hit.token for hit in result.directions[0].tokens} <= texts
    assert f"{len(reached[0]):,} of which are routed to the expert" in result.protocol


def test_an_expert_that_no_token_reaches_says_why_and_what_to_do(tmp_path: Path, sample_text: str, windows: WindowSet) -> None:
    handle = load_family(tmp_path, sample_text, "mixtral")
    statistics = _statistics(handle, windows)
    name = next(layer.name for layer in handle.layers if layer.shape.expert == 0)
    mixture = handle.module.get_submodule(name.rsplit(".", 2)[0])
    routing, nothing = mixture.routing, Routed(torch.empty(0), torch.empty(0, dtype=torch.int64))
    mixture.routing = lambda *arguments: [nothing, *routing(*arguments)[1:]]
    with pytest.raises(ModelError, match=r"none of the 32 tokens of 2 windows is routed to the expert of .* Take more windows, or another"):
        top_directions(handle, windows, statistics, DirectionsConfig(name, windows=2))


def test_the_model_is_left_as_it_was(llama: ModelHandle, windows: WindowSet) -> None:
    statistics = _statistics(llama, windows)
    top_directions(llama, windows, statistics, DirectionsConfig(llama.layers[0].name, windows=2))
    assert not any(child._forward_pre_hooks for child in llama.module.modules())


def test_bad_choices_are_told(llama: ModelHandle, windows: WindowSet) -> None:
    with pytest.raises(ConfigError, match=r"no compressible module 'no.such'; one is model.layers.0"):
        top_directions(llama, windows, _statistics(llama, windows), DirectionsConfig("no.such"))
    with pytest.raises(ConfigError, match="side must be one of input, output; got 'left'"):
        DirectionsConfig("a", side="left")
    with pytest.raises(ConfigError, match="directions must be at most 32, got 99"):
        DirectionsConfig("a", directions=99)
    with pytest.raises(ConfigError, match="windows must be at least 1, got 0"):
        DirectionsConfig("a", windows=0)
