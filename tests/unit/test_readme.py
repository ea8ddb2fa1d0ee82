"""The commands, code, links and tables of README.md and docs/ are what the package accepts, runs and has."""

import re
import shlex
from pathlib import Path

import pytest

from lowrank_core.catalogue import allocator_table, as_markdown, basis_table, difference_table, preset_table
from lowrank_core.cli import parser
from lowrank_core.presets.differences import COMMON

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
SPAN = r"^lowrank [a-z].*$|`(lowrank [a-z][^`]*)`"


def commands() -> list[tuple[str, str]]:
    """Return (page, command) of every line, and of every code span, that calls ``lowrank`` with options."""
    result = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [" ".join((match[1] or match[0]).split()) for match in re.finditer(SPAN, text, flags=re.MULTILINE)]
        result += [(page.name, line) for line in lines if " --" in line and "…" not in line]
    return result


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_are_commands_to_check() -> None:
    assert sum(page == "README.md" for page, _ in commands()) >= 5
    assert len(commands()) >= 25


@pytest.mark.parametrize(("page", "line"), commands())
def test_the_command_line_takes_every_command_shown(page: str, line: str) -> None:
    arguments = parser().parse_args(shlex.split(line, comments=True)[1:])
    assert arguments.command in line, page


def test_the_tables_of_methods_are_those_of_the_registries() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for table in (basis_table(), allocator_table(), preset_table(), difference_table()):
        assert as_markdown(table) in text
    assert COMMON in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def test_the_readme_is_short_and_shows_a_picture() -> None:
    assert len(README.encode()) <= 6_000
    assert re.search(r"!\[[^]]+\]\(", README)


@pytest.mark.slow
def test_the_notebook_code_runs_and_leaves_smaller_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    for ratio in (0.2, 0.4):
        assert (tmp_path / f"smaller-{ratio}" / "model.safetensors").stat().st_size > 0
