"""Which way arrows may point (ARCHITECTURE.md): imports are read from the source, and followed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "tokenizers", "datasets"}
OURS = ("app", "pages", "lowrank_core")

TORCH_FREE = (
    *("app", "pages", "lowrank_core.studio", "lowrank_core.studies", "lowrank_core.runs", "lowrank_core.sensitivity"),
    *("lowrank_core.catalogue", "lowrank_core.presets", "lowrank_core.allocation", "lowrank_core.metrics", "lowrank_core.spectra"),
    *("lowrank_core.documents", "lowrank_core.config", "lowrank_core.parameters", "lowrank_core.files", "lowrank_core.errors"),
    *("lowrank_core.coverage", "lowrank_core.wording"),
)
"""What the dashboard's process is made of: whole packages, and everything in them."""

STAGES = (
    {"errors", "types", "wording"},
    {"parameters", "files", "coverage"},
    {"config", "spectra", "documents", "linalg", "layers"},
    {"metrics", "presets"},
    {"allocation"},
    {"catalogue", "runs"},
    {"sensitivity", "studies", "models", "text"},
    {"statistics"},
    {"decomposition", "evaluation", "speed", "tasks"},
    {"compression", "healing"},
    {"export", "search"},
    {"worker"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
"""The core from the bottom up: nothing imports from above itself."""

CHART = ("_chart", ".chart_style", ".vega", ".embedding")
"""Ends of the names of the studio's modules that draw; the others are tables and words."""


@cache
def _modules() -> dict[str, Path]:
    """Dotted name -> file of everything that ships."""
    paths = [ROOT / "app.py", *(ROOT / "pages").rglob("*.py"), *(ROOT / "lowrank_core").rglob("*.py")]
    names = {}
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "_bundle" not in parts:
            names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def _imported(name: str) -> Iterator[str]:
    """Yield the dotted names that a module imports anywhere, inside functions too."""
    for node in _running(ast.parse(_modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports are not followed here"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Walk what runs: imports for type checkers load nothing."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _running(child)


@cache
def _arrows(name: str) -> frozenset[str]:
    """Modules that ``name`` imports: ours with the packages around them, others by their first part."""
    result = set()
    for target in _imported(name):
        first = target.split(".")[0]
        if first not in OURS:
            result.add("torch" if target.startswith("safetensors.torch") else first)
            continue
        parts = target.split(".")
        result |= {prefix for length in range(1, len(parts) + 1) if (prefix := ".".join(parts[:length])) in _modules()}
    return frozenset(result - {name})


def _reachable(start: str) -> dict[str, str]:
    """Everything that importing ``start`` can reach, with who imports it."""
    reached: dict[str, str] = {}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        for target in _arrows(name):
            if target not in reached:
                reached[target] = name
                if target in _modules():
                    waiting.append(target)
    return reached


def _below(package: str) -> list[str]:
    return sorted(name for name in _modules() if name == package or name.startswith(f"{package}."))


@pytest.mark.parametrize("package", TORCH_FREE)
def test_the_dashboard_never_reaches_torch(package: str):
    members = _below(package)
    assert members, f"{package} is not there"
    for name in members:
        reached = _reachable(name)
        heavy = {f"{target} (by {reached[target]})" for target in HEAVY & set(reached)}
        assert not heavy, f"{name} reaches {heavy}"


def test_the_walk_would_notice():
    reached = _reachable("lowrank_core.commands.shared")
    assert {"torch", "transformers"} <= set(reached)
    assert "torch" in _reachable("lowrank_core.cli")  # imported inside a function


def test_the_top_of_the_package_can_be_taken_in_at_a_glance():
    tracked = subprocess.run(["git", "ls-files", "lowrank_core"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert len({path.split("/")[1] for path in tracked}) <= 35


def test_streamlit_is_known_to_the_pages_alone():
    users = {name for name in _modules() if "streamlit" in _arrows(name)}
    assert users
    assert {name.split(".")[0] for name in users} == {"app", "pages"}


def test_optuna_is_known_to_the_search_alone():
    users = {name for name in _modules() if "optuna" in _arrows(name)}
    assert users
    allowed = ("lowrank_core.search.", "lowrank_core.studies.", "lowrank_core.worker.")
    assert all(name.startswith(allowed) for name in users), users


def test_plotly_is_known_to_the_charts_and_pages_alone():
    users = {name for name in _modules() if "plotly" in _arrows(name)}
    assert users
    assert all(name.startswith("pages.") or (name.startswith("lowrank_core.studio.") and name.endswith(CHART)) for name in users), users


def test_the_core_knows_nothing_of_who_shows_it():
    above = ("app", "pages", "lowrank_core.studio")
    for name in _modules():
        if not name.startswith((*above, "lowrank_core.cli", "lowrank_core.__main__")):  # these show, too
            seen = {target for target in _arrows(name) if target.startswith(above)}
            assert not seen, f"{name} imports {seen}"


def test_the_studio_knows_nothing_of_the_pages_and_tables_know_no_charts():
    for name in _below("lowrank_core.studio"):
        assert not {target for target in _arrows(name) if target.startswith(("app", "pages"))}, name
        if not name.startswith("lowrank_core.studio.report"):
            assert not {target for target in _arrows(name) if target.startswith("lowrank_core.studio.report")}, name
            if not name.endswith(CHART):
                assert not {target for target in _arrows(name) if target.endswith(CHART)}, name


def _stage(name: str) -> int | None:
    parts = name.split(".")
    if parts[0] != "lowrank_core" or len(parts) == 1 or parts[1] == "studio":
        return None
    places = [index for index, stage in enumerate(STAGES) if parts[1] in stage]
    assert len(places) == 1, f"{name} has no place in STAGES"
    return places[0]


def test_no_stage_imports_a_later_one():
    for name in _modules():
        stage = _stage(name)
        if stage is None:
            continue
        later = {target for target in _arrows(name) if target in _modules() and (_stage(target) or 0) > stage}
        assert not later, f"{name} imports {later}"


def test_numerics_touch_neither_disk_nor_log():
    pure = ("linalg", "statistics.moments", "statistics.pooling", "layers.pivoting", "decomposition")
    pure_modules = {name for part in pure for name in _below(f"lowrank_core.{part}")} - {"lowrank_core.decomposition.store"}
    for name in (*pure_modules, *_below("lowrank_core.metrics")):
        assert not _arrows(name) & {"pathlib", "os", "sys", "logging", "json", "time"}, name


@pytest.mark.process
def test_importing_the_dashboards_modules_leaves_torch_out():
    names = [name for package in TORCH_FREE[2:] for name in _below(package)]
    lines = [f"import {name}" for name in names]
    check = f"import sys; heavy = {HEAVY!r} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", "\n".join([*lines, check])], check=True, cwd=ROOT)


@pytest.mark.process
def test_help_answers_without_torch():
    code = (
        "import sys\nfrom lowrank_core.cli import main\n"
        "try:\n    main(['search', '--help'])\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_shared_types_are_declared_once():
    shared = ("Progress = Callable", "Vector = npt", "Result = dict", "Callable[[int, int], None]")
    holders = {name for name, path in _modules().items() if any(words in path.read_text(encoding="utf-8") for words in shared)}
    assert holders == {"lowrank_core.types"}
