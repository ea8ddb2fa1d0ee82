"""Repetition, endings and length of continuations, the dense model next to the compressed ones."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_core.runs import JsonMapping
from lowrank_core.runs.measurements import Behaviour
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studies.requests import BehaviourAnswer, answers_in
from lowrank_core.studio.shared.table import Column, Table, filled
from lowrank_core.studio.shared.trial_names import model_name

__all__ = ["BEHAVIOUR_MEANING", "behaviours"]

BEHAVIOUR_MEANING = (
    "Repeated 4-grams: share of a continuation's 4-grams that occurred before in it. Ended by themselves: continuations that an end token "
    "ended before the limit. A compressed model that repeats itself or does not end may still have a low KL."
)

Row = tuple[str, Behaviour, float | None]


def behaviours(bodies: Sequence[JsonMapping], trials: Sequence[TrialRecord] = ()) -> list[Table]:
    """Return the newest measurement of each model, a table for each protocol, the newest first.

    Raises:
        RunError: an answer is damaged.
    """
    newest: dict[str, dict[str, Row]] = {}
    for answer in answers_in(bodies, BehaviourAnswer):
        rows = newest.pop(answer.result.protocol, {})
        name = model_name(answer.filed_as, trials)
        own = {("Dense" if key == "dense" else name): (behaviour, ratio) for key, behaviour, ratio in answer.result.rows}
        newest[answer.result.protocol] = rows | {shown: (shown, *parts) for shown, parts in own.items()}
    return [_table(protocol, list(rows.values()), number) for number, (protocol, rows) in enumerate(reversed(newest.items()), 1)]


def _table(protocol: str, rows: Sequence[Row], number: int) -> Table:
    columns = (
        Column.text("model", "Model", width="medium").of(lambda row: row[0]),
        Column.share("repeated", "Repeated 4-grams").of(lambda row: row[1].repeated),
        Column.short("ended", "Ended by themselves").of(lambda row: row[1].ended_words),
        Column.number("tokens", "Length (tokens)", 1).of(lambda row: row[1].tokens),
        Column.number("ratio", "Length over dense", 2).of(lambda row: row[2]),
    )
    return Table(filled(rows, columns), columns, f"Behaviour in continuations. {protocol}.", f"behaviour-{number}")
