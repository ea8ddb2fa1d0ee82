"""What the Overview knows before a run starts, and of runs side by side, as numbers and words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import BLOCKS, FFN, HIDDEN, RATIO, make_run, matrices, running_status, text_json, write_answers, write_front
from test_views_model import checkpoint

from lowrank_core.config import CalibrationConfig, ModelSource, RunConfig, SearchConfig, TextConfig
from lowrank_core.errors import ModelError, RunError, TextError
from lowrank_core.runs import Run, home, list_runs, write_json
from lowrank_core.runs.manage import delete_run, notes_of, rename_run, run_bytes, write_notes
from lowrank_core.studio.overview import memory_estimate, source_checks, text_preview
from lowrank_core.studio.overview.checkpoint import Part, read_model, tensor_table
from lowrank_core.studio.overview.module_tree_chart import Node, module_tree, tree_html
from lowrank_core.studio.overview.run_comparison import compare_runs
from lowrank_core.studio.shared.model_facts import ModelFacts, model_facts

ROOM = memory_estimate.Machine(2**34, 2**36, None)


# the module tree


def leaves(node: Node) -> list[Node]:
    return [leaf for child in node.children for leaf in leaves(child)] if node.children else [node]


@pytest.mark.parametrize("arrangement", ["block", "type"])
def test_every_branch_adds_up_to_what_is_below_it(tmp_path, arrangement):
    result = read_model(checkpoint(tmp_path / "model"))
    root = module_tree(result.parts, arrangement)

    def check(node: Node) -> None:
        if node.children:
            assert node.parameters == sum(child.parameters for child in node.children)
            assert node.compressible == sum(child.compressible for child in node.children)
            assert node.tensors == sum(child.tensors for child in node.children)
            for child in node.children:
                check(child)

    check(root)
    assert root.parameters == result.facts.parameters
    assert root.share == pytest.approx(1.0)
    assert root.compressible == result.facts.compressible_parameters
    assert len(leaves(root)) == len(result.parts) == len(tensor_table(result.parts))


def test_the_tree_stands_in_the_order_of_the_model(tmp_path):
    root = module_tree(read_model(checkpoint(tmp_path / "model")).parts)
    assert [child.label for child in root.children] == ["model.embed_tokens.weight", *(f"Block {depth}" for depth in range(BLOCKS))]
    assert [child.label for child in root.children[1].children] == ["input_layernorm.weight", "self_attn", "mlp"]
    assert [child.label for child in root.children[1].children[1].children] == [f"{name}_proj.weight" for name in "qkvo"]
    by_type = module_tree(read_model(tmp_path / "model").parts, "type")
    assert "self_attn.q_proj.weight" in [child.label for child in by_type.children]


def part(parts: tuple[Part, ...], ending: str) -> Part:
    return next(part for part in parts if part.name.endswith(ending))


def test_what_is_left_alone_says_why(tmp_path):
    parts = read_model(checkpoint(tmp_path / "model")).parts
    assert "tied" in part(parts, "embed_tokens.weight").why
    assert part(parts, "input_layernorm.weight").why == "vector of a norm"
    assert part(parts, "q_proj.weight").compressible
    assert not part(parts, "q_proj.weight").why


def config_of(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_layers_that_are_low_rank_already_are_left_alone_and_quantised_ones_refused(tmp_path):
    folder = checkpoint(tmp_path / "model")
    name = matrices()[0].name
    config_of(folder, quantization_config={"quant_method": "lowrank", "layers": {name: {}}})
    parts = read_model(folder).parts
    assert part(parts, f"{name}.weight").why == "factor: low-rank already"
    assert part(parts, matrices()[1].name + ".weight").compressible
    config_of(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"is quantised \(gptq, 4 bits\)"):
        read_model(folder)


def test_names_in_a_header_are_text_and_never_markup(tmp_path):
    hostile = Part("<img src=x>.0.a.weight", (2, 2), "F16", "f", 4, 0, "<script>x</script>.weight", True, "<b>")
    html = tree_html(module_tree([hostile, replace(hostile, path="<i>.weight")]))
    assert "<script" not in html
    assert "<i>.weight" not in html
    assert "&lt;script&gt;" in html


def test_the_tree_of_an_80_layer_model_is_small():
    kinds = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    parts = [
        Part(f"model.layers.{depth}.{kind}.weight", (8192, 8192), "BF16", "f", 8192**2, depth, f"{kind}.weight", True, "")
        for depth in range(80)
        for kind in kinds
    ]
    assert len(tree_html(module_tree(parts))) < 1_000_000


def shard(folder: Path) -> None:
    """Pretend that the checkpoint has two shards, the second being missing."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    listed = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def test_a_missing_shard_is_named(tmp_path):
    folder = checkpoint(tmp_path / "model")
    shard(folder)
    with pytest.raises(ModelError, match=r"lacks 1 of 2 weight files \(first: model-00002"):
        read_model(folder)


