"""The model card and the manifest: what they say is so, and the hub can read it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from exported import all_forms, logits_of
from huggingface_hub import ModelCard

from lowrank_core.compression.build import CompressedModel
from lowrank_core.compression.quantization import grids_of, quantized
from lowrank_core.config import ExportConfig, ModelSource, TextConfig
from lowrank_core.errors import ModelError, TextError
from lowrank_core.evaluation import evaluate
from lowrank_core.export import HeldOut, export, held_out, metrics_of, read_manifest
from lowrank_core.export import base_model as base_model_module
from lowrank_core.export.base_model import base_model_of
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.text import WindowSet, load_windows

PROVENANCE = {"preset": "studio", "basis": "two_sided", "allocation": "lagrangian", "command": "lowrank compress --model here"}


@pytest.fixture(scope="module")
def dense(llama_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelHandle:
    """A checkpoint with a card and a licence, as they come from a hub."""
    folder = Path(shutil.copytree(llama_checkpoint, tmp_path_factory.mktemp("base") / "base"))
    head = {"license": "other", "license_name": "tiny-1", "license_link": "LICENSE", "language": ["en"], "base_model": "someone/tiny"}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(head)}---\n# Tiny\n")
    (folder / "LICENSE").write_text("Do as you like.")
    return load_model(ModelSource(str(folder)))


@pytest.fixture(scope="module")
def model(dense: ModelHandle) -> CompressedModel:
    return all_forms(dense)


@pytest.fixture(scope="module")
def folder(model: CompressedModel, dense: ModelHandle, windows: WindowSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("card") / "out"
    report = evaluate(model.handle, windows, against=dense).to_mapping()
    figures = metrics_of(report, healed={**report, "perplexity": 1.5, "perplexity_interval": (1.25, 1.75)})
    export(model, out, provenance=PROVENANCE, figures=figures, test=HeldOut(TextConfig("python-stdlib"), windows))
    return out


def test_the_hub_can_read_the_head(folder: Path):
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert data["license"] == "other"
    assert data["license_name"] == "tiny-1"
    assert data["base_model"] == "someone/tiny"
    assert data["library_name"] == "transformers"
    assert data["language"] == ["en"]
    assert {"low-rank", "compression", "studio", "two_sided"} <= set(data["tags"])


def test_the_licence_goes_along(folder: Path):
    assert (folder / "LICENSE").read_text() == "Do as you like."
    assert "That of the base model goes with what was made of it: tiny-1. Its files are copied here: `LICENSE`." in _card(folder)


def _card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_the_text_has_method_sizes_ranks_figures_and_command(folder: Path, model: CompressedModel):
    card, report = _card(folder), model.report
    assert "(preset `studio`, basis `two_sided`, allocation `lagrangian`)" in card
    assert f"| parameters of the model | {report.parameters_before:,} | {report.parameters_after:,} | {1 - 21848 / 31264:.1%} |" in card
    assert "| self_attn.q_proj + self_attn.k_proj + self_attn.v_proj | 1 | 12 | 12 | 12 |" in card
    assert "| self_attn.v_proj + self_attn.o_proj | 1 | 6 | 6 | 6 |" in card
    assert "| mlp.gate_proj | 1 | 12 | 12 | 12 |" in card  # one stack of two blocks
    assert "1 others stay dense" in card
    rows = [line.split(" | ")[0] for line in card.splitlines() if line.startswith(("| dense", "| compressed", "| healed"))]
    assert rows == ["| dense", "| compressed", "| healed"]
    assert "| healed | 1.500 | 1.250 to 1.750 |" in card
    assert card.count("random tokens, calibration split: 40 non-overlapping windows of 16 tokens") == 2
    assert "```bash\nlowrank compress --model here\n```" in card
    assert "import lowrank_core.models.hf  # registers" in card
    assert "trust_remote_code" not in card


def test_a_card_without_figures_says_so(model: CompressedModel, tmp_path: Path):
    export(model, tmp_path / "out", provenance={}, config=ExportConfig(with_code=True))
    card = _card(tmp_path / "out")
    assert "Not measured when this was written." in card
    assert "trust_remote_code=True" in card
    assert "nan" not in card.lower().split()


def test_the_manifest_says_what_is_there(folder: Path, model: CompressedModel, windows: WindowSet):
    manifest = read_manifest(folder)
    assert manifest.form == "compressed"
    assert manifest.stored_dtype == "float32"
    assert manifest.written_parameters == model.report.parameters_after
    assert manifest.written_bytes == (folder / "model.safetensors").stat().st_size
    assert manifest.details["basis"] == "two_sided"
    assert manifest.measured is not None
    protocol = manifest.measured.protocol
    assert (protocol.text, protocol.split, protocol.windows, protocol.context) == ("python-stdlib", "calibration", 40, 16)
    assert (protocol.dtype, protocol.sha256) == ("float32", windows.sha256)
    assert manifest.measured.perplexity == pytest.approx(evaluate(load_model(ModelSource(str(folder))), windows).perplexity, rel=1e-9)
    assert {"lowrank-studio", "python", "torch", "transformers", "safetensors"} == set(manifest.versions)


def test_eight_bits_are_told_and_merge_to_dense(model: CompressedModel, tmp_path: Path):
    small = quantized(model, grids_of(model.handle, "int8", "none"))
    manifest = export(small, tmp_path / "out", provenance={})
    assert "quantization `int8`" in _card(tmp_path / "out")
    assert manifest.written_parameters == small.report.parameters_after
    export(small, tmp_path / "dense", provenance={}, config=ExportConfig(form="dense"))
    read = [logits_of(load_model(ModelSource(str(tmp_path / name))).module) for name in ("out", "dense")]
    torch.testing.assert_close(read[0], read[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(read[0], logits_of(small.handle.module), rtol=0, atol=1e-5)


def test_what_is_measured_is_what_was_written(model: CompressedModel, windows: WindowSet, tmp_path: Path):
    """Rounding to bfloat16 changes the model, and the figure is of the rounded one."""
    test = HeldOut(TextConfig("python-stdlib"), windows)
    manifest = export(model, tmp_path / "out", provenance={}, config=ExportConfig(dtype="bfloat16"), test=test)
    assert manifest.measured is not None
    assert manifest.measured.protocol.dtype == "float32"
    assert manifest.measured.nll != evaluate(model.handle, windows).nll
    assert manifest.measured.nll == evaluate(load_model(ModelSource(str(tmp_path / "out"))), windows).nll


@pytest.mark.parametrize("content", ["", "no json", "[]", '{"made_from": "x"}', '{"files": {"a": 1}, "measured": null}'])
def test_a_manifest_that_is_none_is_told(content: str, tmp_path: Path):
    (tmp_path / "lowrank.json").write_text(content)
    with pytest.raises(ModelError, match=r"lowrank\.json of .* is damaged, or of an earlier version\. Export the model again"):
        read_manifest(tmp_path)


def test_a_folder_without_a_manifest_is_told(tmp_path: Path):
    with pytest.raises(ModelError, match=r"has no lowrank\.json\. Give a folder written by"):
        read_manifest(tmp_path)


def test_held_out_windows_are_those_of_the_test_split(dense: ModelHandle, text_file: Path):
    config = TextConfig(f"file:{text_file}", context=32, test_windows=5)
    result = held_out(dense, config)
    assert result.windows.sha256 == load_windows(config, dense.tokenizer, "test", count=5).sha256
    with pytest.raises(TextError, match="fewer than one window"):
        held_out(dense, TextConfig(f"file:{text_file}", context=10**6))


# --- the base model --------------------------------------------------------------------------------------------------


def test_the_bundled_model_is_known():
    base = base_model_of("demo")
    assert (base.licence, base.repository) == ("apache-2.0", None)


def test_a_base_model_without_a_card_is_unknown(llama_checkpoint: Path, tmp_path: Path):
    base = base_model_of(str(llama_checkpoint))
    assert base.licence == "unknown: check the base model"
    export(all_forms(load_model(ModelSource(str(llama_checkpoint)))), tmp_path / "out", provenance={})
    assert "unknown: check the base model" in _card(tmp_path / "out")
    assert "license" not in ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()


@pytest.mark.parametrize("content", ["---\n[broken\n---\n", "---\n- a list\n---\n", "plain text", "\x00"])
def test_a_card_that_cant_be_read_is_as_none(content: str, llama_checkpoint: Path, tmp_path: Path):
    folder = Path(shutil.copytree(llama_checkpoint, tmp_path / "base"))
    (folder / "README.md").write_text(content)
    assert base_model_of(str(folder)).metadata == {}


def test_a_hub_model_is_known_by_its_cached_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "NOTICE").write_text("By someone.")
    cached = {name: str(tmp_path / name) for name in ("README.md", "NOTICE")}
    monkeypatch.setattr(base_model_module, "try_to_load_from_cache", lambda repository, name: cached.get(name))
    base = base_model_of("someone/tiny")
    assert (base.licence, base.repository) == ("mit", "someone/tiny")
    assert [path.name for path in base.licences] == ["NOTICE"]


def test_an_export_of_an_export_names_the_first_base(folder: Path, tmp_path: Path):
    again = load_model(ModelSource(str(folder)))
    assert base_model_of(again.reference).repository == "someone/tiny"
    assert base_model_of(again.reference).licence == "tiny-1"


def test_what_is_written_is_json(folder: Path):
    body = json.loads((folder / "lowrank.json").read_text())
    assert body["made_from"]
    assert body["compression_ratio"] > 0
