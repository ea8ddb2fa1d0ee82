"""The Export page in every case that a user meets, and what it asks of the worker."""

from __future__ import annotations

import ast
import json
import shlex
from pathlib import Path

import pytest
from synthetic import make_run, running_status, write_answers, write_front, write_healing, write_rich_study
from test_pages import sound, words

from lowrank_core.cli import parser
from lowrank_core.cli.options import config_of, source_of, text_of
from lowrank_core.config import ExportConfig, to_mapping
from lowrank_core.config.healing import HealingConfig
from lowrank_core.config.options import options_of
from lowrank_core.runs import client, write_json
from lowrank_core.runs.client import pending_requests
from lowrank_core.studies.requests import ExportRequest

REPORTED = {"Report (HTML)", "Charts (SVG, PNG, HTML)"}
TABLES = {"Allocation (JSON)", "Trials (CSV)", "Comparison (CSV)"}


@pytest.fixture(autouse=True)
def no_worker(monkeypatch):
    monkeypatch.setattr("lowrank_core.runs.client._launch", lambda run: None)


def downloads(test) -> dict[str, bool]:
    """Return label -> whether it can be pressed."""
    return {element.proto.label: not element.proto.disabled for element in test.get("download_button")}


def write_model(run, name="trial-3", proof=None, **changed):
    folder = run.path / "exports" / name
    protocol = {"line": "python-stdlib, test split, 4 windows of 32 tokens"}
    body = {"allocation": "trial 3", "form": "compressed", "stored_dtype": "bfloat16", "compression_ratio": 0.3, "written_parameters": 9000}
    body |= {"model_compression_ratio": 0.2, "ranks": {"model.layers.0.self_attn.q_proj": 5, "model.layers.1.mlp.up_proj": None}}
    write_json(folder / "lowrank.json", {**body, "measured": {"perplexity": 24.5, "protocol": protocol}, **changed})
    (folder / "model.safetensors").write_bytes(b"0" * 2048)
    (folder / "README.md").write_text("# a card")
    if proof is not None:
        write_json(
            run.path / "results" / "9.json", {"kind": "verify", "time": 1.0, "arguments": {"path": name}, "path": str(folder), **proof}
        )
    return folder


def proven(**changed) -> dict[str, object]:
    result = {"ok": True, "files": 1, "recorded": 24.5, "measured": 24.5, "difference": 0.0, "tolerance": 1e-4, "protocol": "8 windows"}
    return {"ok": True, "verification": {**result, **changed}}


def test_without_an_allocation_it_says_so_and_the_report_is_there(app):
    run = make_run(search=False)
    test = app("export", run=run.id)
    assert sound(test)
    assert "This run only analyses the model" in words(test)
    assert downloads(test) == dict.fromkeys([*REPORTED, "run.json"], True)


def test_what_will_be_written_is_told_before_and_follows_the_form(app):
    run = make_run()
    write_answers(run)
    test = app("export", run=run.id)
    assert sound(test)
    shown = words(test)
    assert "Weights" in shown
    frame = next(element.value for element in test.dataframe if "share" in element.value)
    assert list(frame["form"]) == [
        "Dense",
        "Factors",
        "Factors",
        "Factors, int8",
        "Factors, int8",
        "Factors, int4",
        "Factors, int4",
        "Plain factors",
        "Dense merge, at most",
    ]
    assert list(frame["chosen"]) == ["", "→", *[""] * 7]
    assert str(run.path / "exports" / "trial-3") in shown
    assert all(downloads(test)[name] for name in (*REPORTED, *TABLES))
    test.segmented_control(key="export_form").set_value("dense").run()
    frame = next(element.value for element in test.dataframe if "share" in element.value)
    assert frame["form"][list(frame["chosen"]).index("→")] == "Dense merge, at most"
    assert "trial-3-dense" in words(test)
    assert test.selectbox(key="export_quantization").disabled