def test_a_second_copy_of_the_weights_is_not_counted(tmp_path):
    folder = checkpoint(tmp_path / "model")
    before = read_model(folder).facts.parameters
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert read_model(folder).facts.parameters == before


def test_a_hub_id_is_here_once_all_its_files_are(tmp_path, monkeypatch):
    monkeypatch.setattr(source_checks.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    assert source_checks.local_model("owner/name") is None
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    folder = checkpoint(repository / "snapshots" / "abc")
    assert source_checks.local_model("owner/name") == folder
    shard(folder)
    assert source_checks.local_model("owner/name") is None


# will it fit


def facts() -> ModelFacts:
    result = model_facts(make_run())
    assert result is not None
    return result


def line(result: memory_estimate.Fit, part: str) -> memory_estimate.FitLine:
    return next(line for line in result.lines if line.part.startswith(part))


CONFIG = RunConfig(ModelSource(), TextConfig(context=32, calibration_windows=40), CalibrationConfig(batch_size=4))


def test_the_sum_is_that_of_its_lines():
    result = memory_estimate.fit_of(facts(), CONFIG, ROOM)
    squares = 3 * HIDDEN**2 + FFN**2  # q, k, v share an input; so do gate and up
    assert line(result, "Weights").bytes == 4 * facts().parameters
    assert line(result, "Statistics of the current block").bytes == squares * 8 * 5
    assert line(result, "Statistics kept").bytes == BLOCKS * squares * 8 * 2
    assert line(result, "Hidden states").bytes == 40 * 32 * HIDDEN * 4 * 2
    passing = sum(m.d_in + m.d_out for m in matrices() if m.depth == 0)
    assert line(result, "Activations").bytes == 4 * 32 * passing * 4
    table = memory_estimate.fit_table(result)
    for place in (memory_estimate.MEMORY, memory_estimate.DISK):
        own = table[table["place"] == place]
        assert own["bytes"].iloc[-1] == own["bytes"].iloc[:-1].sum() == result.needed(place)
    assert result.short_of == []


def test_what_does_not_fit_is_named():
    result = memory_estimate.fit_of(facts(), CONFIG, memory_estimate.Machine(1000, 2**40, None))
    assert result.short_of == [memory_estimate.MEMORY]
    assert memory_estimate.fit_of(facts(), CONFIG, memory_estimate.Machine(2**40, 1000, None)).short_of == [memory_estimate.DISK]


def test_weights_that_leave_too_little_memory_are_counted_on_disk():
    weights = 4 * facts().parameters
    for memory, budget, place in [
        (5 * weights // 2, "auto", memory_estimate.MEMORY),
        (5 * weights // 2 - 1, "auto", memory_estimate.DISK),
        (2**40, "1KB", memory_estimate.DISK),
        (1, "1TB", memory_estimate.MEMORY),
    ]:
        config = replace(CONFIG, model=ModelSource(memory=budget))
        found = line(memory_estimate.fit_of(facts(), config, memory_estimate.Machine(memory, 2**40, None)), "Weights")
        assert (found.place, found.bytes) == (place, weights)
        assert (found.part == "Weights, read block by block") is (place == memory_estimate.DISK)


def test_weights_count_in_the_dtype_that_they_are_held_in():
    half = replace(CONFIG, model=ModelSource(dtype="bfloat16"))
    assert line(memory_estimate.fit_of(facts(), half, ROOM), "Weights").bytes == 2 * facts().parameters
    stored = replace(facts(), bytes=2 * facts().parameters)
    gpu = replace(ROOM, gpu=memory_estimate.Gpu("Some GPU", 2**30, 2**29))
    result = memory_estimate.fit_of(stored, CONFIG, gpu)
    assert line(result, "Weights") == memory_estimate.FitLine(
        "Weights", memory_estimate.DEVICE, 2 * facts().parameters, f"{facts().parameters:,} parameters × 2 bytes"
    )
    assert result.free(memory_estimate.DEVICE) == 2**29
    on_cpu = replace(CONFIG, model=ModelSource(device="cpu"))
    assert line(memory_estimate.fit_of(stored, on_cpu, gpu), "Weights").place == memory_estimate.MEMORY


def test_what_nvidia_smi_prints_is_read():
    assert memory_estimate.gpus_in("NVIDIA H200, 143771, 143000\n") == (memory_estimate.Gpu("NVIDIA H200", 143771 * 2**20, 143000 * 2**20),)
    assert memory_estimate.gpus_in("NVIDIA-SMI has failed because it couldn't communicate\n") == ()
    assert memory_estimate.gpus_in("A, [N/A], [N/A]\n") == ()


def test_this_machine_has_room_for_something(home):
    assert not home.exists()  # its disk is that of the folder around it
    result = memory_estimate.this_machine()
    assert result.memory > 0
    assert result.disk > 0


# text


@pytest.fixture
def notes(tmp_path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("\n".join(f"line {number} of some words" for number in range(400)))
    return path


def test_the_splits_of_a_file_are_counted_and_begin_where_they_begin(notes):
    result = text_preview.text_preview(f"file:{notes}")
    assert sum(split.characters for split in result.splits) == len(notes.read_text())
    assert result.splits[0].beginning.startswith("line 0 ")
    assert result.splits[1].beginning.split("\n")[0].startswith("line 2")
    table = text_preview.preview_table(result, TextConfig(context=32, calibration_windows=5))
    assert list(table["split"]) == ["calibration", "validation", "test"]
    assert table["windows"][0] == result.splits[0].characters // 4 // 32
    assert table["asked"][0] == 5


def test_a_text_that_is_too_short_is_told_before_the_start(notes):
    result = text_preview.text_preview(f"file:{notes}")
    fewer, none, _ = text_preview.preview_warnings(result, TextConfig(context=1000, calibration_windows=9))
    assert "may hold about 1 windows, fewer than the requested 9" in fewer
    assert "may hold no window of 1000 tokens" in none
    assert text_preview.preview_warnings(result, TextConfig(context=8, calibration_windows=2, validation_windows=2, test_windows=2)) == []


def test_a_text_that_can_hold_no_window_is_refused_before_the_start(notes):
    result = text_preview.text_preview(f"file:{notes}")
    shortest = min(split.bytes for split in result.splits)
    text_preview.check_long_enough(result, TextConfig(context=shortest + 2))
    with pytest.raises(TextError, match=f"bytes, fewer than the tokens of one window .{shortest + 3}"):
        text_preview.check_long_enough(result, TextConfig(context=shortest + 3))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "txt"])
def test_every_form_of_a_file_is_shown(tmp_path, monkeypatch, suffix, large):
    if large:
        monkeypatch.setattr(text_preview, "_WHOLE_BYTES", 10)
    path = tmp_path / f"text.{suffix}"
    documents = [f"document {number} has words" for number in range(60)]
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    elif suffix == "txt":
        path.write_text("\n".join(documents))
    else:
        pq.write_table(pa.table({"text": documents}), path)
    result = text_preview.text_preview(f"file:{path}")
    assert result.counted is not large
    assert result.splits[0].beginning.startswith("document 0 has words")
    assert sum(split.characters for split in result.splits) == pytest.approx(60 * 22, rel=1.0 if suffix == "jsonl" else 0.1)
    assert bool(result.note) is large


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"body": "x"}\n' * 9, "text"),
        ("a.jsonl", b"not json\n" * 9, "can't be read"),
        ("a.txt", b"\xff\xfe\x00" * 9, "can't be read"),
        ("a.parquet", b"PAR1 is not" * 9, "can't be read"),
    ],
)
def test_a_file_that_can_not_be_used_says_what_to_give(tmp_path, monkeypatch, name, content, said, large):
    if large:
        monkeypatch.setattr(text_preview, "_WHOLE_BYTES", 10)
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TextError, match=said):
        text_preview.text_preview(f"file:{path}")


