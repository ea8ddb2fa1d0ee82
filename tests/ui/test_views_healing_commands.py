"""The commands that repeat a healing: the command line takes them, and they mean the same healing."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import fields, replace

import pytest
from synthetic import make_run, write_front, write_healing

from lowrank_core.cli import parser
from lowrank_core.cli.compress import _request
from lowrank_core.cli.options import config_of, source_of, text_of
from lowrank_core.config import CompressionConfig, ExportConfig, ModelSource, RunConfig, SearchConfig, TextConfig
from lowrank_core.config.healing import HealingConfig
from lowrank_core.runs import Run, recorded_run, write_json
from lowrank_core.studies.records import read_trials
from lowrank_core.studio.compare.healing_commands import heal_command, healing_commands
from lowrank_core.studio.compare.healing_runs import healings, trial_of
from lowrank_core.studio.export.export_plan import Source, healed_source

USUAL = ExportConfig()
CHANGED = {
    "method": "lora",
    "steps": 7,
    "batch_size": 3,
    "learning_rate": 3.3e-05,
    "warmup": 0.1,
    "temperature": 1.5,
    "cross_entropy": 0.0,
    "criterion": "kl",
    "validate_every": 5,
    "patience": 2,
    "train_windows": 99,
    "lora_rank": 4,
    "seed": 6,
}


def taken(line: str) -> argparse.Namespace:
    result = parser().parse_args(shlex.split(line)[1:])
    result.line = line
    return result


def healing_of(arguments: argparse.Namespace) -> HealingConfig:
    return config_of(arguments, HealingConfig, usual=HealingConfig(seed=text_of(arguments).seed))


def newest(run: Run) -> Source:
    search = run.config.search
    assert search is not None
    return healed_source(healings(run)[0], read_trials(run), search)


def asked(run: Run, **changed: object) -> None:
    """Write the request of the one healing again."""
    path = run.path / "healed" / "trial-3-distill-12345678" / "request.json"
    write_json(path, {"label": "x, healed by distill", "allocation": "trial 3", "healing": {"method": "distill", "steps": 40}, **changed})


def test_the_recorded_healing_has_two_lines_with_no_option_that_is_as_usual():
    run = recorded_run()
    assert run is not None
    result = healing_commands(run, newest(run))
    assert result.lines.splitlines() == [
        shlex.join(["lowrank", "export", "--run", str(run.path), "--trial", "25", "--out", "trial-25"]),
        "lowrank heal --model trial-25 --text python-stdlib --method distill --steps 200 --out trial-25-distill-5c39398f",
    ]
    assert result.ranks == ""


@pytest.mark.parametrize("name", [field.name for field in fields(HealingConfig)])
def test_every_option_of_a_healing_is_in_its_command(name: str):
    run = make_run()
    write_healing(run)
    asked(run, healing={name: CHANGED[name]})
    result = healing_commands(run, newest(run))
    assert healing_of(taken(result.lines.splitlines()[1])) == HealingConfig(**{name: CHANGED[name]})


def test_text_model_and_form_are_said():
    text = TextConfig("file:/a b/c.txt", context=64, test_windows=9, bos="none", calibration_windows=5, seed=3)
    config = RunConfig(ModelSource("some/model", "cuda:1", "bfloat16"), text)
    export = ExportConfig(with_code=True, max_shard_size="2GB", quantization="int8", dtype="float32")
    healing = HealingConfig(**CHANGED)
    arguments = taken(heal_command(config, healing, "a folder", "healed", export))
    assert source_of(arguments) == ModelSource("a folder", "cuda:1", "bfloat16")
    assert text_of(arguments) == text
    assert healing_of(arguments) == healing  # whose seed draws the windows, not that of the calibration
    assert config_of(arguments, ExportConfig) == replace(export, dtype="auto")
    assert str(arguments.out) == "healed"


def test_the_dtype_is_that_of_the_folder_that_is_healed():
    run = make_run()
    write_healing(run)
    first, second = healing_commands(run, newest(run), ExportConfig(dtype="float32", quantization="int8")).lines.splitlines()
    written, healed = taken(first), taken(second)
    assert (config_of(written, ExportConfig), str(written.out)) == (ExportConfig(dtype="float32"), "trial-3-float32")
    assert (source_of(healed), config_of(healed, ExportConfig)) == (ModelSource("trial-3-float32"), ExportConfig(quantization="int8"))
    assert str(healed.out) == "trial-3-distill-12345678-float32-int8"


def test_what_a_rule_allocates_is_made_of_its_ranks_where_no_trial_has_them():
    run = make_run()
    write_healing(run)
    asked(run, allocation="energy")
    result = healing_commands(run, newest(run))
    first, second = map(taken, result.lines.splitlines())
    assert (first.command, first.ranks, result.ranks) == ("compress", *["trial-3-distill-12345678.json"] * 2)
    assert str(first.out) == source_of(second).reference == "trial-3-distill-12345678-one-shot"
    typed, _ = map(taken, healing_commands(run, newest(run), ExportConfig(dtype="bfloat16")).lines.splitlines())
    assert config_of(typed, ExportConfig) == ExportConfig(dtype="bfloat16")


def test_recipe_and_text_are_in_the_command_where_no_trial_has_them():
    search = SearchConfig(0.3, trials=6, compression=CompressionConfig(rank_multiple=4))
    run = make_run(config=search)
    write_healing(run)
    assert healing_commands(run, newest(run)).lines.startswith("lowrank export")  # the trial has it all
    asked(run, allocation="energy")
    record = run.record
    write_json(
        run.path / "run.json", {**record, "config": {**record["config"], "text": {**record["config"]["text"], "validation_windows": 5}}}
    )
    run = Run(run.path)
    first, second = map(taken, healing_commands(run, newest(run)).lines.splitlines())
    assert _request(first).compression == search.compression
    assert text_of(first) == text_of(second) == run.config.text


def test_a_rule_is_a_trial_of_a_search_at_one_ratio_alone():
    run = make_run()
    write_healing(run)
    asked(run, allocation="lord_manual")
    assert newest(run).number == 1
    ranged = make_run(config=SearchConfig(0.2, max_ratio=0.6, trials=6), study=write_front)
    write_healing(ranged)
    (healing,) = healings(ranged)
    search = ranged.config.search
    assert search is not None
    assert trial_of(healing, read_trials(ranged), search) == 3
    assert trial_of(replace(healing, allocation="uniform"), read_trials(ranged), search) is None
    assert trial_of(replace(healing, allocation="trial 99"), read_trials(ranged), search) is None
