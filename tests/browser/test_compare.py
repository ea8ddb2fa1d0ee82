"""The Compare page in a real browser: text of others stays text, tokens tell their figures, charts follow the choice."""

from __future__ import annotations

import pytest
from synthetic import comparison, make_run, write_answers
from synthetic_answers import detailed, tokens_answer
from test_dashboard import assert_sound, console_errors

from lowrank_core.runs import write_json

pytestmark = pytest.mark.browser

HOSTILE = "<img src=x onerror='window.hurt=1'>"


@pytest.fixture
def compared(home):
    """A finished run with a text that was read token by token, there before the server starts."""
    run = make_run()
    write_answers(run)
    write_json(run.path / "results" / "8.json", tokens_answer(pieces=["if", " a", HOSTILE, " b", ":\n"]))
    write_json(run.path / "results" / "9.json", detailed(comparison("trial 3", 3, 3.2)))
    return run


def test_text_of_others_stays_text_and_is_shown_with_its_losses(compared, address, page):
    page.goto(f"{address}/compare?run={compared.id}")
    page.get_by_text("Each window: the dense model against").wait_for()
    page.locator(".st-key-compare_look").get_by_text("Token by token", exact=True).click()
    strip = page.locator(".st-key-token_strip")
    token = strip.get_by_text(HOSTILE)
    token.wait_for()
    assert "+2.000 nats; dense 2.000, compressed 4.000" in token.get_attribute("title")
    assert "213, 94, 0" in token.evaluate("element => getComputedStyle(element).backgroundColor")
    assert strip.locator("img").count() == 0
    assert page.evaluate("window.hurt") is None
    page.locator(".st-key-compare_look").get_by_text("Positions", exact=True).click()
    page.get_by_text("loss by tokens of context").wait_for()
    assert page.get_by_text("Each window: the dense model against").count() == 0
    assert_sound(page)
    assert console_errors(page) == []