def test_a_benchmark_text_says_what_will_be_downloaded(monkeypatch):
    result = text_preview.text_preview("c4")
    assert "allenai/c4" in result.note
    assert "en/c4-train.00000-of-01024.json.gz" in result.note
    assert text_preview.preview_table(result, TextConfig())["characters"].isna().all()
    assert text_preview.preview_warnings(result, TextConfig()) == []
    monkeypatch.setattr(text_preview.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TextError, match=r"pip install"):
        text_preview.text_preview("c4")


def test_a_local_copy_of_a_benchmark_text_begins_with_its_first_rows(tmp_path):
    for split in ("train", "validation", "test"):
        pq.write_table(pa.table({"text": [f"{split} row", "more"]}), tmp_path / f"{split}-00000-of-00001.parquet")
    result = text_preview.text_preview(f"wikitext-2:{tmp_path}")
    assert [split.beginning.split("\n")[0] for split in result.splits] == ["train row", "validation row", "test row"]
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(TextError, match="test split"):
        text_preview.text_preview(f"wikitext-2:{tmp_path}")


# care of runs


def test_a_run_is_renamed_and_noted_and_nothing_else_changes():
    run = make_run()
    before = run.record
    rename_run(run, "  A better \n name ")
    write_notes(run, "What it showed\n")
    assert run.record == {**before, "name": "A better name"}
    assert notes_of(run) == "What it showed"
    with pytest.raises(RunError, match="1 to 200"):
        rename_run(run, "   ")
    with pytest.raises(RunError, match="20,000"):
        write_notes(run, "x" * 20_001)


