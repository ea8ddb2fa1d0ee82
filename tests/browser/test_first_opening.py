"""What somebody sees who has just installed the package: the recorded run, at once."""

from __future__ import annotations

import pytest
from test_dashboard import PAGES, assert_sound, console_errors

pytestmark = pytest.mark.browser


def test_an_opening_without_any_run_shows_the_recorded_one(address, page):
    for name, path in PAGES.items():
        page.goto(address + path)
        page.get_by_role("heading", name=name, level=1).wait_for()
        page.get_by_text("Recorded run, shipped with the package").first.wait_for()
        page.wait_for_timeout(1500)
        assert_sound(page)
    assert console_errors(page) == []
    page.goto(address + PAGES["Compare"])
    page.get_by_text("Perplexity above the dense model's").first.wait_for()
