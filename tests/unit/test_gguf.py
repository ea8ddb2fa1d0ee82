"""Models in GGUF files: read by transformers, known from their headers, compressed and exported as ordinary folders."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import save_checkpoint
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import lowrank_core.models.gguf as reader
from lowrank_core.cli import main
from lowrank_core.config import ModelSource, RunConfig, TextConfig
from lowrank_core.errors import ModelError
from lowrank_core.files.gguf import read_gguf
from lowrank_core.models import ModelHandle, load_model, max_context, notes_of
from lowrank_core.runs import create_run
from lowrank_core.studio.overview.checkpoint import read_model
from lowrank_core.studio.overview.memory_estimate import Gpu, Machine, fit_of
from lowrank_core.studio.overview.source_checks import check_model

pytest.importorskip("gguf")

PROMPT = "the rank of a matrix, 1234 é\n\tand a budget"


@pytest.fixture(scope="module")
def floats(llama_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(llama_checkpoint, tmp_path_factory.mktemp("gguf") / "floats.gguf", quantization="F32")


@pytest.fixture(scope="module")
def quantised(llama_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(llama_checkpoint, tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf", quantization="Q8_0")


def _load(path: Path) -> ModelHandle:
    return load_model(ModelSource(str(path)))


def _logits(module: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.arange(5, 45)[None]).logits


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_file_of_floats_is_the_checkpoint_bit_for_bit(floats: Path, llama: ModelHandle):
    handle = _load(floats)
    assert torch.equal(_logits(handle.module), _logits(llama.module))
    assert handle.tokenizer(PROMPT)["input_ids"] == llama.tokenizer(PROMPT)["input_ids"]
    assert (handle.parameters, handle.linear_parameters, handle.bytes) == (llama.parameters, llama.linear_parameters, llama.bytes)
    assert handle.stored_dtype == torch.float32
    assert handle.tied


def test_a_quantised_file_is_dequantised_into_a_plain_model(quantised: Path, llama: ModelHandle):
    handle = _load(quantised)
    gap = (_logits(handle.module) - _logits(llama.module)).norm() / _logits(llama.module).norm()
    assert 0 < gap < 0.1
    assert handle.stored_dtype == torch.bfloat16
    assert not hasattr(handle.module.config, "quantization_config")
    assert {layer.name for layer in handle.layers} == {layer.name for layer in llama.layers}


def test_it_can_be_saved_and_read_again(quantised: Path, tmp_path: Path):
    """As transformers loads it, it refuses to be saved."""
    handle = _load(quantised)
    handle.module.save_pretrained(tmp_path)
    handle.tokenizer.save_pretrained(tmp_path)
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path)), _logits(handle.module))
    assert AutoTokenizer.from_pretrained(tmp_path)(PROMPT)["input_ids"] == handle.tokenizer(PROMPT)["input_ids"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path"} & config.keys()


def test_what_lies_next_to_the_file_or_in_the_current_folder_is_not_read(
    floats: Path, gpt2_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_checkpoint: Path, llama: ModelHandle
):
    folder = Path(shutil.copytree(gpt2_checkpoint, tmp_path / "mixed"))
    shutil.copyfile(floats, folder / "model.gguf")
    (folder / "adapter_config.json").write_text("{}")
    torch.manual_seed(9)
    other = save_checkpoint(tmp_path / "other", LlamaForCausalLM(llama.module.config), "other")
    (tmp_path / "here").mkdir()
    write_gguf(other, tmp_path / "here" / "model.gguf", quantization="F32")
    monkeypatch.chdir(tmp_path / "here")
    handle = _load(folder / "model.gguf")
    assert torch.equal(_logits(handle.module), _logits(llama.module))
    assert handle.tokenizer(PROMPT)["input_ids"] == llama.tokenizer(PROMPT)["input_ids"]


def test_its_identity_is_that_of_its_weights(floats: Path, quantised: Path, tmp_path: Path):
    copy = Path(shutil.copyfile(floats, tmp_path / "another-name.gguf"))
    assert _load(copy).identity == _load(floats).identity
    assert _load(quantised).identity["model"] != _load(floats).identity["model"]


def test_weights_that_transformers_has_no_place_for_are_reported(llama_checkpoint: Path, tmp_path: Path):
    """Its reader passes over them: a bias that the class lacks would silently be lost."""
    path = write_gguf(llama_checkpoint, tmp_path / "a.gguf", tensors={"blk.0.attn_q.bias": np.ones(32, np.float32)})
    with pytest.raises(ModelError, match="some weights have no place there"):
        _load(path)


def test_a_table_of_rotary_frequencies_is_told_as_lost(llama_checkpoint: Path, tmp_path: Path):
    path = write_gguf(llama_checkpoint, tmp_path / "a.gguf", tensors={"rope_freqs.weight": np.ones(4, np.float32)})
    assert "scales its rotary positions" in " ".join(notes_of(str(path)))
    _load(path)
    path = write_gguf(llama_checkpoint, tmp_path / "b.gguf", metadata={"llama.rope.scaling.type": "yarn"})
    assert "scales its rotary positions" in " ".join(notes_of(str(path)))


# --- headers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["floats", "quantised"])
def test_headers_tell_what_the_worker_finds(name: str, request: pytest.FixtureRequest):
    path: Path = request.getfixturevalue(name)
    facts, handle = check_model(str(path)), _load(path)
    assert facts is not None
    assert (facts.parameters, facts.compressible_parameters) == (handle.parameters, handle.linear_parameters)
    assert {m.name: (m.d_out, m.d_in) for m in facts.matrices} == {s.name: (s.d_out, s.d_in) for s in handle.shapes}
    assert {m.name: m.input_group for m in facts.matrices} == {s.name: s.input_group for s in handle.shapes}
    assert facts.coverage == handle.coverage
    assert (facts.blocks, facts.hidden, facts.vocabulary, facts.max_context) == (2, 32, 300, 64)
    assert facts.max_context == handle.max_context == max_context(str(path))
    assert facts.tied_embeddings


def test_sizes_are_of_the_file_and_memory_of_the_dequantised_model(quantised: Path):
    model = read_model(quantised)
    header = read_gguf(quantised)
    assert header.types.keys() == {"Q8_0", "F32"}
    assert model.facts.bytes == sum(tensor.bytes for tensor in header.tensors) < quantised.stat().st_size
    assert model.notes == notes_of(str(quantised)) == header.notes
    assert "tiny.Q8_0.gguf is a GGUF file (Q8_0 " in model.notes[0]
    config = RunConfig(model=ModelSource(str(quantised)))
    gpu = Machine(2**34, 2**34, Gpu("any", 2**34, 2**34))
    on_gpu, on_cpu = fit_of(model.facts, config, gpu), fit_of(model.facts, config, replace(gpu, gpu=None))
    assert on_gpu.lines[0].bytes == 2 * model.facts.parameters
    assert on_cpu.lines[0].bytes == 4 * model.facts.parameters


def test_every_type_that_gguf_knows_has_its_block_size(llama_checkpoint: Path):
    import gguf

    from lowrank_core.files.gguf import _TYPES

    for number, (name, elements, size) in _TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (elements, size)


def test_a_run_keeps_the_absolute_path(quantised: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(quantised.parent)
    run = create_run(RunConfig(model=ModelSource(quantised.name), text=TextConfig()))
    assert run.config.model.reference == str(quantised)


# --- refusals --------------------------------------------------------------------------------------------------------


def _write_header(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


REFUSED: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "an architecture": (
        lambda c, p: write_gguf(c, p, architecture="wavtokenizer-dec"),
        "'wavtokenizer-dec', which transformers .* not read",
    ),
    "a part": (lambda c, p: write_gguf(c, p, metadata={"split.count": 3}), "one of 3 parts. Join them"),
    "an adapter": (lambda c, p: write_gguf(c, p, metadata={"general.type": "adapter"}), "holds a LoRA adapter"),
    "a vision encoder": (lambda c, p: write_gguf(c, p, architecture="clip"), "holds a vision encoder"),
    "another format": (lambda _, p: _write_header(p, b"GGML" + bytes(64)), "is no GGUF file"),
    "nothing": (lambda _, p: _write_header(p, b""), "is no GGUF file, or it is cut short"),
    "big endian": (lambda _, p: _write_header(p, b"GGUF" + struct.pack(">IQQ", 3, 0, 0)), "is no GGUF file"),
    "a header alone": (lambda _, p: _write_header(p, b"GGUF" + struct.pack("<IQQ", 3, 0, 0)), "holds no weights"),
    "a length past the end": (lambda _, p: _write_header(p, b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62)), "cut short"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_files_that_can_not_be_read_are_refused_in_a_line(what: str, llama_checkpoint: Path, tmp_path: Path):
    make, message = REFUSED[what]
    path = make(llama_checkpoint, tmp_path / "model.gguf")
    with pytest.raises(ModelError, match=message) as refused:
        _load(path)
    assert "\n" not in str(refused.value)


def test_a_file_cut_short_is_refused_before_it_is_read(quantised: Path, tmp_path: Path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(quantised.read_bytes()[:-1000])
    for read in (_load, read_model):
        with pytest.raises(ModelError, match=r"cut\.gguf is cut short"):
            read(path)


def test_a_type_that_the_package_can_not_dequantise_is_refused(quantised: Path):
    header = read_gguf(quantised)
    tensors = tuple(replace(tensor, type="Q8_1") if tensor.type == "Q8_0" else tensor for tensor in header.tensors)
    with pytest.raises(ModelError, match="holds weights as Q8_1, which the gguf package can't dequantise"):
        reader.check_readable(replace(header, tensors=tensors))
    with pytest.raises(ModelError, match="type 99"):
        reader.check_readable(replace(header, tensors=(replace(header.tensors[0], type="type 99"),)))


def test_a_missing_package_is_named(quantised: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reader, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(ModelError, match=r"needs gguf\. Install: pip install 'lowrank-studio\[gguf\]'"):
        _load(quantised)


def test_paths_are_told_apart(quantised: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="there is no GGUF file"):
        _load(Path("missing.gguf"))
    with pytest.raises(ModelError, match="There is no GGUF file"):
        check_model("missing.gguf")
    shutil.copyfile(quantised, tmp_path / "a.gguf")
    for read in (_load, read_model):
        with pytest.raises(ModelError, match=rf"It holds GGUF files \(a\.gguf\): give one by its name, --model {tmp_path / 'a.gguf'}\."):
            read(tmp_path)


# --- the whole way ---------------------------------------------------------------------------------------------------


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, object]]:
    """Run a command, and return its JSON."""

    def run(*arguments: str) -> dict[str, object]:
        capsys.readouterr()
        assert main([*arguments, "--json"]) == 0
        body: dict[str, object] = json.loads(capsys.readouterr().out)
        return body

    return run


def test_analyze_compress_and_evaluate_take_it(quantised: Path, text_file: Path, tmp_path: Path, answer: Callable[..., dict[str, object]]):
    text = ["--text", f"file:{text_file}", "--context", "32"]
    (note,) = notes_of(str(quantised))
    analysed = answer("analyze", "--model", str(quantised), *text, "--windows", "40")
    assert note in analysed["warnings"]
    out = tmp_path / "out"
    options = ["--windows", "40", "--test-windows", "8", "--preset", "svd_llm", "--compression-ratio", "0.3", "--out", str(out)]
    made = answer("compress", "--model", str(quantised), *text, *options)
    assert note in made["warnings"]
    measured = answer("evaluate", "--model", str(out), "--against", str(quantised), *text, "--windows", "8")
    assert measured["perplexity"] == pytest.approx(made["perplexity"])

    manifest = json.loads((out / "lowrank.json").read_text())
    file = manifest["base_file"]
    assert (file["name"], file["architecture"], file["format"]) == (quantised.name, "llama", "GGUF")
    assert file["quantization"] == read_gguf(quantised).types
    assert file["bytes"] == quantised.stat().st_size
    card = (out / "README.md").read_text()
    assert note in card
    assert "license: apache-2.0" in card
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)), _logits(_load(out).module))


@pytest.mark.process
def test_verify_and_heal_take_what_was_made_of_it(
    quantised: Path, text_file: Path, tmp_path: Path, answer: Callable[..., dict[str, object]]
):
    text = ["--text", f"file:{text_file}", "--context", "32"]
    options = [
        "--windows",
        "40",
        "--test-windows",
        "8",
        "--preset",
        "svd_llm",
        "--compression-ratio",
        "0.4",
        "--out",
        str(tmp_path / "out"),
    ]
    answer("compress", "--model", str(quantised), *text, *options)
    assert answer("verify", "--model", str(tmp_path / "out"))["ok"]
    answer("heal", "--model", str(tmp_path / "out"), *text, "--windows", "8", "--steps", "4", "--out", str(tmp_path / "healed"))
    assert answer("verify", "--model", str(tmp_path / "healed"))["ok"]
    assert json.loads((tmp_path / "healed" / "lowrank.json").read_text())["base_file"]["name"] == quantised.name
