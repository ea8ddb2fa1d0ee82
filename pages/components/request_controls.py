"""Controls to start runs, and to submit, watch and cancel requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import streamlit as st

from lowrank_core.config import RunConfig
from lowrank_core.runs import Run, client, create_run
from lowrank_core.studies.requests import Request
from lowrank_core.studio.shared.model_refs import request_words
from lowrank_core.studio.shared.run_list import is_working, status_words
from pages.components import state
from pages.components.boundary import boundary
from pages.components.sidebar import resume_button

__all__ = ["ask", "start", "waiting", "why_not"]

_RECORDED = "A recorded run has no worker: start a search of your own to measure."


def start(config: RunConfig) -> None:
    """Create a run, start its worker, select it and redraw the page."""
    with boundary():
        run = create_run(config)
        client.start_worker(run)
        state.choose(run=run.id)
        st.rerun()


def why_not(run: Run, words: str = _RECORDED) -> str | None:
    """Return why ``run`` takes no requests, by default in the usual words, for a disabled button's help; None if it does."""
    return words if run.recorded else None


def ask(run: Run, requests: Iterable[Request]) -> None:
    """Submit requests in order, and redraw the page; show why one is refused, also as it is made."""
    with boundary():
        for request in requests:
            client.submit(run, request)
        st.rerun()


def waiting(run: Run) -> None:
    """Show the worker's state and the queue, with a cancel button each; nothing if empty."""
    requests = client.pending_requests(run)
    if not requests:
        return
    status, alive = run.status(), run.worker_alive()
    with st.container(border=True):
        if alive:
            doing = f"{status.stage} · {status_words(status)}".strip(" ·") if is_working(status) else request_words(requests[0])
            st.progress(status.fraction or 0.0, text=doing)
        else:
            st.warning(f"{len(requests)} requests are queued, but no worker is running.", icon=":material/pause:")
            resume_button(run, key="resume_requests", width="content")
        _list(run, requests)


def _list(run: Run, requests: Sequence[Mapping[str, object]]) -> None:
    names = [str(request.get("id")) for request in requests]
    with st.container(horizontal=True, vertical_alignment="center"):
        with st.popover(f"{len(requests)} queued", icon=":material/list:", key="waiting_list"):
            for name, request in zip(names, requests, strict=True):
                with st.container(horizontal=True, vertical_alignment="center"):
                    st.caption(request_words(request), width=340)
                    if st.button("Withdraw", key=f"withdraw_{name}", type="tertiary", icon=":material/close:"):
                        _withdraw(run, names=[name])
        if st.button("Cancel all", key="withdraw_all", type="tertiary", icon=":material/close:", help="Finished measurements stay."):
            _withdraw(run, names=names)


def _withdraw(run: Run, names: Sequence[str]) -> None:
    client.cancel(run, *names)
    st.rerun()
