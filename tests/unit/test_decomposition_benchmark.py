"""The benchmark of decompositions compares like with like."""

from __future__ import annotations

import json

import pytest

from lowrank_core.cli import main


def test_errors_are_those_of_the_direct_way(capsys: pytest.CaptureFixture[str]):
    assert main(["benchmark", "decomposition", "--shapes", "24x60", "60x24", "--turns", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["shape"] for row in rows] == ["24 x 60", "60 x 24"]
    assert all(0 <= row["largest_difference"] < 1e-8 for row in rows)


@pytest.mark.parametrize("shape", ["60", "60x", "0x4", "ax4", "4x4x4"])
def test_a_shape_that_is_none_is_refused(shape: str, capsys: pytest.CaptureFixture[str]):
    assert main(["benchmark", "decomposition", "--shapes", shape]) == 2
    assert "Give d_out x d_in, such as 4096x11008" in capsys.readouterr().err
