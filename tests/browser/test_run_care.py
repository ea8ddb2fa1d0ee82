"""Picking, comparing and deleting runs: rows and dialogs need a browser."""

from __future__ import annotations

import pytest
from synthetic import make_run, write_answers
from test_dashboard import assert_sound, console_errors

from lowrank_core.runs import list_runs

pytestmark = pytest.mark.browser

_ROW, _BOX = 35, 15  # pixels: height of a row, and where its box is


def test_two_runs_are_picked_compared_and_deleted_for_good_after_a_second_press(home, address, page):
    kept, *doomed = [make_run() for _ in range(3)]
    for run in doomed:
        write_answers(run)
    page.goto(address)
    page.get_by_text("Select a row to open that run").wait_for()
    table = page.locator("[class*='st-key-runs_table']").get_by_test_id("stDataFrame")
    table.scroll_into_view_if_needed()
    for row in (1, 2):
        table.click(position={"x": _BOX, "y": _ROW * row + _ROW / 2})
    page.get_by_text("Side by side").wait_for()
    page.get_by_text("one protocol for all").wait_for()

    page.get_by_role("button", name="Delete these 2 runs").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="Keep").click()
    dialog.wait_for(state="hidden")
    assert len(list_runs()) == 3

    page.get_by_role("button", name="Delete these 2 runs").click()
    dialog.get_by_role("button", name="Delete", exact=True).click()
    dialog.wait_for(state="hidden")
    page.get_by_role("button", name="Delete these 2 runs").wait_for(state="hidden")
    assert [run.id for run in list_runs()] == [kept.id]
    assert f"run={kept.id}" in page.url
    assert_sound(page)
    assert console_errors(page) == []
