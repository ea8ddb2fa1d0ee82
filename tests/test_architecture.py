"""Which way arrows may point (ARCHITECTURE.md): imports are read from the source, and followed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "tokenizers", "datasets"}
OURS = ("app", "pages", "lowrank_core")

TORCH_FREE = (
    "app",
    "pages",
    "lowrank_core.views",
    "lowrank_core.figures",
    "lowrank_core.studio.report",
    "lowrank_core.runs.client",
    "lowrank_core.files.records",
    "lowrank_core.runs",
    "lowrank_core.runs.manage",
    "lowrank_core.config",
    "lowrank_core.parameters",
    "lowrank_core.coverage",
    "lowrank_core.errors",
    "lowrank_core.spectra.heavy_tails",
    "lowrank_core.spectra.spectrum",
    "lowrank_core.allocation.curves",
    "lowrank_core.runs.drafts",
    "lowrank_core.allocation",
    "lowrank_core.metrics",
    "lowrank_core.catalogue",
    "lowrank_core.config.directions",
    "lowrank_core.spectra.directions",
    "lowrank_core.documents",
    "lowrank_core.presets.recipes",
    "lowrank_core.allocation.units",
    "lowrank_core.files.weights",
    "lowrank_core.config.healing",
    "lowrank_core.runs.healing_records",
    "lowrank_core.studies.records",
    "lowrank_core.studies.space",
    "lowrank_core.studies.storage",
    "lowrank_core.sensitivity.config",
    "lowrank_core.sensitivity.planning",
    "lowrank_core.sensitivity.records",
)
"""What the dashboard's process is made of."""

STAGES = (
    {"errors", "registration", "wording"},
    {"weight_files"},
    {"accounting", "coverage", "heavy_tails", "records"},
    {"config"},
    {"runs", "linalg", "pivoting", "spectra", "curves", "allocation", "moments", "bases", "presets"},
    {"units", "catalogue", "pooling", "documents", "drafts"},
    {"jobs", "run_care", "models", "text"},
    {"statistics_store", "influence"},
    {"calibration", "gradients"},
    {"analysis", "directions", "factorization"},
    {"head_factorization"},
    {"decomposition"},
    {"compression", "evaluation", "generation", "speed", "tasks"},
    {"quantization", "healing"},
    {"sequential"},
    {"recipe"},
    {"tuning", "error_weights", "sensitivity"},
    {"export"},
    {"search"},
    {"benchmarks"},
    {"commands"},
    {
        *("analysis_commands", "compression_commands", "evaluation_commands", "healing_commands"),
        *("benchmark_commands", "search_commands", "sensitivity_commands"),
    },
    {"report"},
    {"cli"},
    {"__main__"},
)
"""The core from the bottom up: nothing imports from above itself."""


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


def test_streamlit_is_known_to_the_pages_alone():
    users = {name for name in _modules() if "streamlit" in _arrows(name)}
    assert users
    assert {name.split(".")[0] for name in users} == {"app", "pages"}


def test_optuna_is_known_to_the_search_alone():
    users = {name for name in _modules() if "optuna" in _arrows(name)}
    assert users
    assert all(name.startswith("lowrank_core.search.") for name in users), users


def test_plotly_is_known_to_the_figures_and_pages_alone():
    users = {name for name in _modules() if "plotly" in _arrows(name)}
    assert users
    assert all(name.startswith(("lowrank_core.figures.", "pages.")) for name in users), users


def test_the_core_knows_nothing_of_who_shows_it():
    above = ("app", "pages", "lowrank_core.views", "lowrank_core.figures")
    for name in _modules():
        if not name.startswith((*above, "lowrank_core.studio.report", "lowrank_core.cli", "lowrank_core.__main__")):  # these show, too
            seen = {target for target in _arrows(name) if target.startswith(above)}
            assert not seen, f"{name} imports {seen}"


def test_figures_and_views_know_nothing_of_the_pages():
    for name in (*_below("lowrank_core.views"), *_below("lowrank_core.figures")):
        assert not {target for target in _arrows(name) if target.startswith(("app", "pages", "lowrank_core.studio.report"))}, name
    for name in _below("lowrank_core.views"):
        assert not {target for target in _arrows(name) if target.startswith("lowrank_core.figures")}, name


def _stage(name: str) -> int | None:
    parts = name.split(".")
    if parts[0] != "lowrank_core" or len(parts) == 1 or parts[1] in ("views", "figures"):
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
    pure = [f"lowrank_core.{name}" for name in ("linalg", "moments", "pooling", "pivoting", "factorization", "head_factorization")]
    for name in (*pure, *_below("lowrank_core.metrics")):
        assert not _arrows(name) & {"pathlib", "os", "sys", "logging", "json", "time"}, name


def test_importing_the_dashboards_modules_leaves_torch_out():
    names = [name for package in TORCH_FREE[2:] for name in _below(package)]
    lines = [f"import {name}" for name in names]
    check = f"import sys; heavy = {HEAVY!r} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", "\n".join([*lines, check])], check=True, cwd=ROOT)


def test_help_answers_without_torch():
    code = (
        "import sys\nfrom lowrank_core.cli import main\n"
        "try:\n    main(['search', '--help'])\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
