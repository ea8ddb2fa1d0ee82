"""Background requests: they run when the worker is otherwise idle, and yield to trials and other requests."""

from __future__ import annotations

from contextlib import suppress

from lowrank_core.runs.client import BACKGROUND, pending_requests
from lowrank_core.search.study import trials_left, waiting_trials
from lowrank_core.studies.requests import SensitivityAnswer, SensitivityRequest
from lowrank_core.worker.context import WorkerContext
from lowrank_core.worker.handlers import answer

__all__ = ["answer_in_background"]


class _PutOff(Exception):
    """The request yields or was cancelled: no result now."""


def answer_in_background(worker: WorkerContext) -> bool:
    """Run the first background request until it is done or yields; return whether there was one."""
    request = next((request for request in pending_requests(worker.run) if request.get("kind") in BACKGROUND), None)
    if request is None:
        return False
    with suppress(_PutOff):
        answer(worker, request, {SensitivityRequest: _sensitivity})
    return True


def _sensitivity(worker: WorkerContext, request: SensitivityRequest) -> SensitivityAnswer:
    def go_on() -> None:
        if worker.reporter.cancelled or _is_urgent(worker):
            raise _PutOff

    result = worker.sensitivity.measure(request.config, go_on)
    return SensitivityAnswer(file=result.file, cells=len(result.cells), measured=result.measured)


def _is_urgent(worker: WorkerContext) -> bool:
    """Return whether there is work with precedence."""
    if any(request.get("kind") not in BACKGROUND for request in pending_requests(worker.run)):
        return True
    search = worker.run.config.search
    if worker.study is None or search is None:
        return False
    return waiting_trials(worker.study) > 0 or (trials_left(worker.study, search) > 0 and not worker.reporter.paused)
