"""Every form in every way out of this process and back: plain, sharded, with code, in every dtype, on a device map."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import assert_cache_changes_nothing, save_checkpoint, small_llama
from exported import all_forms, logits_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lowrank_core.compression.build import CompressedModel
from lowrank_core.config import ExportConfig, ModelSource
from lowrank_core.errors import ConfigError, ModelError, NumericalError
from lowrank_core.export import export
from lowrank_core.models import load_model

ROOT = Path(__file__).parents[2]
CASES = ("llama", "llama-centred", "gpt2", "gpt2-centred", "qwen2", "qwen2-centred", "biased-centred")
"""Tied without biases, Conv1D with biases, untied with some biases, untied with every bias."""

PLAIN = """
import sys, numpy
if {first!r} == "transformers":
    from transformers import AutoModelForCausalLM, LlamaForCausalLM
    import lowrank_core
else:
    import lowrank_core
    assert "torch" not in sys.modules and "transformers" not in sys.modules
    import lowrank_core.models.hf
    from transformers import AutoModelForCausalLM
import torch
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert type(model).__module__.startswith("transformers.models.")
        numpy.save(folder + {suffix!r}, model(input_ids=torch.tensor([range(24)])).logits.numpy())
"""
WITHOUT_OURS = """
import sys, numpy
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lowrank_core":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
ids = torch.tensor([range(24)])
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        cached, again = (model.generate(ids[:, :4], max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use, pad_token_id=0)
                         for use in (True, False))
    assert torch.equal(cached, again)
    model.save_pretrained(folder + "-again")
    same = AutoModelForCausalLM.from_pretrained(folder + "-again", dtype=torch.float32, trust_remote_code=True)
    with torch.inference_mode():
        assert torch.equal(same(input_ids=ids).logits, logits)
    numpy.save(folder + ".code", logits.numpy())
