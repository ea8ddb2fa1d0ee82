"""What the commands and a run's worker write, and that it can be proven afterwards.

``tests/process/test_export_verify.py`` measures in fresh processes; here the same answer to the same request is given by this one.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from lowrank_core.cli import main
from lowrank_core.config import ModelSource
from lowrank_core.export import read_manifest, verification
from lowrank_core.export.manifest import Measurement, measurement_from
from lowrank_core.models import load_model
from lowrank_core.runs import client, open_run, read_json


@pytest.fixture(scope="module")
def source(llama_checkpoint: Path, text_file: Path) -> list[str]:
    return ["--model", str(llama_checkpoint), "--text", f"file:{text_file}", "--context", "32", "--windows", "40"]


@pytest.fixture(scope="module")
def run(source: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_HOME", str(folder.parent / "home"))
        assert main(["search", *source, "--preset", "svd", "--compression-ratio", "0.3", "--trials", "2", "--run", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def verified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start no process to verify in: it would import torch for as long as ten of these tests take."""

    def answered(request: Mapping[str, object], _: object) -> Measurement:
        said = io.StringIO()
        with monkeypatch.context() as patch, contextlib.redirect_stdout(said):
            patch.setattr("sys.stdin", io.StringIO(json.dumps(request)))
            verification._answer()
        return measurement_from(json.loads(said.getvalue()))

    monkeypatch.setattr(verification, "_in_fresh_process", answered)


