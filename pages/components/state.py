"""The one selection that every page follows: run, module, trial. Only this module touches ``st.session_state``.

The selection is mirrored in the address, so that a link restores the view: ``?run=ID&module=NAME&trial=N&draft=TOKEN``. A link within the
dashboard that is to change the selection says ``?run=ID&pick=N``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import streamlit as st

from lowrank_core.errors import LowRankError
from lowrank_core.runs import Run
from lowrank_core.runs.drafts import has_draft
from lowrank_core.studies.records import read_trials
from lowrank_core.studio.shared.model_facts import model_facts
from lowrank_core.studio.shared.run_list import default_run, find_run

__all__ = [
    "Selection",
    "begin",
    "choose",
    "control",
    "framed",
    "held",
    "keep",
    "link_to_trial",
    "module_of",
    "notes",
    "pick_from_chart",
    "pick_from_vega",
    "pick_from_table",
    "pick_from_widget",
    "picked_rows",
    "run",
    "selection",
]

T = TypeVar("T")

_SELECTION, _NOTES, _LAST, _FRAMED = "selection", "link_notes", "last_pick", "framed"
_PICK = "pick"


@dataclass(frozen=True)
class Selection:
    """The current selection; None for the default: newest run, first module, best trial, no draft."""

    run: str | None = None
    module: str | None = None
    trial: int | None = None
    draft: str | None = None


def begin() -> None:
    """Read the selection from the address when a session starts; then keep the address up to date."""
    if _SELECTION not in st.session_state:
        chosen, result = _from_link(st.query_params)
        st.session_state[_SELECTION] = chosen
        st.session_state[_NOTES] = result
        st.session_state[_LAST] = {}
    elif _PICK in st.query_params and _has_trial(run(), st.query_params[_PICK]):
        choose(trial=int(st.query_params[_PICK]))
    st.session_state[_FRAMED] = True
    _mirror()


def framed() -> bool:
    """Return whether this redraw went through ``app.py``; call once at the start of a page."""
    return bool(st.session_state.pop(_FRAMED, False))


def selection() -> Selection:
    chosen: Selection = st.session_state.get(_SELECTION, Selection())
    return chosen


def notes() -> list[str]:
    """Return notes on invalid parts of the link that opened this session."""
    return list(st.session_state.get(_NOTES, []))


def run() -> Run | None:
    """Return the chosen run, else the newest with data, else the recorded one, else None."""
    identifier = selection().run
    chosen = find_run(identifier) if identifier else None
    return chosen or default_run()


def module_of(names: Sequence[str]) -> str:
    """Return the chosen module if the run has it, else the first of ``names``."""
    module = selection().module
    return module if module is not None and module in names else names[0]


def choose(**changes: str | int | None) -> None:
    """Change the selection; a new run resets trial and draft."""
    shown = run()
    if "run" in changes and (shown is None or changes["run"] != shown.id):
        changes = {"trial": None, "draft": None, **changes}
    st.session_state[_SELECTION] = replace(selection(), **changes)  # type: ignore[arg-type]
    st.session_state[_NOTES] = []
    _mirror()


def link_to_trial(number: int) -> dict[str, str]:
    """Return query parameters for a link that selects trial ``number`` of the current run.

    A browser that follows a link stops the ticks of the page that it leaves; after ``st.switch_page`` one may be under way, and Streamlit
    takes it for a return.
    """
    shown = run()
    return {**({"run": shown.id} if shown is not None else {}), _PICK: str(number)}


def control(key: str, value: object) -> str:
    """Return the key of the next widget that shows ``value``.

    It is a widget of its own each time that the value was changed elsewhere. In one and the same, a message of the browser that was under
    way, and still says the old value, would pass for a change by the user.
    """
    turns = f"{key}_turns"
    turn: int = st.session_state.get(turns, 0)
    name = f"{key}_{turn}" if turn else key
    if st.session_state.get(name, value) != value:
        turn += 1
        st.session_state[turns], name = turn, f"{key}_{turn}"
    st.session_state[name] = value  # also where it is there: it may be that of another page's widget
    return name


def keep(key: str, value: object) -> None:
    """Store ``value`` for this session, across pages."""
    st.session_state[key] = value


def held(key: str, default: T) -> T:
    """Return the stored value of ``key``, or that of its widget."""
    value: T = st.session_state.get(key, default)
    return value


def pick_from_widget(field: str, key: str) -> Callable[[], None]:
    """Return a callback that sets the selection's ``field`` from the widget ``key``."""

    def picked() -> None:
        choose(**{field: st.session_state[key]})

    return picked


