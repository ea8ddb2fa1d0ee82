"""Allocation files: what is written is read, and what people get wrong is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from priced import single

from lowrank_core.allocation import allocate, allocation_from_ranks, parse_allocation, read_allocation, read_ranks
from lowrank_core.errors import ConfigError, RankError
from lowrank_core.parameters import Unit

UNITS = [single("a"), Unit((single("b").members[0], single("c").members[0])), single("d", 4, 4)]


def test_ranks_survive_a_file(tmp_path: Path):
    result = allocate("uniform", UNITS, 0.3)
    path = tmp_path / "ranks.json"
    path.write_text(result.to_json())
    assert read_ranks(path) == result.ranks
    path.write_text(json.dumps(dict(result.ranks)))
    assert allocation_from_ranks("manual", UNITS, read_ranks(path)).parameters == result.parameters


def test_locks_survive_a_file(tmp_path: Path):
    result = allocate("uniform", UNITS, 0.3, fixed={"a": 5, "d": None})
    assert result.locked == ("a", "d")
    path = tmp_path / "ranks.json"
    path.write_text(result.to_json())
    read = read_allocation(path)
    assert read.locked == ("a", "d")
    assert read.fixed == {"a": 5, "d": None}
    assert read.ranks == result.ranks
    assert allocate("uniform", UNITS, 0.3, fixed=read.fixed) == result


def test_without_a_list_of_locks_every_named_rank_is_locked():
    result = allocate("uniform", UNITS, 0.3)
    assert "locked" not in json.loads(result.to_json())
    assert parse_allocation(result.to_json(), "x").fixed == result.ranks
    assert parse_allocation('{"a": 3, "d": null}', "x").fixed == {"a": 3, "d": None}
    assert parse_allocation('{"ranks": {"a": 3}}', "x").fixed == {"a": 3}
    assert parse_allocation('{"ranks": {"a": 3}, "locked": []}', "x").fixed == {}
    assert parse_allocation('{"ranks": {"a": 3, "d": 1}, "locked": ["d", "d"]}', "x").locked == ("d",)
    assert parse_allocation(replace(result, locked=("a",)).to_json(), "x").fixed == {"a": result.ranks["a"]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("not json", r"ranks: upload\.json is not JSON .*Give an allocation file"),
        ("", r"is not JSON"),
        ("[" * 200_000, r"is not JSON"),
        ("[1]", r"must hold a JSON object that maps layer names to a whole number or null"),
        ('{"ranks": [1]}', r"must hold a JSON object"),
        ('{"a": "x"}', r"upload\.json gives a the rank \"x\"\. Write a whole number, or null"),
        ('{"a": 1.5}', r"gives a the rank 1\.5\. Write a whole number"),
        ('{"a": 3.0}', r"gives a the rank 3\.0\. Write a whole number"),
        ('{"a": true}', r"gives a the rank true\. Write a whole number"),
        ('{"a": NaN}', r"gives a the rank NaN\. Write a whole number"),
        ('{"a": [1]}', r"gives a the rank \[1\]\. Write a whole number"),
        ('{"ranks": {"a": 1}, "locked": "a"}', r"`locked` in upload\.json must be a list of layer names\. Leave it out to lock every rank"),
        ('{"ranks": {"a": 1}, "locked": [1]}', r"must be a list of layer names"),
        ('{"ranks": {"a": 1}, "locked": null}', r"must be a list of layer names"),
        ('{"ranks": {"a": 1}, "locked": ["b"]}', r"locks 'b' and gives it no rank\. Add one under `ranks`, or take it out of `locked`"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, body: str, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_allocation(body, "upload.json")
    path = tmp_path / "upload.json"
    path.write_text(body)
    for read in (read_allocation, read_ranks):
        with pytest.raises(ConfigError, match="ranks"):
            read(path)


@pytest.mark.parametrize("rank", [0, -1])
def test_ranks_below_one_are_refused(rank: int):
    with pytest.raises(RankError, match=rf"gives a the rank {rank}\. Write at least 1, or null where it stays dense"):
        parse_allocation(json.dumps({"a": rank}), "x")


def test_files_that_can_not_be_read_are_told(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"ranks: can't read .*none\.json"):
        read_allocation(tmp_path / "none.json")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="ranks: can't read"):
        read_allocation(tmp_path / "bytes")
