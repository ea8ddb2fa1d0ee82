"""What the dashboard's pages take and send: page loads of the recorded run, and ticks of a search that grows.

Times stand next to those of an empty Streamlit page in the same rounds: machines are noisy. Sizes are exact.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from lowrank_core.errors import ConfigError, RunError
from lowrank_core.runs import Run, RunStatus, create_run, process_started, recorded_run
from lowrank_core.runs.processes import python_command
from lowrank_core.speed import Spread, in_turns
from lowrank_core.studies.replay import Replay
from tests.benchmarks.browser import Frames, PageLoad, Server, chromium, load, opened, page_links, redraws, serving, watched

if TYPE_CHECKING:
    from playwright.sync_api import Page, ViewportSize

__all__ = ["DashboardReport", "LoadRow", "TickRow", "as_markdown", "measure_dashboard"]

_EMPTY = 'import streamlit as st\n\nst.title("Empty")\n'
_PARTS = ("model.json", "text.json", "calibration.json", "spectra.npz")
_VIEWPORT: ViewportSize = {"width": 1280, "height": 900}
_TICK_SECONDS = 1.5
"""How often a trial comes in: pages of a live run look again every second."""


@dataclass(frozen=True)
class LoadRow:
    """Openings of one page.

    Attributes:
        sizes: of the last opening; they differ between openings by some bytes (times, identifiers).
        first_content, complete: seconds.
        against_empty: ``complete`` over that of the empty page in the same round.
    """

    path: str
    sizes: PageLoad
    first_content: Spread
    complete: Spread
    against_empty: Spread

    def to_mapping(self) -> dict[str, object]:
        sizes = {name: getattr(self.sizes, name) for name in ("bytes", "messages", "charts", "largest_message", "largest_figure", "figure")}
        times = {name: asdict(getattr(self, name)) for name in ("first_content", "complete", "against_empty")}
        return {"page": self.sizes.title, "path": self.path, **sizes, **times}


@dataclass(frozen=True)
class TickRow:
    """One page of a live run while a trial comes in every ``_TICK_SECONDS``.

    Attributes:
        bytes: received for each trial.
        redraws: how many partial redraws each trial brought.
        seconds: of a redraw, from the server's first word to its last; None where the page never redrew.
    """

    page: str
    path: str
    bytes: Spread
    redraws: Spread
    seconds: Spread | None

    def to_mapping(self) -> dict[str, object]:
        spreads = {"bytes": asdict(self.bytes), "redraws": asdict(self.redraws)}
        return {"page": self.page, "path": self.path, **spreads, "seconds": asdict(self.seconds) if self.seconds else None}


@dataclass(frozen=True)
class DashboardReport:
    """What was measured; ``start`` are the seconds until the server is healthy, ``first_opening`` those of the first page after it."""

    protocol: str
    start: float
    first_opening: PageLoad
    empty: LoadRow
    loads: Sequence[LoadRow]
    ticks: Sequence[TickRow]

    def to_mapping(self) -> dict[str, object]:
        first = {"first_content": self.first_opening.first_content, "complete": self.first_opening.complete}
        return {
            "protocol": self.protocol,
            "start_seconds": self.start,
            "first_opening": first,
            "empty": self.empty.to_mapping(),
            "pages": [row.to_mapping() for row in self.loads],
            "ticks": [row.to_mapping() for row in self.ticks],
        }


def measure_dashboard(*, rounds: int, updates: int, trials: int) -> DashboardReport:
    """Open every page ``rounds`` times, then watch ``updates`` trials come in after the first ``trials`` of a live run.

    Raises:
        ConfigError: a number out of range; playwright or a browser is missing.
        RunError: the dashboard does not start, or a page shows an error.
    """
    for name, value in (("rounds", rounds), ("updates", updates), ("trials", trials)):
        if value < 1:
            raise ConfigError(f"{name} must be 1 or more, got {value}. Leave the option out for the default.")
    recorded = recorded_run()
    if recorded is None:
        raise RunError("the recorded run that ships with the package is missing. Install the package again.")
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lowrank-")))
        browser = stack.enter_context(chromium())
        page = browser.new_page(viewport=_VIEWPORT)
        frames = watched(page)
        dashboard, empty = stack.enter_context(_dashboard(home)), stack.enter_context(_empty_page(home))
        first, links = _first_opening(page, frames, dashboard.address)
        _say("first opening: done")
        loads = _loads(page, frames, [empty.address, *links], rounds)
        _say("page loads: done")
        live, replay = _live_run(home, recorded, trials, total=trials + updates * len(links))
        ticks = [_ticks(page, frames, f"{link}?run={live.id}", replay, updates) for link in links]
        protocol = _protocol(browser.version, rounds, updates, trials)
    return DashboardReport(protocol, dashboard.seconds, first, loads[0], loads[1:], ticks)


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _protocol(chromium_version: str, rounds: int, updates: int, trials: int) -> str:
    return (
        f"recorded run, {rounds} rounds in turns after one to warm up; live run: {updates} trials on each page, one every "
        f"{_TICK_SECONDS:g} s, after {trials} that were there; window {_VIEWPORT['width']} x {_VIEWPORT['height']}, "
        f"Chromium {chromium_version}, Python {platform.python_version()}, {os.cpu_count()} processors"
    )


def _dashboard(home: Path) -> AbstractContextManager[Server]:
    return serving(python_command("-m", "lowrank_core", "dashboard", "--port"), home=home, log=home / "dashboard.log")


def _empty_page(home: Path) -> AbstractContextManager[Server]:
    script = home / "empty.py"
    script.write_text(_EMPTY, encoding="utf-8")
    command = python_command("-m", "streamlit", "run", str(script), "--server.port")
    return serving(command, home=home, log=home / "empty.log", cwd=home)


def _first_opening(page: Page, frames: Frames, address: str) -> tuple[PageLoad, list[str]]:
    """Return the first opening after the server's start, with the front end not in any cache, and the addresses of all pages."""
    return load(page, frames, address), page_links(page)


