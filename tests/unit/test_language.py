"""Words that the project retired do not come back: in strings of the interface, docstrings and docs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RETIRED = {
    # pattern: what to write instead, or why not
    r"\b(anew|wholly|heed|beside)\b": "again, entirely, respect, next to: archaic",
    r"\bmakes? way\b": "is replaced, yields",
    r"\b(is|puts?|putting|waits?) in line\b|\bin line[:.]": "queued",
    r"\b[Bb]y hand\b|\bhand-picked\b": "manually, manual",
    r"\b([Ii]s|was|are|were|be|been|as|not|and) told\b|[:;,] told\b": "reported, known, checked",
    r"\b[Ff]igures\b(?!:| \d)": "numbers, metrics (for numbers), charts (for pictures)",
    r"\bthe least\b(?! squares|-)|\bthe most (that|of|from)\b|\((least|most) to|\b[Oo]f least\b|, (least|most)$": "minimum, maximum",
    r"\b(Least|Most) (removed|kept|of|to)\b": "Min, Max",
    r"\b(Desk|Shelf|Tested)\b": "WorkerContext, LastBuilt, EvaluationCache",
    r"\bmarginal\b": "lagrangian",
    r"\b[Bb]ases\b(?!:)": "metrics",
    r"\bslopes (are|were|of|measured)\b|[Mm]easur\w+ slopes": "error weights",
    r"\b(atlas|takeaway)\b": "layer map, export list",
    r"What the trials were made of": "Trial parameters",
    r"How far can I go": "Sweep of ratios (Pareto front)",
    r"Win some of it back|[Hh]eal it\b": "Healing (recovery fine-tuning), Start",
    r"[Ll]ook closer|[Tt]ake it away|\btak(e|en) away\b": "Diagnostics, Export",
    r"What is (lost|saved)\b": "Quality, Size",
    r"measured or asked for|Withdraw all": "measured or queued, Cancel all",
    r"Reading the prompt|Writing tokens|First token\b|\.\d+ of it\b": "Prefill, Decode, TTFT, 0.72x",
    r"\bMy own\b|\bOurs\b|The paper's, as published": "Custom, Studio (default), Bolaco (as published)",
    r"numbers that (the|its) others tell|know no factors": "same matrix, r(m+n-r) parameters; runs merged only",
    r"\b(METHODS|ARCHITECTURE|SERVING|MODELS|DESIGN|STYLE)(\.md| §)": "cite docs/*.md or a paper",
}

ORIGINAL = r"\bthe original\b|\bOriginal\b"
"""``dense``: the model before compression has one name."""

CLAUSE = re.compile(r"(What|Which|How|Where|When|Who|Whose|Why)\b")
"""A docstring that begins with a relative clause has no noun: say what the thing is."""


def _sources() -> list[Path]:
    paths = [ROOT / "app.py", *(ROOT / "pages").rglob("*.py"), *(ROOT / "lowrank_core").rglob("*.py")]
    return sorted(path for path in paths if "_bundle" not in path.parts)


def _strings(tree: ast.AST, *, docs: bool) -> Iterator[tuple[int, str]]:
    """Yield line and text of the docstrings, those of attributes included, or of all other strings."""
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        named = isinstance(text, str) and text.isidentifier() and not text[0].isupper()
        if isinstance(text, str) and (id(node) in documented) == docs and not named:
            yield node.lineno, text


def _hits(where: str, text: str, patterns: dict[str, str]) -> list[str]:
    flat = re.sub(r"\s+", " ", text)
    return [f"{where}: {match[0]!r} in {flat[:90]!r} -> {use}" for pattern, use in patterns.items() for match in re.finditer(pattern, flat)]


def _interface(path: Path) -> bool:
    return path.relative_to(ROOT).parts[:2] in {("lowrank_core", "studio"), ("lowrank_core", "cli")} or "pages" in path.parts


def test_the_interface_uses_no_retired_words() -> None:
    hits = []
    for path in filter(_interface, _sources()):
        for line, text in _strings(ast.parse(path.read_text("utf-8")), docs=False):
            hits += _hits(f"{path.relative_to(ROOT)}:{line}", text, {**RETIRED, ORIGINAL: "dense"})
    assert not hits, "\n".join(hits)


def test_docstrings_use_no_retired_words_and_begin_with_a_noun_or_a_verb() -> None:
    hits = []
    for path in _sources():
        for line, text in _strings(ast.parse(path.read_text("utf-8")), docs=True):
            where = f"{path.relative_to(ROOT)}:{line}"
            hits += _hits(where, re.sub(r"``[^`]+``", "", text), RETIRED)
            if CLAUSE.match(text):
                hits.append(f"{where}: begins with a clause: {text[:90]!r}")
    assert not hits, "\n".join(hits)


def test_the_docs_use_no_retired_words() -> None:
    hits = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = re.sub(r"`[^`]*`", "", path.read_text("utf-8"))
        hits += _hits(path.name, text, {**RETIRED, ORIGINAL: "dense"})
    assert not hits, "\n".join(hits)


@pytest.mark.parametrize("sentence", ["it is told first", "Look closer", "Ours", "median (least to most)", "METHODS §3", "0.72 of it"])
def test_a_retired_word_is_seen(sentence: str) -> None:
    assert _hits("here", sentence, RETIRED)
