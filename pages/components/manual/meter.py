"""Cost and predicted loss of the draft, and actions on all rows."""

from __future__ import annotations

import streamlit as st

from lowrank_core.allocation import DraftHistory
from lowrank_core.parameters import FLOPS_MEANING
from lowrank_core.studio.manual.expected_kl import predicted_kl
from lowrank_core.studio.manual.rank_table import Bill, bill
from lowrank_core.studio.manual.starting_points import rules
from lowrank_core.studio.shared.formatting import count, number, percent, sizes
from pages.components import coverage, state
from pages.components.layout import metrics_row
from pages.components.manual.draft_state import DraftState, edit, hint, note, step
from pages.components.manual.starting_point import budget_ratio
from pages.components.widgets import pick

__all__ = ["meter", "steps"]

_PROPORTION = ""


def meter(editor: DraftState, history: DraftHistory) -> None:
    """Draw budget, sizes and prediction of the draft."""
    draft, search = history.present, editor.search
    cost = bill(draft, editor.facts, budget_ratio(editor), run_ratio=search.compression_ratio if search.max_ratio is None else None)
    with st.container():
        if note(editor):
            st.error(note(editor), icon=":material/error:")
        if hint(editor):
            st.info(hint(editor), icon=":material/info:")
    st.progress(cost.share, text=_budget_words(cost))
    stored, dense_stored = sizes((cost.bytes, cost.dense_bytes))
    predicted = predicted_kl(editor.recipe.record, draft.ranks)
    metrics_row(
        {
            "Removed, linears": (percent(cost.removed, 2), f"{cost.kept:,} of {cost.dense:,} parameters are kept, index tables counted."),
            "Removed, whole model": (percent(cost.model_removed, 2), f"{cost.model:,} of {cost.dense_model:,} parameters are kept."),
            "Model on disk": (stored, f"{dense_stored} before, in the dtype that is written, without headers."),
            "FLOPs per token": (
                count(cost.flops),
                f"{count(cost.dense_flops)} before. {FLOPS_MEANING}",
            ),
            "Predicted KL": (number(predicted), "Sum over all rows, nats per token: a prediction, not a measurement."),
        }
    )
    coverage.show(editor.facts, cost.removed)
    coverage.warn(editor.facts)
    if not cost.counts:
        st.warning(
            f"Over the run's budget of {percent(search.compression_ratio)} removed: it can be measured but never counts as the best.",
            icon=":material/scale:",
        )


def _budget_words(cost: Bill) -> str:
    if cost.left < 0:
        return f"**{-cost.left:,} parameters over the budget**: keeps {cost.kept:,} of {cost.allowed:,}."
    met = f" The budget is met: {cost.left:,} are left, less than one more rank costs." if cost.spent else f" {cost.left:,} are left."
    return f"Keeps {cost.kept:,} of {cost.allowed:,} parameters.{met}"


def steps(editor: DraftState, history: DraftHistory) -> None:
    """Draw undo, redo, reset, fitting to the budget, and locks."""
    draft, names = history.present, list(history.present.ranks)
    steps = (
        ("Undo", "undo", "undone", not history.past, None),
        ("Redo", "redo", "redone", not history.future, None),
        ("Reset", "restart_alt", "reset", draft == history.start, "Back to the starting point of the draft."),
    )
    locks = (("Lock all", "lock", True, len(names) == len(draft.locked)), ("Unlock all", "lock_open", False, not draft.locked))
    with st.container(horizontal=True, gap="small"):
        for label, icon, way, idle, help in steps:
            key, args = f"hand_{label.lower()}", (editor, way)
            st.button(label, key=key, icon=f":material/{icon}:", disabled=idle, on_click=step, args=args, help=help)
        with st.popover("Fit the rest to the budget", icon=":material/balance:", key="hand_fit_popover"):
            _fit(editor)
        for label, icon, locked, idle in locks:
            key = f"hand_{label.lower().removesuffix(' all')}"
            st.button(label, key=key, icon=f":material/{icon}:", disabled=idle, on_click=_lock, args=(editor, names, locked))


def _fit(editor: DraftState) -> None:
    result = {_PROPORTION: "In proportion to what they keep now", **rules(editor.recipe)}
    key = editor.key("rule")
    help = "A rule reallocates all unlocked rows; Lagrangian may also regroup unlocked modules."
    pick("How the unlocked rows share the remaining budget", result, key=key, help=help)
    st.button("Fit", key="hand_fit", type="primary", on_click=_fitted, args=(editor, key))


def _fitted(editor: DraftState, key: str) -> None:
    rule, ratio = state.held(key, _PROPORTION), budget_ratio(editor)
    edit(editor, lambda draft: editor.recipe.refitted(draft, rule, ratio) if rule else draft.fitted(ratio))


def _lock(editor: DraftState, names: list[str], locked: bool) -> None:
    edit(editor, lambda draft: draft.with_locks(names, locked=locked))
