"""Layer x module map of a draft, and the grouping of the selected module."""

from __future__ import annotations

from lowrank_core.allocation import Draft
from lowrank_core.studio.manual.rank_table import groupings
from lowrank_core.studio.shared.allocation_map import allocation_map, loss_map
from lowrank_core.studio.shared.chart_style import Chart
from lowrank_core.studio.shared.layer_map_chart import allocation_chart, map_figure
from pages.components import charts, state
from pages.components.manual.draft_state import DraftState, edit
from pages.components.widgets import choose, pick

__all__ = ["show"]


def show(editor: DraftState, draft: Draft) -> None:
    """Draw the kept fraction or the share of predicted loss; a click selects a module."""
    record, units = editor.recipe.record, editor.recipe.units
    allocation, module = draft.allocation("draft"), state.selection().module
    loss = record is not None and record.predicts and _wants_loss()
    if record is not None and loss:
        view = loss_map(allocation, units, record)
        spec = Chart(
            map_figure(view, module),
            view.frame,
            name="predicted-loss",
            title="Share of the predicted ΔKL",
            how="bright cells have the largest predicted cost; members of a stack show the share of the whole stack.",
            alt="Share of the predicted loss, by block and module type",
        )
    else:
        spec = allocation_chart(allocation_map(allocation, units), "this draft", allocation.compression_ratio, module)
    charts.show(spec, key="hand_map", hint="Click a cell to select it.", on_pick=state.pick_from_chart("module", "hand_map"))
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