assert not [name for name in sys.modules if name.partition(".")[0] == "lowrank_core"]
"""


@pytest.fixture(scope="module")
def biased_checkpoint(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    torch.manual_seed(5)
    config = small_llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    return save_checkpoint(tmp_path_factory.mktemp("biased"), LlamaForCausalLM(config), sample_text)


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> dict[str, CompressedModel]:
    result = {}
    for case in CASES:
        name, _, centred = case.partition("-")
        dense = load_model(ModelSource(str(request.getfixturevalue(f"{name}_checkpoint"))))
        result[case] = all_forms(dense, centred=bool(centred))
    return result


@pytest.fixture(scope="module")
def exports(models: dict[str, CompressedModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("forms")
    for case, model in models.items():
        export(model, root / case, provenance={}, config=ExportConfig(with_code=True, max_shard_size="30KB"))
    return {case: root / case for case in models}


def _run(code: str, folders: dict[str, Path], home: Path, *options: str) -> None:
    environment = {**os.environ, "HF_MODULES_CACHE": str(home), "PYTHONPATH": "" if options else str(ROOT)}
    command = [sys.executable, *options, "-c", code, *map(str, folders.values())]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=home)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("first", "suffix"), [("lowrank_core", ".ours"), ("transformers", ".theirs")])
def test_one_import_is_enough_in_a_fresh_process(
    first: str, suffix: str, models: dict[str, CompressedModel], exports: dict[str, Path], tmp_path: Path
):
    folders = exports if first == "lowrank_core" else {"llama": exports["llama"]}
    _run(PLAIN.format(first=first, suffix=suffix), folders, tmp_path)
    for case, folder in folders.items():
        np.testing.assert_allclose(np.load(f"{folder}{suffix}.npy"), logits_of(models[case].handle.module).numpy(), atol=1e-5, err_msg=case)
    assert list(tmp_path.iterdir()) == []  # no code of a folder was run


def test_a_folder_with_code_loads_where_our_package_is_absent(models: dict[str, CompressedModel], exports: dict[str, Path], tmp_path: Path):
    folders = {case: Path(shutil.copytree(exports[case], tmp_path / case)) for case in ("llama", "gpt2-centred", "qwen2")}
    (tmp_path / "modules").mkdir()
    _run(WITHOUT_OURS, folders, tmp_path / "modules", "-I")
    for case, folder in folders.items():
        np.testing.assert_allclose(np.load(f"{folder}.code.npy"), logits_of(models[case].handle.module).numpy(), atol=1e-5, err_msg=case)


@pytest.mark.parametrize("case", CASES)
def test_ours_loads_what_was_exported_and_never_its_code(case: str, models: dict[str, CompressedModel], exports: dict[str, Path]):
    loaded = load_model(ModelSource(str(exports[case])))
    assert type(loaded.module).__module__.startswith("transformers.models.")
    assert not hasattr(loaded.module.config, "auto_map")
    torch.testing.assert_close(logits_of(loaded.module), logits_of(models[case].handle.module), rtol=0, atol=1e-5)
    assert loaded.parameters == models[case].report.parameters_after
    assert_cache_changes_nothing(loaded.module)


@pytest.mark.parametrize("case", CASES)
def test_files_are_sharded_and_every_tensor_is_in_one(case: str, exports: dict[str, Path]):
    shards = sorted(exports[case].glob("model-*.safetensors"))
    assert len(shards) > 2
    names = [name for shard in shards for name in load_file(shard)]
    index = json.loads((exports[case] / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(names) == len(set(names))
    assert set(names) == set(index)
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 30_000


@pytest.mark.parametrize("case", CASES)
def test_embeddings_stay_tied_or_untied(case: str, models: dict[str, CompressedModel], exports: dict[str, Path]):
    names = [name for shard in exports[case].glob("*.safetensors") for name in load_file(shard)]
    tied = models[case].handle.module.config.tie_word_embeddings
    assert ("lm_head.weight" in names) is not tied
    module = load_model(ModelSource(str(exports[case]))).module
    assert (module.get_output_embeddings().weight is module.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("case", CASES)
def test_save_pretrained_of_a_loaded_model_round_trips(case: str, exports: dict[str, Path], tmp_path: Path):
    first = AutoModelForCausalLM.from_pretrained(exports[case], dtype=torch.float32)
    first.save_pretrained(tmp_path / "again")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits_of(first), logits_of(second))
    written = [json.loads((folder / "config.json").read_text()) for folder in (exports[case], tmp_path / "again")]
    assert written[0]["quantization_config"]["layers"] == written[1]["quantization_config"]["layers"]
    assert "auto_map" in written[0]
    assert "auto_map" not in written[1]  # the code was not copied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["llama", "qwen2-centred", "gpt2"])
def test_half_precision_is_what_rounding_makes_of_it(case: str, dtype: torch.dtype, models: dict[str, CompressedModel], tmp_path: Path):
    name = str(dtype).removeprefix("torch.")
    manifest = export(models[case], tmp_path / "half", provenance={}, config=ExportConfig(dtype=name))
    assert manifest.stored_dtype == name
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype, torch.int32}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == name
    exact = logits_of(models[case].handle.module)
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    computed = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=dtype)
    assert {tensor.dtype for tensor in computed.parameters()} == {dtype}
    # Two blocks round some thirty times between embedding and logits; errors of random sign grow with the square root: 6 eps.
    scale = 6 * torch.finfo(dtype).eps * float(exact.abs().max())
    assert 0 < (logits_of(rounded) - exact).abs().max() < scale
    assert 0 < (logits_of(computed) - exact).abs().max() < scale


def test_weights_that_overflow_are_not_written(models: dict[str, CompressedModel], tmp_path: Path):
    model = copy.deepcopy(models["llama"])
    model.handle.module.get_submodule("model.norm").weight.fill_(1e6)
    with pytest.raises(NumericalError, match=r"model\.norm\.weight: its values overflow in torch\.float16\. Write bfloat16"):
        export(model, tmp_path / "out", provenance={}, config=ExportConfig(dtype="float16"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_places_every_form(place: str | dict[str, str], models: dict[str, CompressedModel], exports: dict[str, Path]):
    for case in ("llama", "gpt2-centred"):
        loaded = AutoModelForCausalLM.from_pretrained(exports[case], dtype=torch.float32, device_map=place)
        torch.testing.assert_close(logits_of(loaded), logits_of(models[case].handle.module), rtol=0, atol=1e-5)


def test_offloaded_layers_are_refused(exports: dict[str, Path], tmp_path: Path):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ModelError, match=r"device_map offloads the compressed layer .*on one device"):
            AutoModelForCausalLM.from_pretrained(exports["llama"], device_map=places, offload_folder=tmp_path)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ExportConfig(form="sparse"), "form must be one of compressed, plain, dense; got 'sparse'"),
        (lambda: ExportConfig(dtype="int4"), "dtype must be one of auto, float32, bfloat16, float16; got 'int4'"),
        (lambda: ExportConfig(max_shard_size="2"), "max shard size must be a number with a unit from KB to TB, got '2'"),
        (lambda: ExportConfig(max_shard_size="0GB"), "max shard size"),
        (lambda: ExportConfig(form="dense", with_code=True), "a dense folder loads without any code of ours"),
    ],
)
def test_choices_that_there_are_not_are_told(build: Callable[[], object], message: str):
    with pytest.raises(ConfigError, match=message):
        build()
