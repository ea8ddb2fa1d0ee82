"""Exported models: contents, verification, loading, files."""

from __future__ import annotations

from functools import partial

import streamlit as st

from lowrank_core.runs import Run, client
from lowrank_core.runs.client import results
from lowrank_core.studies.requests import VerifyRequest
from lowrank_core.studio.compare.comparison import argument_of
from lowrank_core.studio.export.export_list import (
    MAX_BYTES,
    Proof,
    Written,
    card_of,
    loading_of,
    rank_table_of,
    ranks_in_words,
    written_models,
    zipped,
)
from lowrank_core.studio.shared.formatting import DASH, count, number, percent, size, timestamp
from lowrank_core.studio.shared.reproduce import verify_command
from lowrank_core.studio.shared.table import Column, Table
from pages.components import layout, tables
from pages.components.boundary import boundary
from pages.components.request_controls import ask, why_not
from pages.components.widgets import offer, pressed

__all__ = ["show"]


def show(run: Run) -> None:
    """Draw every exported model, the newest first.

    Raises:
        RunError: an answer of the worker is damaged.
    """
    result = sorted(written_models(run, results(run)), key=lambda entry: entry.changed or 0.0, reverse=True)
    if not result:
        st.caption(
            "None yet. An exported folder is a valid `--model` of the command line, and can be verified against its recorded perplexity."
        )
    asked = {str(argument_of(request, "path")) for request in client.pending_requests(run) if request.get("kind") == "verify"}
    for position, entry in enumerate(result):
        with st.container(border=True, key=f"written_{position}"), boundary():
            _entry(run, entry, waits=entry.path.name in asked)


def _entry(run: Run, entry: Written, *, waits: bool) -> None:
    name = entry.path.name
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f"**{name}**" + (f" · healed ({entry.healed})" if entry.healed else ""), width="content")
        _badge(entry.proof)
    if entry.damage:
        st.error(f"{entry.damage} Delete the folder, and write the model again.", icon=":material/error:")
        return
    if entry.bytes is None:
        st.warning(f"The folder is missing: {entry.path}. Write the model again.", icon=":material/folder_off:")
        return
    _facts(entry)
    _proof(entry, waits=waits)
    with st.container(horizontal=True):
        _verify_button(run, name, waits=waits)
        _folder_button(entry)
        _card_button(entry)
    _details(entry)


def _badge(proof: Proof | None) -> None:
    if proof is None:
        st.badge("Not verified yet", icon=":material/help:", color="gray")
    elif proof.ok:
        st.badge("Proven", icon=":material/verified:", color="green")
    else:
        st.badge("Failed", icon=":material/cancel:", color="red")


def _facts(entry: Written) -> None:
    removed = f"{percent(entry.compression_ratio)} of the linears, {percent(entry.model_compression_ratio)} of the model"
    words = [
        entry.form_words,
        f"{size(entry.bytes)} of weights, {count(entry.parameters)} parameters",
        f"removed: {removed}" if entry.compression_ratio is not None else "",
        ranks_in_words(entry.ranks) if entry.ranks else "",
        f"written {timestamp(entry.changed)}" if entry.changed else "",
    ]
    st.caption(" · ".join(word for word in words if word))


def _proof(entry: Written, *, waits: bool) -> None:
    """Show the verification; the verdict is text and icon, not colour alone."""
    result = entry.proof
    if waits:
        st.caption("Being loaded and measured again in a fresh process…")
        return
    if result is None:
        if entry.perplexity is not None:
            st.caption(f"As it was written: perplexity {number(entry.perplexity, 5)}. {entry.protocol}")
        return
    if result.error:
        st.error(f"{result.verdict}. {result.error}", icon=":material/cancel:")
        return
    box, icon = (st.success, ":material/check_circle:") if result.ok else (st.error, ":material/cancel:")
    layout.metrics_row(
        {
            "Perplexity as written": (number(result.recorded, 6), "Measured on the folder when it was written."),
            "As reloaded": (number(result.measured, 6), "Measured in a fresh process."),
            "Difference": (_signed(result.difference), f"Rounding allows {number(result.tolerance, 2)}."),
        }
    )
    box(_told(result), icon=icon)


def _signed(difference: float | None) -> str:
    return DASH if difference is None else f"{difference:+.2g}" if difference else "0"


def _told(result: Proof) -> str:
    when = f", {timestamp(result.time)}" if result.time else ""
    files = "1 weight file has" if result.files == 1 else f"{result.files} weight files have"
    return f"{result.verdict}{when}. {files} the listed size and SHA-256. {result.protocol}."


def _verify_button(run: Run, name: str, *, waits: bool) -> None:
    """Draw the button that verifies an export in a fresh process."""
    reason = why_not(run, "A recorded run has no worker.") or ("Already queued." if waits else None)
    if pressed("Reload and measure again", key=f"verify_{name}", icon=":material/verified:", why_not=reason):
        ask(run, [VerifyRequest(name)])


def _folder_button(entry: Written) -> None:
    name, fits = entry.path.name, entry.folder_bytes <= MAX_BYTES
    offer(
        f"Folder (.zip, {size(entry.folder_bytes)})",
        f"{name}.zip",
        partial(zipped, entry.path),
        key=f"zip_{name}",
        icon=":material/folder_zip:",
        disabled=not fits,
        help=None if fits else f"Larger than {size(MAX_BYTES)}, too large for a browser's download. Copy the folder: {entry.path}",
    )


def _card_button(entry: Written) -> None:
    card, name = card_of(entry.path), entry.path.name
    if card is not None:
        offer("Model card", f"{name}-README.md", card, key=f"card_{name}", icon=":material/article:")


def _details(entry: Written) -> None:
    name = entry.path.name
    with st.expander("Loading, verification on the command line, ranks", key=f"details_{name}"):
        for way in loading_of(entry.path, entry.form, with_code=entry.with_code, auto_class=entry.auto_class):
            st.caption(way.title)
            st.code(way.code, language=way.language, wrap_lines=True)
        st.caption("The same check on the command line")
        st.code(verify_command(str(entry.path)), language="bash", wrap_lines=True)
        if entry.ranks:
            columns = (Column.text("layer", "Layer"), Column.whole("rank", "Rank", "A dash: stays dense."))
            tables.show(Table(rank_table_of(entry.ranks), columns, f"Ranks of {name}"), key=f"ranks_{name}", height=240)
