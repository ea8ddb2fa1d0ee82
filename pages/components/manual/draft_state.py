"""The draft of ranks on the page Pick by hand: kept for the session, saved for a reload, changed in steps that can be taken back."""

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

__all__ = ["Desk", "edit", "hint", "history", "note", "revision", "say", "step", "take"]


@dataclass(frozen=True)
class Desk:
    """What every part of the page works with."""

    run: Run
    search: SearchConfig
    facts: ModelFacts
    recipe: Recipe

    def key(self, name: str) -> str:
        """Return the key of a widget, or of something remembered, for this run alone."""
        return f"hand_{name}_{self.run.id}"


def history(desk: Desk) -> DraftHistory:
    """Return the draft with its steps: of this session, else the one that the address names, else the first.

    Raises:
        LowRankError: the run can't be read, or its ratio not be met.
    """
    found: DraftHistory | None = state.held(desk.key("history"), None)
    if found is None:
        token, multiple = state.selection().draft, desk.search.compression.rank_multiple
        found = drafts.load_draft(desk.run, token, desk.recipe.units, rank_multiple=multiple) if token else None
        if found is None:
            draft, name = first_draft(desk.recipe, read_trials(desk.run), state.selection().trial)
            found = began(draft)
            state.keep(desk.key("source"), name)
        state.keep(desk.key("history"), found)
    mine: str | None = state.held(desk.key("token"), None)
    if mine is not None and state.selection().draft != mine:
        state.choose(draft=mine)
    return found


def edit(desk: Desk, change: Callable[[Draft], Draft], *, gesture: str = "", keep_table: bool = False) -> None:
    """Change the draft, as one step; what can't be is said on the page, and changes nothing.

    ``keep_table``: the change was made in the table, which shows it already.
    """
    _replace(desk, lambda before: before.edited(change, gesture=gesture), keep_table=keep_table)


def take(desk: Desk, draft: Callable[[], Draft], name: str) -> None:
    """Begin from another draft, as a step that can be taken back."""
    if _replace(desk, lambda before: before.started(draft())):
        state.keep(desk.key("source"), name)


def step(desk: Desk, way: Literal["undone", "redone", "reset"]) -> None:
    """Take a step back, or forth again, or return to the beginning."""
    _replace(desk, lambda before: getattr(before, way)())  # type: ignore[no-any-return]


def _replace(desk: Desk, change: Callable[[DraftHistory], DraftHistory], *, keep_table: bool = False) -> bool:
    say(desk, "")
    try:
        before = history(desk)
        after = change(before)
        state.keep(desk.key("history"), after)
        if after.present != before.present:
            _save(desk, after)
    except LowRankError as error:
        say(desk, str(error))
        keep_table = False
    if not keep_table:
        state.keep(desk.key("revision"), revision(desk) + 1)
    return not note(desk)


def _save(desk: Desk, after: DraftHistory) -> None:
    """Write the draft under a token of this session's own, so that nobody else's is written over."""
    token: str | None = state.held(desk.key("token"), None)
    if token is None:
        token = drafts.new_token()
        state.keep(desk.key("token"), token)
    drafts.save_draft(desk.run, token, after)
    state.choose(draft=token)


def revision(desk: Desk) -> int:
    """Return how often the draft was changed elsewhere than in the table, which then begins anew."""
    return state.held(desk.key("revision"), 0)


def say(desk: Desk, words: str, *, hint: str = "") -> None:
    """Leave a message about the last change: why it could not be made, or what is worth knowing of it."""
    state.keep(desk.key("note"), words)
    state.keep(desk.key("hint"), hint)


def note(desk: Desk) -> str:
    """Return why the last change could not be made; empty where it was."""
    return state.held(desk.key("note"), "")


def hint(desk: Desk) -> str:
    """Return what is worth knowing of the last change; empty where nothing is."""
    return state.held(desk.key("hint"), "")
