"""Ranks manually in a real browser, and measured during a real search on the bundled model."""

from __future__ import annotations

import json
import re

import pytest
from synthetic import make_run, priced_units, write_rich_study
from test_dashboard import CALIBRATION_SECONDS, TRIAL_SECONDS, assert_sound, console_errors, wait_for
from test_manual_page import SEARCH, with_curves

from lowrank_core.config import RunConfig, SearchConfig, TextConfig
from lowrank_core.runs import Run, client, create_run
from lowrank_core.studies.records import MANUAL, read_trials

pytestmark = pytest.mark.browser

RANK, KEPT = 4, 5
"""Columns of the table as the eye sees them, from 0."""
HEADER = ROW = 35  # pixels


def settled(page, grid) -> dict[str, float]:
    """Return where the table is once nothing moves it any more."""
    page.locator('[data-testid="stApp"][data-test-script-state="notRunning"]').wait_for()
    grid.scroll_into_view_if_needed()
    places: list[dict[str, float]] = []

    def still() -> bool:
        page.wait_for_timeout(400)
        places.append(grid.bounding_box())
        return len(places) > 1 and places[-1] == places[-2]

    wait_for(still, 30, "the table stands still")
    return places[-1]


def chosen_cell(page) -> tuple[int, int] | None:
    """Return column and row of the cell that the table says is selected."""
    result = page.evaluate("[...document.querySelectorAll('canvas [aria-selected=true]')].map((cell) => cell.dataset.testid)")
    return tuple(int(part) for part in result[0].split("-")[-2:]) if len(result) == 1 else None


def enter(page, row: int, column: int, text: str) -> None:
    """Type ``text`` into a cell of the table, which is a canvas: from the first cell there by the arrow keys."""
    grid = page.locator("[data-testid=stDataFrame] .dvn-scroller").first
    box = settled(page, grid)
    page.mouse.click(box["x"] + 30, box["y"] + HEADER + ROW / 2)
    place = (0, 0)
    wait_for(lambda: chosen_cell(page) == place, 10, "the first cell is selected")
    for key, step, times in (("ArrowRight", (1, 0), column), ("ArrowDown", (0, 1), row)):
        for _ in range(times):
            page.keyboard.press(key)
            place = (place[0] + step[0], place[1] + step[1])
            wait_for(lambda wanted=place: chosen_cell(page) == wanted, 10, f"{key} selects {place}")
    page.keyboard.type(text[0])
    editor = page.locator("#portal input").first
    editor.wait_for()
    page.keyboard.type(text[1:], delay=100)
    wait_for(lambda: editor.input_value() == text, 10, "the cell's editor has the text")
    page.wait_for_timeout(500)  # the editor hands its text on a little later than it shows it
    page.keyboard.press("Enter")
    editor.wait_for(state="hidden")


def meter(page) -> str:
    return page.get_by_text(re.compile(r"parameters")).filter(has_text=re.compile(r"^Keeps|over the budget")).first.inner_text()


def test_cells_are_edited_the_meter_follows_and_undo_takes_it_back(address, page, home):
    run = with_curves(make_run(config=SEARCH, study=write_rich_study))
    page.goto(f"{address}/manual?run={run.id}")
    page.locator("[data-testid=stDataFrame] canvas").first.wait_for()
    name, before = priced_units()[0].name, meter(page)
    enter(page, 0, RANK, "2")
    wait_for(lambda: meter(page) != before, 30, "the meter follows a rank")
    assert saved(run)["ranks"][name] == 2
    second, edited = priced_units()[1].name, meter(page)
    enter(page, 1, KEPT, "40")
    wait_for(lambda: meter(page) != edited, 30, "the meter follows a kept ratio")
    assert saved(run)["ranks"][second] == priced_units()[1].rank_for_parameters(0.4 * priced_units()[1].dense_parameters)
    assert saved(run)["ranks"][name] == 2
    page.get_by_role("button", name="Undo").click()
    wait_for(lambda: meter(page) == edited, 30, "undo")
    enter(page, 0, RANK, "99")
    page.get_by_text("rank must be in [1, 24], got 99").wait_for()
    assert meter(page) == edited
    page.reload()
    page.locator("[data-testid=stDataFrame] canvas").first.wait_for()
    assert meter(page) == edited
    assert_sound(page)
    assert console_errors(page) == []


def saved(run: Run) -> dict[str, dict[str, int | None]]:
    newest = max((run.path / "drafts").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())["draft"]


@pytest.mark.slow
def test_a_manual_allocation_is_measured_while_the_search_goes_on(address, page, home, tmp_path):
    text = TextConfig(context=128, calibration_windows=32, validation_windows=8, test_windows=8)
    run = create_run(RunConfig(text=text, search=SearchConfig(compression_ratio=0.3, trials=500, sampler="random")))
    client.start_worker(run)
    wait_for(lambda: len(read_trials(run)) >= 4, CALIBRATION_SECONDS, "the first trials")
    page.goto(f"{address}/manual?run={run.id}&trial=1")
    page.get_by_text("Started from LoRD, fixed ratios (trial 1)").wait_for()
    enter(page, 0, RANK, "30")
    page.get_by_text("This draft is not measured yet").wait_for()
    page.get_by_role("button", name="Fit the rest to the budget").click()
    page.get_by_role("button", name="Fit", exact=True).click()
    page.get_by_text("The budget is met").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Measure it now").click()
    page.get_by_text(re.compile("Waits for the worker|Queued as|Being measured|Measured as Manual")).first.wait_for()
    page.get_by_text(re.compile(r"Measured as Manual \(trial \d+\)")).wait_for(timeout=TRIAL_SECONDS * 1000)
    page.get_by_text("This draft, measured").wait_for()
    picked = next(trial for trial in read_trials(run) if trial.label == MANUAL)
    assert picked.state == "complete"
    assert picked.compression_ratio == pytest.approx(0.3, abs=0.001)
    with page.expect_download() as download:
        page.get_by_role("button", name="Allocation (JSON)").click()
    mine = json.loads(download.value.path().read_text())
    assert mine["ranks"] == picked.ranks
    seen = len(read_trials(run))
    wait_for(lambda: len(read_trials(run)) > seen, TRIAL_SECONDS, "the search goes on")
    page.get_by_role("link", name=f"Show Manual (trial {picked.number}) on Rank search").click()
    page.get_by_text(f"Where Manual (trial {picked.number}) keeps its parameters").wait_for()
    assert saved(run)["ranks"] == picked.ranks  # leaving the page moved no slider
    assert_sound(page)
    assert console_errors(page) == []