def test_writing_is_asked_for_with_every_choice(app):
    run = make_run()
    test = app("export", run=run.id)
    test.toggle(key="export_with_code").set_value(True)
    assert test.selectbox(key="export_rounding").disabled
    test.selectbox(key="export_quantization").set_value("int8").run()
    test.selectbox(key="export_dense_quantization").set_value("int4")
    test.selectbox(key="export_rounding").set_value("gptq")
    test.selectbox(key="export_dtype").set_value("bfloat16")
    test.text_input(key="export_shard").set_value("2GB")
    test.run()
    test.button(key="export").click().run()
    assert sound(test)
    (request,) = pending_requests(run)
    assert request["kind"] == "export"
    grids = {"quantization": "int8", "dense_quantization": "int4", "rounding": "gptq"}
    assert request["arguments"] == to_mapping(ExportRequest(3, None, ExportConfig("compressed", True, "bfloat16", "2GB", **grids)))


def test_a_dense_merge_is_asked_for_without_what_it_can_not_have(app):
    run = make_run()
    test = app("export", run=run.id)
    test.toggle(key="export_with_code").set_value(True)
    test.selectbox(key="export_quantization").set_value("int8").run()
    test.segmented_control(key="export_form").set_value("dense").run()
    test.button(key="export").click().run()
    assert sound(test)
    (request,) = pending_requests(run)
    assert request["arguments"] == to_mapping(ExportRequest(3, None, ExportConfig("dense")))


def test_a_dense_merge_without_a_place_for_biases_is_refused_before_the_button_is_pressed(app):
    run = make_run()
    write_json(run.path / "model.json", {**run.part("model"), "biases_without_place": 14})
    test = app("export", run=run.id)
    assert "has no place for the biases that this metric gives up to 14 layers" in words(test)
    assert not test.button(key="export").disabled
    test.segmented_control(key="export_form").set_value("dense").run()
    assert test.button(key="export").disabled
    assert "turn on “Drop biases without a place”" in words(test)
    test.toggle(key="export_drop_biases").set_value(True).run()
    assert sound(test)
    assert not test.button(key="export").disabled


def test_a_healed_model_is_asked_for_by_its_folder_and_is_written_as_it_is_already(app):
    run = make_run()
    write_healing(run)
    name = "trial-3-distill-12345678"
    write_model(run, name, healing={"method": "distill"}, ranks={"model.layers.0.self_attn.q_proj": 5})
    test = app("export", run=run.id)
    picker = next(box for box in test.selectbox if box.label == "Allocation or healed model")
    picker.set_value(name).run()
    assert test.button(key="export").disabled
    assert "Already written" in words(test)
    test.selectbox(key="export_quantization").set_value("int8").run()
    test.button(key="export").click().run()
    assert sound(test)
    (request,) = pending_requests(run)
    assert request["arguments"] == to_mapping(ExportRequest(None, name, ExportConfig(quantization="int8")))


def shown_healed(app, **changed):
    """Return the page on which a healed model is chosen, and the text of its code blocks."""
    run = make_run()
    write_healing(run)
    name = "trial-3-distill-12345678"
    write_model(run, name, healing={"method": "distill"}, ranks={"model.layers.0.self_attn.q_proj": 5})
    request = {"label": "x, healed by distill", "allocation": "trial 3", "healing": {"method": "distill", "steps": 40}}
    write_json(run.path / "healed" / name / "request.json", {**request, **changed})
    test = app("export", run=run.id)
    next(box for box in test.selectbox if box.label == "Allocation or healed model").set_value(name).run()
    assert sound(test)
    return run, test, [block.value for block in test.code]


def test_a_healing_is_repeated_by_two_commands(app):
    run, test, codes = shown_healed(app)
    export = f"lowrank export --run {run.path} --trial 3 --out trial-3"
    (first, heal) = next(code for code in codes if "lowrank heal" in code).splitlines()
    assert first == export
    arguments = parser().parse_args(shlex.split(heal)[1:])
    assert (arguments.command, str(arguments.out)) == ("heal", "trial-3-distill-12345678")
    assert (source_of(arguments).reference, text_of(arguments)) == ("trial-3", run.config.text)
    assert config_of(arguments, HealingConfig) == HealingConfig(steps=40)
    assert "Write the one-shot model, and heal that model:" in words(test)
    test.selectbox(key="export_dtype").set_value("float32").run()
    assert any("--out trial-3-float32 --export-dtype float32\nlowrank heal --model trial-3-float32" in block.value for block in test.code)