def _printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, object]:
    status = main([*map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    body: dict[str, object] = json.loads(captured.out)
    return body


def test_compress_writes_a_folder_that_verifies(source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--preset", "svd", "--compression-ratio", "0.3", "--with-code", "--max-shard-size", "30KB", "--out", str(tmp_path / "out")]
    body = _printed(capsys, "compress", *source, *options)
    assert (tmp_path / "out" / "modeling_lowrank.py").is_file()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    details = read_manifest(tmp_path / "out").details
    assert str(details["command"]).startswith(f"lowrank compress --model {source[1]} --text {source[3]}")
    assert details["preset"] == "svd"
    verified = _printed(capsys, "verify", "--model", tmp_path / "out")
    assert verified["ok"]
    assert verified["recorded"] == body["perplexity"]


def test_compress_merges_to_dense(source: list[str], llama_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--preset", "svd", "--compression-ratio", "0.3", "--form", "dense", "--out", str(tmp_path / "out")]
    body = _printed(capsys, "compress", *source, *options)
    merged = load_model(ModelSource(str(tmp_path / "out")))
    assert merged.parameters == load_model(ModelSource(str(llama_checkpoint))).parameters
    assert _printed(capsys, "verify", "--model", tmp_path / "out")["recorded"] == body["perplexity"]


def test_a_text_without_a_test_split_is_told_and_compressed_all_the_same(
    llama_checkpoint: Path, sample_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = tmp_path / "short.txt"
    text.write_text(sample_text[:400])
    source = ["--model", str(llama_checkpoint), "--text", f"file:{text}", "--context", "60", "--windows", "4"]
    body = _printed(capsys, "compress", *source, "--preset", "svd", "--compression-ratio", "0.3", "--out", tmp_path / "out")
    assert body["perplexity"] is None
    assert "the written model is not measured: text: the test split of file:short.txt has" in str(body["warnings"])
    assert "Not measured when this was written" in (tmp_path / "out" / "README.md").read_text()


def test_export_writes_as_it_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    body = _printed(capsys, "export", "--run", run, "--trial", 0, "--dtype", "bfloat16", "--with-code", "--out", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.stored_dtype, manifest.with_code, manifest.form) == ("bfloat16", True, "compressed")
    assert manifest.details["run"] == open_run(run).id
    assert manifest.details["basis"] == "weight_svd"
    assert f"lowrank export --run {run} --trial 0 --dtype bfloat16" in (tmp_path / "out" / "README.md").read_text()
    assert _printed(capsys, "verify", "--model", tmp_path / "out")["recorded"] == body["perplexity"]


def test_a_bad_choice_is_told_at_once(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "out"), "--form", "sparse"]) == 2
    assert "form must be one of compressed, plain, dense" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_search_leaves_an_export_with_the_figures_of_its_trial(run: Path):
    [folder] = (run / "exports").iterdir()
    manifest = read_manifest(folder)
    assert manifest.measured is not None
    rows = manifest.figures["perplexity"]
    assert set(rows) == {"dense", "compressed"}
    assert rows["compressed"]["perplexity"] == pytest.approx(manifest.measured.perplexity, rel=1e-5)
    assert "lowrank export --run" in (folder / "README.md").read_text()


def test_a_worker_exports_and_verifies(run: Path, capsys: pytest.CaptureFixture[str]):
    record = open_run(run)
    wanted = [
        ("export", {"trial": 0, "form": "dense"}),
        ("export", {"trial": 0, "form": "sparse"}),
        ("verify", {"path": "uniform-dense"}),
        ("verify", {"path": "../../elsewhere"}),
        ("compare", {"trial": "dense:int4_gptq"}),
        ("export", {"trial": 0, "quantization": "int4", "dense_quantization": "int8", "rounding": "gptq"}),
        ("compare", {"trial": "dense:int3"}),
    ]
    requests = [client.submit(record, kind, launch=False, **arguments) for kind, arguments in wanted]
    assert main(["worker", "--run", str(run)]) == 0
    written, refused, verified, missing, dense, small, unknown = (read_json(client.result_path(record, request)) for request in requests)
    assert written["ok"], written
    assert written["path"] == str(run / "exports" / "uniform-dense")
    assert read_manifest(Path(str(written["path"]))).form == "dense"
    assert not refused["ok"]
    assert "form must be one of" in str(refused["error"])
    assert verified["ok"], verified
    result = verified["verification"]
    assert result["ok"]
    assert result["measured"] == pytest.approx(result["recorded"])
    assert not missing["ok"]
    assert "no export 'elsewhere'" in str(missing["error"])
    assert dense["ok"], dense
    assert set(dense["ranks"].values()) == {None}
    assert 0 < dense["report"]["kl"] < 1
    assert dense["report"]["bytes"] < 0.5 * dense["report"]["dense_bytes"]
    assert small["ok"], small
    assert read_manifest(Path(str(small["path"]))).details["quantization"] == "int4"  # no layer stays dense
    assert "dense must be one of int8, int4," in str(unknown["error"])


def test_factors_are_written_in_8_bits(source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--preset", "pifa", "--compression-ratio", "0.3"]
    plain = _printed(capsys, "compress", *source, *options, "--out", tmp_path / "plain")
    small = _printed(capsys, "compress", *source, *options, "--quantize", "int8", "--with-code", "--out", tmp_path / "small")
    assert small["quantization"] == "int8"
    assert small["ranks"] == plain["ranks"]
    assert float(str(small["bytes_after"])) < float(str(plain["bytes_after"]))
    assert small["perplexity"] != plain["perplexity"]
    verified = _printed(capsys, "verify", "--model", tmp_path / "small")
    assert verified["ok"]
    assert load_model(ModelSource(str(tmp_path / "small"))).bytes == small["bytes_after"]
    assert "quantization `int8`" in (tmp_path / "small" / "README.md").read_text()


def test_8_bits_need_factors(source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--preset", "pifa", "--compression-ratio", "0.3", "--quantize", "int8", "--form", "dense", "--out", str(tmp_path / "out")]
    assert main(["compress", *source, *options]) == 2
    assert "a dense folder holds floats alone" in capsys.readouterr().err


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_dense_model_is_written_in_4_bits(rounding: str, source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Nothing is decomposed for it, and rounding to nearest calibrates nothing."""
    options = ["--compression-ratio", "0", "--quantize-dense", "int4", "--rounding", rounding]
    small = _printed(capsys, "compress", *source, *options, "--out", tmp_path / "small")
    assert small["quantization"] == "dense layers int4"
    assert set(small["ranks"].values()) == {None}
    assert ("Calibrating" in small["stages"]) == (rounding == "gptq")
    assert "Factorising" not in small["stages"]
    assert _printed(capsys, "verify", "--model", tmp_path / "small")["ok"]
    assert load_model(ModelSource(str(tmp_path / "small"))).bytes == small["bytes_after"]
    assert float(small["written_bytes"]) / float(small["bytes_after"]) >= 1


REFUSED = {
    "nothing to do": (["--compression-ratio", "0"], "0 would remove nothing"),
    "no grid": (["--compression-ratio", "0.3", "--rounding", "gptq"], "--rounding is of what is quantised"),
    "slopes": (["--compression-ratio", "0", "--quantize-dense", "int4", "--slopes"], "leave --tune and --slopes out"),
    "bits": (["--compression-ratio", "0.3", "--quantize", "int3"], "must be one of none, int8, int4, int4_128"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_quantised_so_is_refused(case: str, source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options, reason = REFUSED[case]
    assert main(["compress", *source, *options, "--out", str(tmp_path / "out")]) == 2
    assert reason in capsys.readouterr().err