def pick_from_table(field: str, key: str, values: Sequence[str | int]) -> Callable[[], None]:
    """Return a callback that sets ``field`` from the selected row of the table ``key``."""

    def picked() -> None:
        rows = st.session_state[key].selection.rows
        if len(rows) == 1 and rows[0] < len(values):
            choose(**{field: values[rows[0]]})

    return picked


def picked_rows(key: str, values: Sequence[str]) -> list[str]:
    """Return the ``values`` of the selected rows of the table ``key``, in order."""
    table = st.session_state.get(key)
    return [values[row] for row in sorted(table.selection.rows) if row < len(values)] if table is not None else []


def pick_from_chart(field: str, key: str) -> Callable[[], None]:
    """Return a callback that sets ``field`` from the clicked point of the chart ``key`` (first entry of its customdata).

    A second click on a point unpicks it in Plotly: here it picks it again, as something else may have been chosen meanwhile.
    """

    def picked() -> None:
        points = st.session_state[key].selection.points
        value = points[0]["customdata"][0] if points else st.session_state[_LAST].get(key)
        if value is not None:
            st.session_state[_LAST][key] = value
            choose(**{field: value})

    return picked


def pick_from_vega(field: str, key: str, selection_name: str, column: str) -> Callable[[], None]:
    """Return a callback that sets the integer ``field`` from ``column`` of the clicked point of the Vega-Lite chart ``key``.

    Streamlit calls it when the chart is moved, too: only another point than the last counts.
    """

    def picked() -> None:
        points = st.session_state[key].selection.get(selection_name)
        value = int(points[0][column]) if points else None
        if value is not None and value != st.session_state[_LAST].get(key):
            choose(**{field: value})
        st.session_state[_LAST][key] = value

    return picked


def _mirror() -> None:
    """Write the current view to the address."""
    shown, chosen = run(), selection()
    wanted = {
        name: str(value)
        for name, value in (
            ("run", shown.id if shown else None),
            ("module", chosen.module),
            ("trial", chosen.trial),
            ("draft", chosen.draft),
        )
        if value is not None
    }
    if st.query_params.to_dict() != wanted:
        st.query_params.from_dict(wanted)


def _from_link(link: Mapping[str, str]) -> tuple[Selection, list[str]]:
    """Return the selection of ``link``, and a note for each invalid value."""
    result: list[str] = []
    identifier = link.get("run")
    if identifier and find_run(identifier) is None:
        result.append(f"The link names the run `{identifier}`, which is not here; another one is shown.")
        identifier = None
    shown = find_run(identifier) if identifier else default_run()
    module, trial = link.get("module"), link.get(_PICK) or link.get("trial")
    if module and not _has_module(shown, module):
        result.append(f"The link names the module `{module}`, which this model does not have.")
        module = None
    if trial and not _has_trial(shown, trial):
        result.append(f"The link names the trial `{trial}`, which this run does not have; the best one is shown.")
        trial = None
    draft = link.get("draft")
    if draft and (shown is None or not has_draft(shown, draft)):
        result.append("The link names a draft of ranks that no longer exists; a new draft is shown.")
        draft = None
    return Selection(identifier, module or None, int(trial) if trial else None, draft or None), result


def _has_module(shown: Run | None, module: str) -> bool:
    try:
        facts = model_facts(shown) if shown else None
    except LowRankError:
        return False
    return facts is not None and any(matrix.name == module for matrix in facts.matrices)


def _has_trial(shown: Run | None, trial: str) -> bool:
    try:
        return shown is not None and trial.isdecimal() and any(record.number == int(trial) for record in read_trials(shown))
    except LowRankError:
        return False
