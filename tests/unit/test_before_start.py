"""What pages tell of a model before it is loaded, held against what the worker finds once it is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lowrank_core.config import CalibrationConfig, ModelSource, RunConfig, TextConfig
from lowrank_core.models import ModelHandle, describe, load_model
from lowrank_core.runs import home
from lowrank_core.statistics.calibration import cached_statistics
from lowrank_core.statistics.pooling import trimmed
from lowrank_core.studio.overview import memory_estimate
from lowrank_core.studio.overview.checkpoint import read_model
from lowrank_core.text import WindowSet


def test_headers_tell_what_the_worker_finds(any_handle: ModelHandle):
    result = read_model(Path(any_handle.reference))
    whole = load_model(ModelSource(any_handle.reference), whole=[shape.name for shape in result.facts.matrices])
    assert result.facts.matrices == whole.shapes  # how a fused projection is divided takes passes
    assert result.facts.parameters == any_handle.parameters
    assert result.facts.compressible_parameters == any_handle.linear_parameters
    assert result.facts.bytes == any_handle.bytes
    assert result.facts.max_context == any_handle.max_context
    assert sum(part.parameters for part in result.parts if part.compressible or part.why.startswith("bias")) == any_handle.linear_parameters


def test_the_estimate_of_the_disk_is_what_a_calibration_leaves_there(llama: ModelHandle, windows: WindowSet):
    config = RunConfig(
        ModelSource(llama.reference),
        TextConfig(context=windows.context, calibration_windows=windows.windows),
        CalibrationConfig(group_size=8, batch_size=4),
    )
    cached_statistics(llama, windows, config.calibration, home() / "statistics")
    result = memory_estimate.fit_of(read_model(Path(llama.reference)).facts, config, memory_estimate.this_machine())
    estimated = next(line.bytes for line in result.lines if line.part == "Statistics kept")
    stored = sum(path.stat().st_size for path in (home() / "statistics").rglob("*.safetensors"))
    assert stored == pytest.approx(estimated, rel=0.1)  # means, groups and headers come on top, and are small
    assert stored > estimated
    weights = next(line.bytes for line in result.lines if line.part == "Weights")
    if result.machine.gpu is None:
        assert weights == sum(parameter.numel() * parameter.element_size() for parameter in llama.module.parameters())


def test_groups_that_a_trimmed_pooling_keeps_out_take_memory(llama: ModelHandle):
    facts, plain = read_model(Path(llama.reference)).facts, CalibrationConfig(group_size=4)
    text = TextConfig(context=32, calibration_windows=200)  # 50 groups: 5 wait at each end
    sizes = []
    for calibration in (plain, replace(plain, robust="trimmed")):
        result = memory_estimate.fit_of(facts, RunConfig(ModelSource(llama.reference), text, calibration), memory_estimate.this_machine())
        sizes.append(next(line.bytes for line in result.lines if line.part == "Statistics of the current block"))
    assert trimmed(50) == 5
    assert sizes[1] * 5 == sizes[0] * (5 + 2 * 5)


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_is_stored_too_is_tied_only_where_it_equals_the_embedding(llama_checkpoint: Path, tmp_path: Path, equal: bool):
    folder = Path(shutil.copytree(llama_checkpoint, tmp_path / "both"))
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.clone() if equal else embedding.flip(0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    handle, result = load_model(ModelSource(str(folder))), read_model(folder)
    assert describe(handle)["tied_embeddings"] is result.facts.tied_embeddings is equal
    assert result.facts.parameters == handle.parameters == 21664 + embedding.numel() * (1 if equal else 2)
    assert result.facts.coverage == handle.coverage
