"""Checkpoints that also see or hear: what transformers loads is loaded, and its text decoder is compressed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from multimodal import MULTIMODAL, saved
from transformers import AutoModelForCausalLM

from lowrank_core import export
from lowrank_core.allocation import allocate
from lowrank_core.compression.decomposed import decompose
from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource
from lowrank_core.errors import ModelError
from lowrank_core.evaluation import evaluate
from lowrank_core.models import load_model
from lowrank_core.models.handle import blocks_of, describe
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.studio.overview.checkpoint import read_model
from lowrank_core.text import WindowSet

CAUSAL = [name for name in MULTIMODAL if name != "paligemma"]
PLAIN = CompressionConfig(basis="whitened", stacks=False, heads=False)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_text_decoder_is_compressed_and_the_rest_is_kept(name: str, tmp_path: Path, sample_text: str, windows: WindowSet):
    """The part that sees has five blocks, the decoder two."""
    folder = saved(name, tmp_path / "model", sample_text)
    handle = load_model(ModelSource(str(folder)))
    path, blocks = blocks_of(handle.module)
    assert len(blocks) == 2
    assert not any(word in path for word in ("vision", "visual", "audio"))
    facts = describe(handle)
    assert (facts["vocabulary"], facts["hidden"], facts["max_context"]) == (300, 32, 64)
    decomposed = decompose(handle, collect_statistics(handle, windows, CalibrationConfig(group_size=8)), PLAIN)
    model = decomposed.compress(allocate("uniform", decomposed.units, 0.3), windows)
    export(model, tmp_path / "smaller")
    again = load_model(ModelSource(str(tmp_path / "smaller")))
    assert evaluate(again, windows).perplexity == pytest.approx(evaluate(model.handle, windows).perplexity, rel=1e-5)
    known = {key: value for key, value in model.handle.module.state_dict().items() if "vision" in key or "visual" in key or "audio" in key}
    assert all(torch.equal(again.module.state_dict()[key], value) for key, value in known.items())


@pytest.mark.parametrize("name", CAUSAL)
def test_the_card_says_how_to_load_it(name: str, tmp_path: Path, sample_text: str, windows: WindowSet):
    handle = load_model(ModelSource(str(saved(name, tmp_path / "model", sample_text))))
    decomposed = decompose(handle, collect_statistics(handle, windows, CalibrationConfig(group_size=8)), PLAIN)
    export(decomposed.compress(allocate("uniform", decomposed.units, 0.3), windows), tmp_path / "smaller")
    loader = str(describe(handle)["auto_class"])
    assert f"import {loader}, AutoTokenizer" in (tmp_path / "smaller" / "README.md").read_text(encoding="utf-8")
    assert type(getattr(transformers, loader).from_pretrained(tmp_path / "smaller")) is type(handle.module)


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_a_folder_whose_tensors_have_other_names_than_its_modules_is_of_today(
    name: str, tmp_path: Path, sample_text: str, windows: WindowSet
):
    """transformers saves both under the names of earlier versions; the guards are under such names, too."""
    folder = saved(name, tmp_path / "model", sample_text)
    handle = load_model(ModelSource(str(folder)))
    decomposed = decompose(handle, collect_statistics(handle, windows, CalibrationConfig(group_size=8)), PLAIN)
    export(decomposed.compress(allocate("uniform", decomposed.units, 0.3), windows), tmp_path / "smaller")
    for place in (folder, tmp_path / "smaller"):
        contents = read_model(place)
        assert not contents.notes
        assert dict(contents.facts.coverage.parameters) == dict(load_model(ModelSource(str(place))).coverage.parameters)
        assert (contents.facts.vocabulary, contents.facts.hidden, contents.facts.blocks) == (300, 32, 2)


@pytest.mark.parametrize("name", CAUSAL)
def test_nothing_is_refused_that_transformers_loads_as_a_causal_model(name: str, tmp_path: Path, sample_text: str):
    folder = saved(name, tmp_path, sample_text)
    try:
        plain = AutoModelForCausalLM.from_pretrained(folder)
    except ValueError:
        assert "AutoModelForMultimodalLM" in str(describe(load_model(ModelSource(str(folder))))["auto_class"])
        return
    assert type(load_model(ModelSource(str(folder))).module) is type(plain)


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path, sample_text: str):
    """PaliGemma reads its whole prompt at once."""
    with pytest.raises(ModelError, match=r"PaliGemmaForConditionalGeneration\) is not causal: its logits depend on later tokens\. Give"):
        load_model(ModelSource(str(saved("paligemma", tmp_path, sample_text))))


def test_a_model_that_can_t_be_run_on_text_says_why(tmp_path: Path, sample_text: str, monkeypatch: pytest.MonkeyPatch):
    folder = saved("llava", tmp_path, sample_text)

    def broken(*_: object, **__: object) -> None:
        raise IndexError("no image")

    monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "forward", broken)
    with pytest.raises(ModelError, match=r"can't be run on text alone: no image\. Check its config\.json"):
        load_model(ModelSource(str(folder)))
