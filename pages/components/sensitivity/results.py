"""Live part of the Sensitivity page: map, curves, correlation of estimates, cells."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from lowrank_core.runs import Run
from lowrank_core.sensitivity.records import SensitivityRecord, read_records
from lowrank_core.spectra.spectrum import LayerSpectrum
from lowrank_core.studio.sensitivity import sensitivity_table as views
from lowrank_core.studio.sensitivity.sensitivity_chart import depth_figure, scatter_figure, types_figure
from lowrank_core.studio.shared.formatting import kind_label, percent
from lowrank_core.studio.shared.layer_map_chart import map_figure
from lowrank_core.studio.shared.model_facts import ModelFacts
from lowrank_core.studio.shared.run_list import is_busy
from lowrank_core.studio.shared.table import Column, Table
from pages.components import pickers, state, tables
from pages.components.boundary import live
from pages.components.charts import chart
from pages.components.sensitivity import form
from pages.components.widgets import choose, offer, pick

__all__ = ["watch"]

_TICK = 2.0  # seconds

_HOW = {
    True: "On the dotted line prediction and measurement are equal.",
    False: "Click a point to look into that module.",
}
"""Of a scatter, by whether the estimate is a prediction of the divergence itself."""


def watch(run: Run, facts: ModelFacts, spectra: Sequence[LayerSpectrum]) -> None:
    """Draw the measured cells; redraw while more arrive."""
    live(_show, _TICK if is_busy(run) else None, run, facts, spectra)


def _show(run: Run, facts: ModelFacts, spectra: Sequence[LayerSpectrum]) -> None:
    form.progress(run)
    records = read_records(run)
    if not records:
        own = "This recorded run has no sensitivities. Calibrate a model of your own on the Overview, then measure here:"
        reported = own if run.recorded else "Nothing measured yet. Press “Measure” above:"
        st.info(f"{reported} it shows which modules can be compressed far, and which can't.", icon=":material/info:")
        return
    record = _setting(records)
    st.caption(views.protocol_words(record.setting))
    for warning in run.status().dense_warnings:
        st.warning(warning, icon=":material/warning:")
    cells = views.cell_table(record, facts.matrices, spectra)
    names = [matrix.name for matrix in facts.matrices]
    kinds = list(dict.fromkeys(matrix.kind for matrix in facts.matrices))
    ratios = views.measured_ratios(cells)
    if ratios:
        kept = _ratio(ratios, first=float(cells.loc[cells["scope"] == "module", "kept"].iloc[0]))
        _map(cells, facts, kept)
    module = pickers.module_picker(names)
    _curves(cells, facts, module, kinds)
    if ratios:
        _estimates(cells, kept, kinds, module)
    _table(run, cells)


def _setting(records: Sequence[SensitivityRecord]) -> SensitivityRecord:
    """Return the current record, with a choice if cells have several settings."""
    if len(records) == 1:
        return records[0]
    by_key = {record.setting.key: record for record in records}
    help = "Cells of different metrics, storages or windows are not comparable."
    labels = {key: views.setting_label(record.setting) for key, record in by_key.items()}
    chosen = pick("Measured with", labels, key="sensitivity_setting", help=help, width=460)
    return by_key.get(chosen, records[0])


def _ratio(ratios: Sequence[float], first: float) -> float:
    labels = {ratio: percent(ratio, 0) for ratio in ratios}
    kept = choose("Kept of the module's parameters", labels, key="sensitivity_kept", default=first)
    return float(kept) if kept in ratios else first


def _map(cells: pd.DataFrame, facts: ModelFacts, kept: float) -> None:
    view = views.sensitivity_map(cells, facts.matrices, kept)
    chart(
        map_figure(view, state.module_of([matrix.name for matrix in facts.matrices])),
        key="sensitivity_map",
        title=f"KL to the dense model where one module alone keeps {percent(kept, 0)}",
        how="bright modules are expensive: leave them more ranks. Gaps are not measured. Click a cell to look into that module.",
        alt="Map of the measured KL divergence by block and module type, each module compressed alone",
        data=view.frame,
        on_pick=state.pick_from_chart("module", "sensitivity_map"),
    )
    st.caption(views.coverage(cells, facts.matrices, kept))


def _curves(cells: pd.DataFrame, facts: ModelFacts, module: str, kinds: Sequence[str]) -> None:
    chosen = facts.matrix(module)
    left, right = st.columns(2, gap="large")
    types, own = views.type_curves(cells), views.module_curve(cells, module)
    with left:
        chart(
            types_figure(types, own, kinds),
            key="sensitivity_types",
            title="Against the kept ratio",
            how="a type's curve has all its modules compressed together; the dashed one is the chosen module alone. Low and flat is cheap.",
            alt=f"KL divergence against kept ratio for each module type and for {module}, log scale",
            data=pd.concat([types, own]),
        )
    depth = views.depth_curves(cells, chosen.kind)
    with right:
        chart(
            depth_figure(depth, kinds, chosen, facts.blocks),
            key="sensitivity_depth",
            title=f"{kind_label(chosen.kind)} by depth, each module alone",
            how="where curves rise, the same type costs more; paler curves keep more. The type is that of the chosen module.",
            alt=f"KL divergence of every {chosen.kind} alone against its depth, a curve for each kept ratio, log scale",
            data=depth,
        )


def _estimates(cells: pd.DataFrame, kept: float, kinds: Sequence[str], module: str) -> None:
    st.subheader("Rank correlation of estimates", anchor=False)
    result = views.correlations(cells, kept)
    if result.empty:
        st.caption("No estimate is known for the measured modules.")
        return
    names = list(result["estimate"])
    left, right = st.columns(2, gap="large")
    with left:
        columns = (
            Column.text("label", "Estimate", "Computed without evaluating the model, at the same rank."),
            Column.number("rho", f"ρ, {percent(kept, 0)} kept", 2, "Spearman's rank correlation with the measured KL, over modules."),
            Column.whole("n", "n", "Modules at this ratio."),
            Column.number("rho_all", "ρ, all", 2, "Over the cells of all ratios; inflated by their common dependence on the ratio."),
            Column.whole("n_all", "n, all", "Cells of all ratios."),
        )
        tables.show(Table(result, columns, "Spearman's rank correlation of each estimate with the measured KL"), key="sensitivity_rho")
        labels = {name: views.ESTIMATES[name].label for name in names}
        name = pick("Estimate", labels, key="sensitivity_estimate", persist_state="session")
        estimate = views.ESTIMATES[name if name in names else names[0]]
        row = result[result["estimate"] == estimate.name].iloc[0]
        st.caption(f"{estimate.label}: {estimate.meaning}. {views.rho_words(row['rho'], int(row['n']))}.")
        st.caption("Energies are those discarded by the optimal truncation in each metric, whatever the metric of the factors.")
    here = views.at_ratio(cells, kept)
    with right:
        chart(
            scatter_figure(here, estimate, kinds, module),
            key="sensitivity_scatter",
            title=f"Measured KL at {percent(kept, 0)} kept against “{estimate.label}”",
            how=f"a good estimate puts the modules on one rising line. {_HOW[estimate.predicts]}",
            alt=f"Measured KL divergence of each module against {estimate.label}, log axes",
            data=here,
            on_pick=state.pick_from_chart("module", "sensitivity_scatter"),
        )


def _table(run: Run, cells: pd.DataFrame) -> None:
    with st.expander("All measured cells as a table"):
        columns = (
            Column.text("scope", "Compressed"),
            Column.text("name", "Module or type", width="medium"),
            Column.share("kept", "Target kept"),
            Column.share("kept_share", "Kept", "Parameters of the factors over those of the dense matrices."),
            Column.whole("rank", "Rank", "Of a type, the smallest."),
            Column.number("kl", "KL (nats/token)"),
            Column.number("kl_stderr", "Standard error", help="Over windows."),
            *(Column.number(name, estimate.label, help=estimate.meaning) for name, estimate in views.ESTIMATES.items()),
            Column.whole("windows", "Windows"),
            Column.whole("tokens", "Tokens"),
            Column.number("seconds", "Seconds", 2),
            Column.text("error", "Error"),
        )
        tables.show(Table(cells, columns, "Every measured cell"), key="sensitivity_cells", height=360)
        offer("Sensitivities (CSV)", f"{run.id}-sensitivity.csv", cells, key="download_sensitivity")
