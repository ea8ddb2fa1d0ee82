"""An allocation by hand, in a real browser and during a real search on the bundled model."""

from __future__ import annotations

import json
import re

import pytest
from test_dashboard import CALIBRATION_SECONDS, TRIAL_SECONDS, assert_sound, console_errors, trials, wait_for

from lowrank_core import jobs
from lowrank_core.config import RunConfig, SearchConfig, TextConfig
from lowrank_core.runs import create_run
from lowrank_core.search.records import MANUAL, read_trials

pytestmark = pytest.mark.browser


@pytest.mark.slow
def test_an_allocation_by_hand_is_measured_while_the_search_goes_on(address, page, home, tmp_path):
    text = TextConfig(context=128, calibration_windows=32, validation_windows=8, test_windows=8)
    run = create_run(RunConfig(text=text, search=SearchConfig(compression_ratio=0.3, trials=500, sampler="random")))
    jobs.start_worker(run)
    wait_for(lambda: len(read_trials(run)) >= 4, CALIBRATION_SECONDS, "the first trials")
    page.goto(f"{address}/search?run={run.id}&trial=1")
    page.get_by_text("Where LoRD, fixed by hand (trial 1) keeps its parameters").wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Allocation (JSON)").click()

    mine = json.loads(download.value.path().read_text())
    mine["locked"] = [next(name for name, rank in mine["ranks"].items() if rank)]
    mine["ranks"][mine["locked"][0]] = 3
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(mine))
    panel = page.locator(".st-key-hand_panel")
    panel.get_by_text("Measure an allocation of your own").click()
    panel.locator("input[type=file]").set_input_files(path)
    panel.get_by_text("Starts from mine.json").wait_for()
    choice = panel.get_by_role("combobox", name=re.compile("Ranks that are not locked"))
    choice.scroll_into_view_if_needed()
    page.wait_for_timeout(1500)  # the list of a select box closes when the page is scrolled
    choice.click()
    page.get_by_role("option", name=re.compile("Chosen by Uniform")).click()
    panel.get_by_text("the allocator spends the rest").wait_for()
    panel.get_by_role("button", name="Measure it next").click()

    panel.get_by_text("The last allocation was accepted").wait_for(timeout=TRIAL_SECONDS * 1000)
    page.get_by_text("1 picked by hand, on top").wait_for()
    picked = next(trial for trial in read_trials(run) if trial.label == MANUAL)
    assert picked.ranks[mine["locked"][0]] == 3
    wait_for(lambda: read_trials(run)[picked.number].state == "complete", TRIAL_SECONDS, "the allocation is measured")
    seen = trials(page)
    wait_for(lambda: trials(page) > seen, TRIAL_SECONDS, "the search goes on")
    page.goto(f"{address}/search?run={run.id}&trial={picked.number}")
    page.get_by_text(f"Where By hand (trial {picked.number}) keeps its parameters").wait_for()
    assert_sound(page)
    assert console_errors(page) == []
