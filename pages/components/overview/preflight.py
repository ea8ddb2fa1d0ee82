"""Preview before a run: module tree, memory estimate, beginning of the text."""

from __future__ import annotations

import streamlit as st

from lowrank_core.config import RunConfig
from lowrank_core.studio.overview.checkpoint import ModelOnDisk, tensor_table
from lowrank_core.studio.overview.memory_estimate import DEVICE, DISK, MEMORY, Fit, fit_of, fit_table, this_machine
from lowrank_core.studio.overview.module_tree_chart import ARRANGEMENTS, module_tree, tree_html
from lowrank_core.studio.overview.source_checks import hub_cache
from lowrank_core.studio.overview.text_preview import CHARACTERS_PER_TOKEN, TextPreview, preview_table, preview_warnings
from lowrank_core.studio.shared.formatting import count, percent, size
from lowrank_core.studio.shared.spreadsheet import csv_of
from lowrank_core.studio.shared.stage_estimate import stage_estimate, stage_estimate_words
from lowrank_core.studio.shared.table import Column, Table
from pages.components import coverage, tables
from pages.components.widgets import choose, offer

__all__ = ["fit_line", "notes", "show", "tree"]

_TREE_HEIGHT, _MAX_BRANCHES = 520, 20  # pixels; branches that are shown at once
_PLACES = {MEMORY: "Memory", DEVICE: "GPU memory", DISK: "Disk"}


def show(reference: str, model: ModelOnDisk | None, preview: TextPreview | None, config: RunConfig | None) -> None:
    """Draw the three views, or what each needs."""
    notes(model)
    modules, fit, text = st.tabs(["Modules", "Memory estimate", "Text"])
    with modules:
        if model is not None:
            tree(model, key="start_tree")
        else:
            _not_here(reference)
    with fit:
        if model is not None and config is not None:
            _fit(fit_of(model.facts, config, this_machine()))
        else:
            st.caption("Available once the model is on this machine.")
    with text:
        if preview is not None and config is not None:
            _preview(preview, config)
        else:
            st.caption("Choose a readable text; see the message above.")


def notes(model: ModelOnDisk | None) -> None:
    """Show notes on a folder, such as the set of weights that is loaded."""
    for note in model.notes if model is not None else ():
        st.info(note, icon=":material/info:")


def tree(model: ModelOnDisk, *, key: str) -> None:
    """Draw the module tree of a checkpoint, and offer its tensors as a file."""
    facts = model.facts
    with st.container(horizontal=True, vertical_alignment="center"):
        arrangement = choose("Arrangement", ARRANGEMENTS, key=f"{key}_by", label_visibility="collapsed")
        help = "Every tensor with shape, dtype, parameters and treatment."
        offer("CSV", "tensors.csv", lambda: csv_of(tensor_table(model.parts)).encode(), key=f"{key}_csv", help=help, type="tertiary")
    files = "one file" if len(model.files) == 1 else f"{len(model.files)} files"
    st.caption(
        f"{facts.architecture} · {count(facts.parameters)} parameters, {percent(facts.compressible_share)} of them compressible · "
        f"{size(facts.bytes)} as {facts.dtype} in {files} · from the file headers, without loading weights"
    )
    coverage.show(facts)
    root = module_tree(model.parts, str(arrangement))
    with st.container(height=_TREE_HEIGHT if len(root.children) > _MAX_BRANCHES else "content", border=False, key=f"{key}_box"):
        st.html(tree_html(root))


def _not_here(reference: str) -> None:
    if not reference.strip():
        st.caption("Enter a folder, a GGUF file or a hub id above.")
        return
    st.info(
        f"**{reference}** is not on this machine. When a run starts, its config, tokenizer and safetensors weights are downloaded from "
        f"huggingface.co into `{hub_cache()}`; its size is known only to the hub. Modules and sizes appear after the download.",
        icon=":material/cloud_download:",
    )


def fit_line(model: ModelOnDisk, config: RunConfig) -> None:
    """Show the memory and time that a calibration takes; warn if it does not fit or little is compressible."""
    coverage.warn(model.facts)
    fit = fit_of(model.facts, config, this_machine())
    words = " and ".join(f"**{size(fit.needed(place))}** of {place} ({size(fit.free(place))} free)" for place in fit.places)
    if fit.short_of:
        st.warning(f"Estimate: {words}. Does not fit: too little {' and '.join(fit.short_of)}.", icon=":material/memory:")
    else:
        st.caption(f"Estimate: {words}. {stage_estimate_words(stage_estimate(config, model.facts))}", width="content")


def _fit(fit: Fit) -> None:
    gpu = fit.machine.gpu
    where = f"{gpu.name}, as nvidia-smi sees it" if gpu else "nvidia-smi is absent or sees none, so the CPU is counted on"
    st.caption(f"An estimate of what calibration takes, next to Python and its libraries. GPU: {where}.")
    for place in fit.short_of:
        st.warning(f"{_PLACES[place]}: {size(fit.needed(place))} needed, {size(fit.free(place))} free.", icon=":material/memory:")
    words = {"part": "What", "place": "Where", "size": "Size", "how": "Details of the estimate"}
    rows = fit_table(fit)[list(words)].rename(columns=words)
    st.table(rows, border="horizontal", hide_index=True, alt="What a calibration takes, by line")  # its cells wrap: they hold sentences


def _preview(preview: TextPreview, config: RunConfig) -> None:
    if preview.note:
        st.info(preview.note, icon=":material/info:")
    for warning in preview_warnings(preview, config.text):
        st.warning(warning, icon=":material/short_text:")
    counted = "Characters are counted" if preview.counted else "Characters are estimated from the file size"
    st.caption(f"{counted}; tokens are an estimate at {CHARACTERS_PER_TOKEN} characters each. The splits are disjoint.")
    columns = (
        Column.text("split", "Split"),
        Column.whole("characters", "Characters"),
        Column.whole("tokens", "Tokens (estimate)"),
        Column.whole("windows", f"Windows of {config.text.context} (estimate)"),
        Column.whole("asked", "Requested windows"),
    )
    tables.show(Table(preview_table(preview, config.text), columns, "Size of each split"), key="preview_table")
    beginnings = [split for split in preview.splits if split.beginning]
    if beginnings:
        for tab, split in zip(st.tabs([f"{split.name} begins".capitalize() for split in beginnings]), beginnings, strict=True):
            tab.code(split.beginning, language=None, height=200)
