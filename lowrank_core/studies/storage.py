"""Storage of a study: a journal in the run directory, or a database shared by machines. Torch-free."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import optuna
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from lowrank_core.errors import ConfigError, RunError
from lowrank_core.runs import Run

__all__ = ["dashboard_command", "open_database", "open_journal", "open_storage", "redacted"]

optuna.logging.set_verbosity(optuna.logging.ERROR)

HEARTBEAT_SECONDS = 5
GRACE_SECONDS = 20
"""After so long without a heartbeat a trial in a database counts as lost, and is put in the queue again."""
_RETRIES = 3
_CONNECT_SECONDS = 5
_LEFTOVER_SECONDS = 5  # what is appended takes milliseconds: an older lock of Optuna's is a dead worker's


class _JournalLock:
    """The journal's lock, for Optuna: workers queue for a lock that the system gives back when its holder is killed.

    Who has it also takes Optuna's own, against other programs (optuna-dashboard), and mends what a kill tore.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._ours = FileLock(journal.with_name("study.lock"))
        self._optuna = JournalFileSymlinkLock(str(journal), grace_period=_LEFTOVER_SECONDS)

    def acquire(self) -> bool:
        self._ours.acquire()
        try:
            self._optuna.acquire()
            _cut_unfinished_line(self._journal)
        except BaseException:
            self._ours.release()
            raise
        return True

    def release(self) -> None:
        self._optuna.release()
        self._ours.release()


def _cut_unfinished_line(journal: Path) -> None:
    """Remove what a worker that was killed, or a full disk, left of a line: Optuna refuses a journal once something follows it."""
    with journal.open("r+b") as stream:
        size = stream.seek(0, os.SEEK_END)
        if size == 0:
            return
        stream.seek(size - 1)
        if stream.read(1) == b"\n":
            return
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)


def open_journal(journal: Path) -> JournalStorage:
    """Return the storage on the file ``journal``, made if it does not exist."""
    return JournalStorage(JournalFileBackend(str(journal), _JournalLock(journal)))  # type: ignore[arg-type]


def open_database(url: str) -> BaseStorage:
    """Return the storage behind ``url``, its tables made if they do not exist; lost trials are queued again, three times at most.

    Raises:
        ConfigError: the URL is none, its driver is missing, or nothing answers there.
    """
    return _open_database(url)


@lru_cache(maxsize=8)
def _open_database(url: str) -> BaseStorage:
    scheme = urlsplit(url).scheme
    if not scheme:
        raise ConfigError(f"storage URL {redacted(url)!r} has no scheme. Write it like postgresql+psycopg://user@host/database.")
    arguments: dict[str, Any] = {"pool_pre_ping": True}
    if scheme.startswith("postgresql"):
        arguments["connect_args"] = {"connect_timeout": _CONNECT_SECONDS}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats: what Optuna offers against lost trials
            return get_storage(
                RDBStorage(
                    url,
                    engine_kwargs=arguments,
                    heartbeat_interval=HEARTBEAT_SECONDS,
                    grace_period=GRACE_SECONDS,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=_RETRIES),
                )
            )
    except ImportError as error:
        raise ConfigError(
            f"the driver for {redacted(url)} is missing ({error}). For PostgreSQL: python -m pip install 'lowrank-studio[postgres]', "
            "and a URL that begins with postgresql+psycopg://."
        ) from error
    except Exception as error:  # SQLAlchemy's and the driver's own errors have no common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"can't open the storage {redacted(url)}: {reason}. Is the server up, and the database there?") from error


def open_storage(run: Run) -> BaseStorage:
    """Return the storage that holds the study of ``run``.

    Raises:
        ConfigError: its database can't be reached.
        RunError: the run directory can't be written to.
    """
    url = run.storage_url
    if url is not None:
        return open_database(url)
    try:
        return open_journal(run.journal)
    except OSError as error:
        raise RunError(f"can't write {run.journal}: {error.strerror}. Free some space, or give a folder that you can write to.") from error


def redacted(url: str) -> str:
    """Return ``url`` without its password."""
    password = urlsplit(url).password
    return url.replace(f":{password}@", ":***@") if password else url


def dashboard_command(run: Run) -> str:
    """Return the shell command that opens the study in optuna-dashboard."""
    url = run.storage_url
    return f"optuna-dashboard {redacted(url) if url else run.journal}"