def paths_of(codes: list[str]) -> list[str]:
    """Return the folder that each recipe names: the last command's, Python's and the server's."""
    result = []
    for code in codes:
        if "from_pretrained" in code:
            assigned = {ast.unparse(node.targets[0]): node.value for node in ast.parse(code).body if isinstance(node, ast.Assign)}
            result.append(str(ast.literal_eval(assigned["folder"])))
        elif code.startswith(("lowrank export", "lowrank compress", "lowrank heal")):
            result.append(str(parser().parse_args(shlex.split(code.splitlines()[-1])[1:]).out))
        elif code.startswith(("vllm serve", "lowrank serve")):
            result.append(shlex.split(code)[2])
    return result


@pytest.mark.parametrize("chosen", ["3", "uniform", "trial-3-distill-12345678"])
@pytest.mark.parametrize("form", ["compressed", "plain", "dense"])
def test_every_recipe_names_one_relative_path(app, chosen: str, form: str):
    run = make_run()
    write_healing(run)
    write_model(run, "trial-3-distill-12345678", healing={"method": "distill"}, ranks={"model.layers.0.self_attn.q_proj": 5})
    request = {"label": "x, healed by distill", "allocation": "trial 3", "healing": {"method": "distill", "steps": 40}}
    write_json(run.path / "healed" / "trial-3-distill-12345678" / "request.json", request)
    test = app("export", run=run.id)
    box = next(box for box in test.selectbox if box.label == "Allocation or healed model")
    box.set_value(chosen).run()
    test.session_state["export_form"] = form
    test.run()
    assert sound(test)
    codes = [block.value for block in test.code if str(run.path / "exports") not in block.value]
    result = paths_of(codes)
    assert len(result) == 3, codes
    assert len(set(result)) == 1
    assert not Path(result[0]).is_absolute()


def test_every_option_of_a_healing_is_in_its_command(app):
    _, _, codes = shown_healed(app, healing={"method": "distill", "warmup": 0.25})
    assert any("lowrank heal" in code and "--warmup 0.25" in code for code in codes)


def test_a_healing_of_no_trial_is_made_of_its_ranks(app):
    _, test, codes = shown_healed(app, allocation="energy")
    assert (
        "Save “Allocation (JSON)” below as trial-3-distill-12345678.json; then make the one-shot model of it, and heal that model:"
        in words(test)
    )
    assert any(code.startswith("lowrank compress") and "\nlowrank heal --model trial-3-distill-12345678-one-shot" in code for code in codes)
    assert downloads(test)["Allocation (JSON)"]


def test_a_size_that_is_none_is_told(app):
    run = make_run()
    test = app("export", run=run.id)
    test.text_input(key="export_shard").set_value("much").run()
    assert not test.exception
    assert "max shard size must be a number" in test.error[0].value
    assert "Report (HTML)" in downloads(test)


def test_an_allocator_whose_ranks_only_the_worker_knows_has_an_upper_bound(app):
    run = make_run()
    test = app("export", run=run.id)
    picker = next(box for box in test.selectbox if box.label == "Allocation or healed model")
    picker.set_value("energy").run()
    assert sound(test)
    shown = words(test)
    assert "≤ " in shown
    assert "once the worker has built it" in shown
    assert not downloads(test)["Allocation (JSON)"]


def test_a_search_over_a_range_of_ratios_names_its_front(app):
    from lowrank_core.config import SearchConfig

    run = make_run(config=SearchConfig(0.2, max_ratio=0.6, trials=5), study=write_front)
    test = app("export", run=run.id)
    assert sound(test)
    picker = next(box for box in test.selectbox if box.label == "Allocation or healed model")
    assert "% removed" in picker.options[0]


def test_a_recorded_run_can_be_downloaded_and_not_written(app, tmp_path, monkeypatch):
    run = make_run(path=tmp_path / "recorded-run")
    write_answers(run)
    write_json(run.path / "run.json", {**run.record, "recorded": True})
    monkeypatch.setattr("lowrank_core.studio.shared.run_list.recorded_run", lambda: run)
    test = app("export")
    assert sound(test)
    assert test.button(key="export").disabled
    assert "A recorded run has no worker" in words(test)
    assert all(downloads(test)[name] for name in (*REPORTED, *TABLES))