def _loads(page: Page, frames: Frames, addresses: Sequence[str], rounds: int) -> list[LoadRow]:
    """Open all ``addresses`` in turns; the first of them is what the others are compared with."""
    actions = [partial(load, page, frames, address) for address in addresses]
    in_turns(actions, 1)
    result = in_turns(actions, rounds)
    return [_load_row(address, [turn[index] for turn in result], [turn[0] for turn in result]) for index, address in enumerate(addresses)]


def _load_row(address: str, openings: Sequence[PageLoad], empty: Sequence[PageLoad]) -> LoadRow:
    return LoadRow(
        path=urlsplit(address).path,
        sizes=openings[-1],
        first_content=Spread.of(opening.first_content for opening in openings),
        complete=Spread.of(opening.complete for opening in openings),
        against_empty=Spread.of(ours.complete / theirs.complete for ours, theirs in zip(openings, empty, strict=True)),
    )


def _live_run(home: Path, recorded: Run, trials: int, total: int) -> tuple[Run, Replay]:
    """Make a run that this very process seems to work on: the recorded one's parts, and its first ``trials`` trials."""
    search = recorded.config.search
    if search is None:
        raise RunError("the recorded run has no search to replay. Install the package again.")
    run = create_run(replace(recorded.config, search=replace(search, trials=total)), path=home / "runs" / "live")
    for name in _PARTS:
        shutil.copyfile(recorded.path / name, run.path / name)
    replay = Replay.begin(recorded, run)
    replay.add(trials)
    started = process_started(os.getpid())
    run.write_status(RunStatus("running", "Searching", trials, total, pid=os.getpid(), pid_started=started))
    return run, replay


def _ticks(page: Page, frames: Frames, address: str, replay: Replay, updates: int) -> TickRow:
    """Have trials come in while the page at ``address`` is open."""
    title = opened(page, address)
    page.wait_for_timeout(2000 * _TICK_SECONDS)
    amounts, counts, before = [], [], len(redraws(page))
    seen = before
    for _ in range(updates):
        received = frames.bytes
        replay.add()
        page.wait_for_timeout(1000 * _TICK_SECONDS)
        now = len(redraws(page))
        amounts.append(frames.bytes - received)
        counts.append(now - seen)
        seen = now
    seconds = redraws(page)[before:]
    return TickRow(title, urlsplit(address).path, Spread.of(amounts), Spread.of(counts), Spread.of(seconds) if seconds else None)


def as_markdown(report: DashboardReport) -> str:
    """Return the report as two Markdown tables."""
    first = report.first_opening
    lines = [
        f"From the start to a healthy server {report.start:.1f} s, then to the first title in a browser that has never been here "
        f"{first.first_content:.1f} s, all drawn after {first.complete:.1f} s. Warm page loads:",
        "",
        "| page | title after (s) | drawn after (s) | over an empty page | received | messages | charts | largest chart | any message |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *map(_load_line, [report.empty, *report.loads]),
        "",
        "| page of a live run | received for each trial | redraws | seconds of a redraw |",
        "| --- | --- | --- | --- |",
        *map(_tick_line, report.ticks),
        "",
        f"Medians, smallest to largest in brackets; kB are 1,000 bytes, without compression. Protocol: {report.protocol}.",
    ]
    return "\n".join(lines)


def _load_line(row: LoadRow) -> str:
    sizes = row.sizes
    chart = f"{_kilobytes(sizes.largest_figure)} ({sizes.figure})" if sizes.charts else "–"
    times = f"{_spread(row.first_content)} | {_spread(row.complete)} | {_spread(row.against_empty)}"
    return (
        f"| {sizes.title} | {times} | {_kilobytes(sizes.bytes)} | {sizes.messages} | {sizes.charts} | {chart} "
        f"| {_kilobytes(sizes.largest_message)} |"
    )


def _tick_line(row: TickRow) -> str:
    amounts = f"{_kilobytes(row.bytes.median)} ({_kilobytes(row.bytes.low)} to {_kilobytes(row.bytes.high)})"
    counts = f"{row.redraws.median:g} ({row.redraws.low:g} to {row.redraws.high:g})"
    return f"| {row.page} | {amounts} | {counts} | {_spread(row.seconds) if row.seconds else '–'} |"


def _spread(result: Spread) -> str:
    return f"{result.median:.2f} ({result.low:.2f} to {result.high:.2f})"


def _kilobytes(amount: float) -> str:
    return f"{amount / 1000:.1f} kB"
