"""What the Export page says that will be written is what is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lowrank_core.compression.build import CompressedModel
from lowrank_core.compression.decomposed import decompose
from lowrank_core.config import CalibrationConfig, CompressionConfig, ExportConfig, ModelSource, SearchConfig
from lowrank_core.export import export
from lowrank_core.models import ModelHandle, describe, load_model
from lowrank_core.models.attention import head_units
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.studio.export.export_list import loading_of
from lowrank_core.studio.export.export_plan import Source, files_of, planned, runtimes
from lowrank_core.studio.shared.model_facts import ModelFacts, _facts
from lowrank_core.text import WindowSet

COMPRESSIONS = {
    "factored": CompressionConfig(basis="pooled_feature", value_dense=False),
    "pivoted": CompressionConfig(basis="whitened", storage="pivoted", value_dense=False),
    "stacks and heads": CompressionConfig(basis="shared_input:whitened", storage="pivoted", value_dense=False, heads=True),
}
CONFIGS = (
    ExportConfig(),
    ExportConfig(dtype="bfloat16", max_shard_size="40KB"),
    ExportConfig(quantization="int8"),
    ExportConfig(quantization="int4"),
    ExportConfig(dense_quantization="int4"),
    ExportConfig(quantization="int4", dense_quantization="int8", rounding="nearest", dtype="bfloat16"),
    ExportConfig(quantization="int4_128", dtype="bfloat16"),
    ExportConfig(quantization="int8", dtype="bfloat16", with_code=True),
    ExportConfig(form="plain"),
    ExportConfig(form="dense"),
)
HEADER = 20_000


@pytest.fixture(scope="module", params=COMPRESSIONS)
def made(request: pytest.FixtureRequest, llama: ModelHandle, windows: WindowSet) -> tuple[CompressionConfig, CompressedModel]:
    config = COMPRESSIONS[request.param]
    decomposed = decompose(llama, collect_statistics(llama, windows, CalibrationConfig(group_size=8)), config)
    heads = [unit.name for unit in decomposed.units if unit.storage == "per_head"]
    fixed: dict[str, int | None] = dict.fromkeys(heads, 5)
    return config, decomposed.compress(decomposed.allocate("lagrangian" if heads else "uniform", 0.4, fixed=fixed), windows)


@pytest.fixture(scope="module")
def facts(llama: ModelHandle) -> ModelFacts:
    return _facts({**json.loads(json.dumps(describe(llama))), "heads": [unit.describe() for unit in head_units(llama)]})


def searched(compression: CompressionConfig) -> SearchConfig:
    return SearchConfig(0.4, variables="error_weight", compression=compression)


def stored(folder: Path) -> tuple[int, int]:
    """Return numbers and bytes of all tensors in the weight files, read by safetensors itself."""
    numbers = size = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as archive:
            for name in archive.keys():  # noqa: SIM118  (the archive is no mapping)
                tensor: torch.Tensor = archive.get_tensor(name)
                numbers, size = numbers + tensor.numel(), size + tensor.nbytes
    return numbers, size


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.folder_name("as"))
def test_the_planned_bytes_are_those_of_the_tensors_that_are_written(
    config: ExportConfig, made: tuple[CompressionConfig, CompressedModel], facts: ModelFacts, tmp_path: Path
):
    compression, model = made
    units = facts.units(compression)
    reported = planned(
        facts,
        units,
        Source("a", "a", 1, ranks=model.report.ranks),
        SearchConfig(0.4, variables="error_weight", compression=compression),
        config,
    )
    export(model, tmp_path / "out", provenance={}, config=config)
    numbers, size = stored(tmp_path / "out")
    files = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert reported.bytes == size
    if "int4" in config.quantization + config.dense_quantization:
        assert numbers <= reported.parameters  # two of them are in a byte
    else:
        assert numbers == reported.parameters
    assert size < sum(files) < size + HEADER
    assert reported.exact or (config.form == "dense" and compression.basis == "pooled_feature")
    listed = " ".join(name for name, _ in files_of(reported, config))
    assert ("index.json" in listed) == (len(files) > 1)
    assert ("modeling_lowrank.py" in listed) == (tmp_path / "out" / "modeling_lowrank.py").exists()
    body = json.loads((tmp_path / "out" / "lowrank.json").read_text())
    assert (body["stored_dtype"], body["written_parameters"]) == (reported.dtype, reported.parameters)


def test_where_only_the_worker_knows_the_ranks_the_plan_is_an_upper_bound(
    made: tuple[CompressionConfig, CompressedModel], facts: ModelFacts
):
    compression, model = made
    units, search = (
        facts.units(compression),
        SearchConfig(0.4, variables="error_weight", compression=compression),
    )
    for config in CONFIGS:
        bound = planned(facts, units, Source("energy", "", "energy"), search, config)
        exact = planned(facts, units, Source("a", "", 1, ranks=model.report.ranks), search, config)
        assert not bound.exact or config.form == "dense"
        assert bound.bytes >= exact.bytes, config


def test_scales_of_int8_are_exact_in_the_dtype_that_is_written(
    made: tuple[CompressionConfig, CompressedModel], tmp_path: Path, windows: WindowSet
):
    """Next to it: scales that are exact in float32 alone move when they are cast."""
    from lowrank_core.compression.quantization import grids_of, quantized_handle
    from lowrank_core.layers.quantized import Int8Matrix

    _, model = made
    export(model, tmp_path / "out", provenance={}, config=ExportConfig(quantization="int8", dtype="bfloat16"))
    loaded = load_model(ModelSource(str(tmp_path / "out")))
    grids = grids_of(model.handle, "int8", "none")
    once = dict(quantized_handle(model.handle, grids, scales=torch.bfloat16).module.named_modules())
    wide = dict(quantized_handle(model.handle, grids, scales=torch.float32).module.named_modules())
    result = {name: child for name, child in loaded.module.named_modules() if isinstance(child, Int8Matrix)}
    assert result
    assert all(torch.equal(child.scales, once[name].scales) for name, child in result.items())
    assert any(not torch.equal(child.scales, wide[name].scales) for name, child in result.items())


def test_who_can_load_it_follows_the_form():
    def loads(config: ExportConfig) -> list[str]:
        return list(runtimes(config)["loads"])

    assert loads(ExportConfig()) == ["yes", "yes", "no", "yes", "no", "no"]
    assert loads(ExportConfig(with_code=True)) == ["yes", "yes", "yes", "yes", "no", "no"]
    assert loads(ExportConfig(form="plain")) == ["yes", "yes", "yes", "yes", "yes", "no"]
    assert loads(ExportConfig(form="dense")) == ["yes"] * 6


def test_folders_of_different_choices_have_different_names():
    usual = ExportConfig()
    assert usual.folder_name("trial 7") == "trial-7"
    changes = {"form": "dense", "with_code": True, "dtype": "bfloat16", "max_shard_size": "2GB", "quantization": "int8"}
    names = {replace(usual, **{name: value}).folder_name("trial 7") for name, value in changes.items()}  # type: ignore[arg-type]
    assert len(names) == len(changes)
    assert replace(usual, max_shard_size="50000MB").folder_name("a") == "a"
    assert replace(usual, max_shard_size="1.5 KB").shard_bytes == 1500


WAYS = (ExportConfig(), ExportConfig(with_code=True), ExportConfig(form="plain"), ExportConfig(form="dense"))


@pytest.mark.slow
@pytest.mark.parametrize("config", WAYS, ids=lambda config: config.folder_name("as"))
def test_the_lines_of_python_load_the_folder(config: ExportConfig, made: tuple[CompressionConfig, CompressedModel], tmp_path: Path):
    folder, root = tmp_path / "out", str(Path(__file__).parents[2])
    export(made[1], folder, provenance={}, config=config)
    for way in (
        way
        for way in loading_of(Path("out"), config.form, with_code=config.with_code, auto_class="AutoModelForCausalLM")
        if way.language == "python"
    ):
        code = f"{way.code}\nassert len(tokenizer)\nassert model.num_parameters()\nprint(type(model).__name__)"
        places = {"PYTHONPATH": root if "import lowrank_core" in way.code else "", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env={**os.environ, **places})
        assert "ForCausalLM" in done.stdout
