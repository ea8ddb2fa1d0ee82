"""The README's commands and code are what the package accepts and runs."""

import re
import shlex
from pathlib import Path

import pytest

from lowrank_core.catalogue import allocator_table, as_markdown, basis_table, difference_table, preset_table
from lowrank_core.cli import parser
from lowrank_core.presets.differences import COMMON

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^lowrank .*$", README, flags=re.MULTILINE)


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("line", COMMANDS)
def test_the_command_line_takes_every_command_shown(line: str) -> None:
    arguments = parser().parse_args(shlex.split(line, comments=True)[1:])
    assert arguments.command in line


def test_the_tables_of_methods_are_those_of_the_registries() -> None:
    assert as_markdown(basis_table()) in README
    assert as_markdown(allocator_table()) in README
    assert as_markdown(preset_table()) in README
    assert as_markdown(difference_table()) in README
    assert COMMON in README


def test_the_pictures_shown_are_there() -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert (Path(__file__).resolve().parents[2] / picture).is_file(), picture


@pytest.mark.slow
def test_the_notebook_code_runs_and_leaves_a_smaller_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert float(capsys.readouterr().out) > 1
    assert (tmp_path / "smaller" / "model.safetensors").stat().st_size > 0
