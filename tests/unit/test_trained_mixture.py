"""A mixture of eight experts, trained for a minute on our text: what compression loses there, and what few tokens cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from lowrank_core.compression.build import compress
from lowrank_core.compression.decomposed import Decomposed, decompose
from lowrank_core.compression.pipeline import Pipeline
from lowrank_core.config import CompressionConfig, ModelSource, TextConfig
from lowrank_core.evaluation import evaluate
from lowrank_core.statistics.calibration import LayerStatistics
from lowrank_core.statistics.moments import InputStatistics
from lowrank_core.text import load_text

pytestmark = pytest.mark.slow

DEMO = Path(__file__).parents[2] / "assets" / "demo-lm"
WIDTH, EXPERTS = 64, 8


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("mixture")
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    _trained(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = TextConfig("python-stdlib", context=64, calibration_windows=48, validation_windows=2, test_windows=48)
    return Pipeline(ModelSource(str(folder)), text, compression="studio")


def _trained(tokenizer: object) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=4096,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    module = MixtralForCausalLM(config).train()
    ids = load_text(TextConfig("python-stdlib", context=64, calibration_windows=1600, test_windows=2), tokenizer).calibration.ids
    optimizer = torch.optim.AdamW(module.parameters(), lr=4e-3)
    for batch in ids.split(8):
        loss = module(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 6.5  # of log 4096 = 8.3: it has learned something
    return module.eval()


def kl(pipeline: Pipeline, model: object) -> float:
    report = evaluate(model.handle, pipeline.windows.test, against=pipeline.handle)
    assert report.kl is not None
    return report.kl


def test_our_recipe_loses_a_third_of_what_plain_svd_of_each_expert_does(pipeline: Pipeline):
    ours = pipeline.compress(0.4)
    plain = pipeline.under(CompressionConfig(basis="weight_svd")).compress(0.4, allocator="uniform")
    for model in (ours, plain):
        assert model.report.compression_ratio >= 0.4 - 1e-9
    assert 3 * kl(pipeline, ours) < kl(pipeline, plain)


def test_experts_with_few_tokens_are_no_worse_than_with_the_moments_of_all(pipeline: Pipeline):
    """Their own moments, mixed with those of the mixture, against the mixture's alone."""
    config = CompressionConfig(basis="whitened")
    statistics = pipeline.under(config).statistics
    few = [name for name, entry in statistics.inputs.items() if ".experts." in name and entry.count < 4 * entry.width]
    assert few
    losses = [
        _loss_of(pipeline, decompose(pipeline.handle, given, config), few)
        for given in (statistics, replace(statistics, inputs=_of_all(statistics)))
    ]
    assert losses[0] <= losses[1]


def _of_all(statistics: LayerStatistics) -> Mapping[str, InputStatistics]:
    """Return the statistics with the mean of its mixture in place of each expert's, by the number of its tokens."""
    result = dict(statistics.inputs.items())
    mixtures: dict[str, list[str]] = {}
    for name in result:
        if ".experts." in name:
            owner, layer = name.rsplit(".", 2)[0], name.rsplit(".", 1)[1]
            mixtures.setdefault(f"{owner}.{layer}", []).append(name)
    for names in mixtures.values():
        entries = [result[name] for name in names]
        total = sum(entry.count for entry in entries)
        second = sum(
            (entry.second_moment * (entry.count / total) for entry in entries[1:]), entries[0].second_moment * (entries[0].count / total)
        )
        for name, entry in zip(names, entries, strict=True):
            result[name] = replace(entry, mean=torch.zeros_like(entry.mean), sample=second * (entry.count / max(entry.count - 1, 1)))
    return result


def _loss_of(pipeline: Pipeline, decomposed: Decomposed, inputs: list[str]) -> float:
    """Return KL with only the matrices of ``inputs`` compressed, to a quarter of their rank."""
    ranks = {
        unit.name: unit.max_rank // 4 if unit.members[0].input_group in inputs and len(unit.members) == 1 else None
        for unit in decomposed.units
    }
    allocation = replace(decomposed.allocate("uniform", 0.1), ranks=ranks)
    return kl(pipeline, compress(pipeline.handle, decomposed.bases, allocation))
