"""State of the rank draft: kept in the session, saved for reloads, with undo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lowrank_core.allocation import Draft, DraftHistory, began
from lowrank_core.config import SearchConfig
from lowrank_core.errors import LowRankError
from lowrank_core.runs import Run, drafts
from lowrank_core.studies.records import read_trials
from lowrank_core.studio.manual.starting_points import Recipe, first_draft
from lowrank_core.studio.shared.model_facts import ModelFacts
from pages.components import state

__all__ = ["DraftState", "edit", "hint", "history", "note", "revision", "say", "step", "take"]


@dataclass(frozen=True)
class DraftState:
    """Shared state of the page's sections."""

    run: Run
    search: SearchConfig
    facts: ModelFacts
    recipe: Recipe

    def key(self, name: str) -> str:
        """Return a session or widget key of this run."""
        return f"hand_{name}_{self.run.id}"


def history(editor: DraftState) -> DraftHistory:
    """Return the draft with its steps: from the session, else from the address, else the first.

    Raises:
        LowRankError: the run can't be read, or its ratio not be met.
    """
    result: DraftHistory | None = state.held(editor.key("history"), None)
    if result is None:
        token, multiple = state.selection().draft, editor.search.compression.rank_multiple
        result = drafts.load_draft(editor.run, token, editor.recipe.units, rank_multiple=multiple) if token else None
        if result is None:
            draft, name = first_draft(editor.recipe, read_trials(editor.run), state.selection().trial)
            result = began(draft)
            state.keep(editor.key("source"), name)
        state.keep(editor.key("history"), result)
    mine: str | None = state.held(editor.key("token"), None)
    if mine is not None and state.selection().draft != mine:
        state.choose(draft=mine)
    return result


def edit(editor: DraftState, change: Callable[[Draft], Draft], *, gesture: str = "", keep_table: bool = False) -> None:
    """Change the draft in one step; an invalid change is reported and does nothing.

    ``keep_table``: the change was made in the table, which shows it already.
    """
    _replace(editor, lambda before: before.edited(change, gesture=gesture), keep_table=keep_table)


def take(editor: DraftState, draft: Callable[[], Draft], name: str) -> None:
    """Start from another draft, as an undoable step."""
    if _replace(editor, lambda before: before.started(draft())):
        state.keep(editor.key("source"), name)


def step(editor: DraftState, way: Literal["undone", "redone", "reset"]) -> None:
    """Undo, redo, or reset."""
    _replace(editor, lambda before: getattr(before, way)())  # type: ignore[no-any-return]


def _replace(editor: DraftState, change: Callable[[DraftHistory], DraftHistory], *, keep_table: bool = False) -> bool:
    say(editor, "")
    try:
        before = history(editor)
        after = change(before)
        state.keep(editor.key("history"), after)
        if after.present != before.present:
            _save(editor, after)
    except LowRankError as error:
        say(editor, str(error))
        keep_table = False
    if not keep_table:
        state.keep(editor.key("revision"), revision(editor) + 1)
    return not note(editor)


def _save(editor: DraftState, after: DraftHistory) -> None:
    """Save the draft under a token of this session."""
    token: str | None = state.held(editor.key("token"), None)
    if token is None:
        token = drafts.new_token()
        state.keep(editor.key("token"), token)
    drafts.save_draft(editor.run, token, after)
    state.choose(draft=token)


def revision(editor: DraftState) -> int:
    """Return the number of changes outside the table, each of which resets it."""
    return state.held(editor.key("revision"), 0)


def say(editor: DraftState, words: str, *, hint: str = "") -> None:
    """Leave an error or a hint on the last change."""
    state.keep(editor.key("note"), words)
    state.keep(editor.key("hint"), hint)


def note(editor: DraftState) -> str:
    """Return the error of the last change; empty without one."""
    return state.held(editor.key("note"), "")


def hint(editor: DraftState) -> str:
    """Return the hint on the last change; empty without one."""
    return state.held(editor.key("hint"), "")