def test_a_deleted_run_is_gone_and_the_others_stay():
    run, other = make_run(), make_run()
    statistics = home() / "statistics" / "key"
    statistics.mkdir(parents=True)
    assert run_bytes(run) > 1000
    delete_run(run)
    assert [result.id for result in list_runs()] == [other.id]
    assert not run.path.exists()
    assert [path.name for path in (home() / "runs").iterdir()] == [other.id]
    assert statistics.exists()


def test_what_must_not_be_deleted_is_refused(tmp_path):
    recorded = make_run()
    write_json(recorded.path / "run.json", {**recorded.record, "recorded": True})
    with pytest.raises(RunError, match="recording"):
        delete_run(recorded)
    outside = make_run(path=tmp_path / "elsewhere" / "run")
    with pytest.raises(RunError, match="only runs there"):
        delete_run(outside)
    linked = home() / "runs" / "link"
    linked.symlink_to(outside.path)
    with pytest.raises(RunError, match="only runs there"):
        delete_run(Run(linked))
    held = make_run(state="running")
    with pytest.raises(RunError, match="a worker holds this run"):
        delete_run(held)
    helped = make_run()
    helped.write_status(running_status(), helped.workers_folder / "1.json")
    with pytest.raises(RunError, match="a worker holds this run"):
        delete_run(helped)
    for run in (recorded, outside, held, helped):
        assert (run.path / "run.json").is_file()


# runs side by side


def test_runs_that_were_measured_alike_share_their_letters():
    first, second = make_run(), make_run()
    write_answers(first)
    write_answers(second)
    result = compare_runs([first, second])
    assert list(result.frame["value"]) == [0.35, 0.35]
    assert list(result.frame["value_group"]) == ["A", "A"]
    assert list(result.frame["test_group"]) == ["A", "A"]
    assert result.frame["perplexity"][0] == pytest.approx(24.53, abs=0.01)
    assert result.frame["dense"][0] == pytest.approx(20.09, abs=0.01)
    assert result.notes == (
        "Best values: KL to the dense model (nats per token), on the same search-validation text.",
        "Perplexity on test text, one protocol for all: python-stdlib, test split, 4 windows of 32 tokens.",
    )


def test_numbers_that_were_measured_otherwise_are_kept_apart_and_it_is_said():
    first, second = make_run(), make_run(config=SearchConfig(RATIO, trials=6, objective="perplexity"))
    for run in (first, second):
        write_answers(run)
    text = text_json()
    text["splits"]["test"]["sha256"] = "another text"
    write_json(second.path / "text.json", text)
    result = compare_runs([first, second])
    assert list(result.frame["value_group"]) == ["A", "B"]
    assert list(result.frame["test_group"]) == ["A", "B"]
    assert "Best values with different letters are not comparable" in result.notes[0]
    assert "B: Perplexity of demo" in result.notes[0]
    assert "Perplexities with different letters are not comparable" in result.notes[1]


def test_the_same_tokens_in_shorter_windows_are_another_measurement():
    first, second = make_run(), make_run()
    text = text_json()
    write_json(second.path / "text.json", text | {"context": text["context"] // 2})
    assert list(compare_runs([first, second]).frame["value_group"]) == ["A", "B"]


def test_runs_without_a_measurement_have_gaps():
    result = compare_runs(
        [make_run(search=False), make_run(config=SearchConfig(0.2, max_ratio=0.6, trials=9), study=write_front), make_run()]
    )
    assert result.frame["perplexity"].isna().all()
    assert result.frame["value"].isna().tolist() == [True, True, False]
    assert list(result.frame["removed"][1:]) == ["20% to 60%", "30%"]
    assert pd.isna(result.frame["trials"][0])
    assert result.notes[-1] == "No best trial of these runs is measured on test text yet; do it on the Compare page."