@pytest.mark.parametrize(
    ("proof", "said", "ok"),
    [
        (proven(), "Passed: equal up to rounding", True),
        (proven(ok=False, measured=25.5, difference=1.0), "Failed: differs from the recorded perplexity", False),
        ({"ok": False, "error": "model.safetensors is altered"}, "Failed: not measured. model.safetensors is altered", False),
    ],
)
def test_the_proof_is_told_in_words(app, proof, said, ok):
    run = make_run()
    write_model(run, proof=proof)
    test = app("export", run=run.id)
    assert not test.exception
    boxes = test.success if ok else test.error
    assert any(said in box.value for box in boxes)
    if "verification" in proof:
        assert "Perplexity as written 24.5000" in words(test)
        assert "8 windows" in boxes[0].value


def test_a_written_model_is_listed_and_can_be_measured_again(app):
    run = make_run()
    write_model(run)
    test = app("export", run=run.id)
    shown = words(test)
    for reported in (
        "factors, bfloat16",
        "2.00 KiB of weights",
        "1 compressed, 1 dense; ranks 5 to 5",
        "Not verified yet",
        "perplexity 24.500",
    ):
        assert reported in shown
    assert downloads(test)["Model card"]
    test.button(key="verify_trial-3").click().run()
    assert sound(test)
    (request,) = pending_requests(run)
    assert (request["kind"], request["arguments"]["path"]) == ("verify", "trial-3")
    assert "Being loaded and measured again" in words(test)
    assert test.button(key="verify_trial-3").disabled


def test_a_damaged_manifest_is_told_and_the_others_are_there(app):
    run = make_run()
    write_model(run, "good")
    (write_model(run, "bad") / "lowrank.json").write_text("{")
    test = app("export", run=run.id)
    assert not test.exception
    (error,) = test.error
    assert "bad/lowrank.json can't be read" in error.value
    assert "2.00 KiB of weights" in words(test)


@pytest.mark.parametrize("part", ["text.json", "calibration.json", "spectra.npz", "model.json"])
def test_a_damaged_part_is_told_before_a_report_is_asked_for(app, part):
    run = make_run()
    (run.path / part).write_text("{")
    test = app("export", run=run.id)
    assert not test.exception
    assert any(part in error.value for error in test.error)
    assert not any(downloads(test)[name] for name in REPORTED)


def test_a_request_in_hand_can_be_cancelled(app):
    run = make_run(state="running", study=write_rich_study)
    run.write_status(running_status("Writing it, and measuring what was written", 3, 40))
    request = client.submit(run, "export", trial=3)
    test = app("export", run=run.id)
    assert sound(test)
    test.button(key="withdraw_all").click().run()
    assert pending_requests(run) == []
    assert not client.request_path(run, request).exists()


def test_a_model_that_was_not_written_is_told(app):
    run = make_run()
    write_json(run.path / "results" / "9.json", {"ok": False, "kind": "export", "error": "the disk is full", "arguments": {}, "time": 1.0})
    test = app("export", run=run.id)
    assert [error.value for error in test.error] == ["The last export failed: the disk is full"]


def test_compare_leads_here(app):
    run = make_run()
    test = app("compare", run=run.id)
    assert sound(test)
    assert any(link.proto.label.startswith("Export") for link in test.get("page_link"))
    assert json.dumps([button.label for button in test.button]).find("Export this") == -1


def test_labels_and_helps_of_the_form_are_those_of_the_options(app):
    test = app("export", run=make_run().id)
    drawn = {
        "form": test.segmented_control(key="export_form"),
        "with_code": test.toggle(key="export_with_code"),
        "drop_biases": test.toggle(key="export_drop_biases"),
        "dtype": test.selectbox(key="export_dtype"),
        "max_shard_size": test.text_input(key="export_shard"),
        **{name: test.selectbox(key=f"export_{name}") for name in ("quantization", "dense_quantization", "rounding")},
    }
    for declared in options_of(ExportConfig):
        widget = drawn.pop(declared.name)
        assert (widget.label, widget.help.lower().rstrip(".")) == (declared.label, declared.option.help.lower())
    assert not drawn
