"""What comes from outside is shown, and saved, as the text that it is; numbers and sizes as what they are."""

from __future__ import annotations

import io
import re

import pandas as pd
import pytest

from lowrank_core.studio.shared.formatting import interval_words, number, percent, plain
from lowrank_core.studio.shared.spreadsheet import csv_of
from lowrank_core.wording import NO_INTERVAL, amount, fixed, fixed_interval


@pytest.mark.parametrize("cell", ["=1+1", "+cmd", "-x", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_cell_is_a_formula(cell: str):
    frame = pd.DataFrame({"name": [cell, "plain", None], cell: ["a", "b", "c"], "value": [-1.5, 2.0, float("nan")], "count": [-1, 2, 3]})
    read = pd.read_csv(io.StringIO(csv_of(frame)), keep_default_na=False)
    assert list(read["name"]) == [f"'{cell}", "plain", ""]
    assert list(read.columns) == ["name", f"'{cell}", "value", "count"]
    assert [float(value) for value in read["value"][:2]] == [-1.5, 2.0]
    assert list(read["count"]) == [-1, 2, 3]


def test_numbers_stay_numbers_also_as_text_and_the_frame_stays_as_it_was():
    frame = pd.DataFrame({"mixed": ["-0.5", -2, "=a"], "whole": pd.array([-1, None, 3], dtype="Int64")})
    assert csv_of(frame) == "mixed,whole\r\n-0.5,-1\r\n-2,\r\n'=a,3\r\n"
    assert list(frame["mixed"]) == ["-0.5", -2, "=a"]
    assert csv_of(pd.DataFrame(columns=["a", "b"])) == "a,b\r\n"


@pytest.mark.parametrize(
    "text", ["![x](https://example.org/a.png)", "[a](b)", ":red[a]", ":material/home:", "<img src=x>", "`a`", "# a", "$x$", "a_b_c", "a\\b"]
)
def test_foreign_text_is_no_markdown(text: str):
    shown = plain(text)
    assert re.sub(r"\\(.)", r"\1", shown) == text
    assert not re.search(r"(?<!\\)(?:\\\\)*[\[\]()!<>`#$:_]", shown)


@pytest.mark.parametrize(
    ("value", "words"), [(-1e-9, "0.0000"), (-0.0, "0.0000"), (-0.00004, "0.0000"), (-0.00006, "-0.0001"), (0.25, "0.2500")]
)
def test_nothing_is_less_than_zero_by_rounding(value: float, words: str):
    assert fixed(value, 4) == words
    assert fixed(value, 4, signed=True) == (words if words.startswith("-") else f"+{words}")


def test_negative_zero_has_no_sign():
    assert (number(-0.0), percent(-1e-9)) == ("0", "0.0 %")
    assert fixed_interval((-1e-9, 0.5), 3) == "0.000 to 0.500"


@pytest.mark.parametrize("ends", [None, (), (1.0, 1.0), (float("nan"), float("nan"))])
def test_an_interval_without_width_is_none(ends: tuple[float, ...] | None):
    assert interval_words(ends) == fixed_interval(ends, 3) == NO_INTERVAL


def test_a_size_has_the_unit_that_fits_it():
    assert [amount(size) for size in (3 * 2**30 // 2, 5 * 2**20, 2**11, 17, 0)] == ["1.5 GiB", "5.0 MiB", "2.0 KiB", "17 bytes", "0 bytes"]
