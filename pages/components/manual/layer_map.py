"""Layer x module map of a draft, and the grouping of the selected module."""

from __future__ import annotations

from lowrank_core.allocation import Draft
from lowrank_core.studio.manual.rank_table import groupings
from lowrank_core.studio.shared.allocation_map import allocation_map, loss_map
from lowrank_core.studio.shared.formatting import percent
from lowrank_core.studio.shared.layer_map_chart import map_figure
from pages.components import state
from pages.components.charts import chart
from pages.components.manual.draft_state import DraftState, edit
from pages.components.widgets import choose, pick

__all__ = ["show"]


def show(editor: DraftState, draft: Draft) -> None:
    """Draw the kept fraction or the share of predicted loss; a click selects a module."""
    record, units = editor.recipe.record, editor.recipe.units
    allocation, module = draft.allocation("draft"), state.selection().module
    loss = record is not None and record.predicts and _wants_loss()
    view = loss_map(allocation, units, record) if record is not None and loss else allocation_map(allocation, units)
    chart(
        map_figure(view, module),
        key="hand_map",
        title="Share of the predicted ΔKL" if loss else "Where this draft keeps its parameters",
        how="bright cells have the largest predicted cost; members of a stack show the share of the whole stack. Click a cell to select it."
        if loss
        else f"bright cells keep most, 100 % is dense; {percent(allocation.compression_ratio)} removed. Click a cell to select it.",
        alt="Kept fraction of parameters, or share of the predicted loss, by block and module type",
        data=view.frame,
        on_pick=state.pick_from_chart("module", "hand_map"),
    )
    if module is not None:
        _grouping(editor, draft, module)


def _wants_loss() -> bool:
    words = {"kept": "Parameters kept", "loss": "Predicted ΔKL"}
    return choose("Map of", words, key="hand_map_of") == "loss"


def _grouping(editor: DraftState, draft: Draft, module: str) -> None:
    result = groupings(draft, module)
    if len(result) < 2:
        return
    key = state.control(editor.key("grouping"), next(iter(result)))
    pick(
        f"Compress `{module}`",
        result,
        key=key,
        on_change=_regroup,
        args=(editor, key),
        help="Modules that shared its row get rows of their own. Every matrix keeps about its fraction.",
        width=420,
    )


def _regroup(editor: DraftState, key: str) -> None:
    name = state.held(key, "")
    edit(editor, lambda draft: draft.regrouped(name))
