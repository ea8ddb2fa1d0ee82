"""Options: declared once, in a config, and taken from there by flags, files, forms, commands, comparisons and docs."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from lowrank_core.cli import main, parser
from lowrank_core.cli.options import Parser, add_options, config_of, file_option, source_of, text_of
from lowrank_core.cli.reference import options_reference
from lowrank_core.cli.search import _config
from lowrank_core.config import (
    CalibrationConfig,
    CompressionConfig,
    ExportConfig,
    ModelSource,
    RunConfig,
    SearchConfig,
    TextConfig,
    from_mapping,
    to_mapping,
)
from lowrank_core.config.flags import command_line, flags_of
from lowrank_core.config.healing import HealingConfig
from lowrank_core.config.options import option
from lowrank_core.config.speed import SpeedConfig
from lowrank_core.errors import ConfigError
from lowrank_core.presets.recipes import PRESETS
from lowrank_core.sensitivity.config import SensitivityConfig
from lowrank_core.studio.overview.run_comparison import option_differences

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "assets" / "recorded-run" / "run.json"
MODEL, TEXT = ("--model", "demo"), ("--text", "python-stdlib", "--context", "64")


@dataclass(frozen=True)
class WithOneMore(HealingConfig):
    """A healing with an option that no other module knows."""

    sharpness: float = option(0.5, "how sharp, as a test asks", label="Sharpness of it", minimum=0.0, maximum=1.0, step=0.1)


def taken(*words: str) -> argparse.Namespace:
    return parser().parse_args(list(words))


def form() -> None:
    from test_options import WithOneMore

    from lowrank_core.config.options import options_of
    from pages.components.widgets import draw

    for declared in options_of(WithOneMore):
        draw(WithOneMore, declared.name, key=declared.name)


# --- a new option is one field -----------------------------------------------------------------------------------------


def test_a_new_field_is_a_flag_with_help(capsys: pytest.CaptureFixture[str]):
    commands = Parser(prog="x")
    add_options(commands, WithOneMore)
    assert "--sharpness X" in commands.format_help()
    assert "how sharp, as a test asks (default: 0.5)" in " ".join(commands.format_help().split())
    assert config_of(commands.parse_args(["--sharpness", "0.7"]), WithOneMore) == WithOneMore(sharpness=0.7)
    with pytest.raises(ConfigError, match="sharpness must be at most 1, got 2"):
        config_of(commands.parse_args(["--sharpness", "2"]), WithOneMore)


def test_a_new_field_is_in_the_form(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    test = AppTest.from_function(form, default_timeout=300).run()
    assert not test.exception
    widget = test.number_input(key="sharpness")
    assert (widget.label, widget.value, widget.min, widget.max) == ("Sharpness of it", 0.5, 0.0, 1.0)
    assert widget.help == "How sharp, as a test asks."
    assert test.selectbox(key="method").options == list(HEALERS)


HEALERS = ("Distillation of the factors", "Block-wise refinement", "Diagonal post-training (the paper's)", "LoRA on the factors")


def test_a_new_field_is_in_the_command_that_repeats_a_run():
    line = command_line("heal", flags_of(WithOneMore(steps=7, sharpness=0.25)))
    assert line == "lowrank heal --steps 7 --sharpness 0.25"


def test_a_new_field_is_in_the_comparison():
    rows = option_differences({"first": WithOneMore(), "second": WithOneMore(sharpness=0.25)})
    assert rows == [{"option": "Sharpness of it", "first": "0.5", "second": "0.25"}]


def test_a_new_field_is_in_the_docs():
    assert "| `--sharpness` | 0.5 | how sharp, as a test asks |" in options_reference((WithOneMore,))


# --- files -------------------------------------------------------------------------------------------------------------


def test_the_recorded_run_is_read_with_its_names_of_an_earlier_version():
    body = json.loads(RECORD.read_text())["config"]
    assert {"most_ratio", "slopes"} <= body["search"].keys()
    assert body["search"]["variables"] == "errors"
    config = from_mapping(RunConfig, body)
    assert (config.search.max_ratio, config.search.error_weights, config.search.variables) == (None, False, "error_weight")
    body["search"] |= {"most_ratio": 0.6, "slopes": True}
    changed = from_mapping(RunConfig, body).search
    assert (changed.max_ratio, changed.error_weights) == (0.6, True)
    assert from_mapping(SearchConfig, {"variables": "kept"}).variables == "keep_ratio"
    assert from_mapping(RunConfig, to_mapping(config)) == config


def test_a_run_s_own_record_gives_its_configs_exactly():
    config = from_mapping(RunConfig, json.loads(RECORD.read_text())["config"])
    words = ("search", "--config", str(RECORD), "--run", "again")
    arguments = taken(*words)
    assert RunConfig(source_of(arguments), text_of(arguments), config_of(arguments, CalibrationConfig), _config(arguments)) == config
    changed = _config(taken(*words, "--trials", "7", "--gradient-damping", "0.5"))
    assert changed == replace(config.search, trials=7, compression=replace(config.search.compression, gradient_damping=0.5))


def test_a_preset_on_the_command_line_comes_before_the_file():
    changed = _config(taken("search", "--config", str(RECORD), "--run", "again", "--preset", "bolaco"))
    assert changed.compression == PRESETS["bolaco"].compression
    assert {name: getattr(changed, name) for name in PRESETS["bolaco"].search} == PRESETS["bolaco"].search


@pytest.mark.parametrize(
    ("kind", "section"),
    [
        (HealingConfig(method="lora", warmup=0.2, learning_rate=1e-3), {"healing": {}}),
        (ExportConfig(dtype="float16", quantization="int8"), {"export": {}}),
        (SpeedConfig(rounds=3, warmup=2), {"speed": {}}),
        (SensitivityConfig(kept=(0.5,), kinds=("q_proj",), windows=3), {"sensitivity": {}}),
        (CalibrationConfig(group_weights="dof", batch_size=2), {"calibration": {}}),
        (CompressionConfig(basis="whitened", fit_windows=3), {"search": {"compression": {}}}),
    ],
)
def test_any_section_is_a_file_of_options(kind: object, section: dict[str, dict[str, object]], tmp_path: Path):
    place = section
    while place:
        name = next(iter(place))
        if not place[name]:
            place[name] = json.loads(json.dumps(to_mapping(kind)))
            break
        place = place[name]
    (tmp_path / "options.json").write_text(json.dumps(section))
    commands = Parser(prog="x")
    add_options(commands, type(kind))
    file_option(commands)
    assert config_of(commands.parse_args(["--config", str(tmp_path / "options.json")]), type(kind)) == kind
    again = commands.parse_args(shlex.split(command_line("x", flags_of(kind)))[2:])
    assert config_of(again, type(kind)) == kind


@pytest.mark.parametrize(
    "command",
    ["analyze", "compress --out x", "search --run x", "heal --out x", "evaluate", "sensitivity --run x", "speed", "generate --prompt x"],
)
def test_every_command_with_options_takes_the_file_of_a_run(command: str):
    arguments = taken(*shlex.split(command), "--config", str(RECORD))
    assert source_of(arguments) == ModelSource()
    if command not in ("speed", "generate --prompt x"):
        assert text_of(arguments) == TextConfig()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("analyze",), "which model?"),
        (("analyze", *MODEL), "which text?"),
        (("search", *MODEL, *TEXT, "--run", "x"), "how much to remove?"),
        (("compress", *MODEL, *TEXT, "--out", "x"), "--compression-ratio"),
        (("compress", *MODEL, *TEXT), "Give --out DIR"),
        (("analyze", "--config", "missing.json"), "can't be read"),
        (("compress", "--config", "damaged.json", "--out", "x"), "temper"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "damaged.json").write_text(json.dumps({"calibration": {"temper": 3}}))
    monkeypatch.chdir(tmp_path)
    try:
        status: object = main(list(words))
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["analyze", "compress", "evaluate", "search", "speed", "heal", "sensitivity", "verify"])
def test_help_names_no_default_for_a_model_that_has_to_be_given(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: none; give it here or in --config)" in shown
    assert not [default for default in ("demo", "python-stdlib") if f"(default: {default})" in shown]


# --- earlier versions --------------------------------------------------------------------------------------------------


def test_flags_and_values_of_earlier_versions_are_taken_and_not_shown(capsys: pytest.CaptureFixture[str]):
    words = ("search", *MODEL, *TEXT, "--compression-ratio", "0.2", "--run", "x")
    new = _config(taken(*words, "--max-ratio", "0.5", "--error-weights", "--variables", "error_weight", "--no-value-dense"))
    assert _config(taken(*words, "--most-ratio", "0.5", "--slopes", "--variables", "errors", "--compress-value")) == new
    assert _config(taken(*words, "--preset", "studio", "--no-compress-value", "--no-heads")).compression.value_dense
    for command in ("search", "compress"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert not [flag for flag in ("--most-ratio", "--slopes", "--compress-value") if flag in shown]
    for flags in (("--allocation", "marginal"), ("--complete", "marginal")):
        arguments = taken("compress", *MODEL, *TEXT, "--out", "x", *flags)
        assert getattr(arguments, flags[0][2:]) == "lagrangian"


def test_the_docs_have_every_option():
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == options_reference() + "\n"


@pytest.mark.parametrize("text", ["[1]", "3", '"demo"', "null"])
def test_a_config_file_without_an_object_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "options.json"
    path.write_text(text)
    assert main(["analyze", "--model", "demo", "--text", "python-stdlib", "--config", str(path)]) == 2
    assert "holds no JSON object" in capsys.readouterr().err
