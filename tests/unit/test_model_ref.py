"""One reference to a model: what requests, answers, labels and people write is parsed once, and written as it was."""

from __future__ import annotations

import pytest

from lowrank_core.errors import ConfigError
from lowrank_core.studies.model_ref import ModelRef


@pytest.mark.parametrize(
    ("given", "kind", "name", "key", "label"),
    [
        (None, "best", "", "best", "best"),
        ("best", "best", "", "best", "best"),
        (7, "trial", "7", 7, "trial 7"),
        ("7", "trial", "7", 7, "trial 7"),
        ("trial 7", "trial", "7", 7, "trial 7"),
        ("uniform", "allocator", "uniform", "uniform", "uniform"),
        ("preset:svd", "preset", "svd", "preset:svd", "preset:svd"),
        ("healed:trial-3-lora-1", "healed", "trial-3-lora-1", "healed:trial-3-lora-1", "healed:trial-3-lora-1"),
        ("preset:gone", "preset", "gone", "preset:gone", "preset:gone"),  # old answers may name what is no more
    ],
)
def test_a_reference_is_parsed_and_written(given: object, kind: str, name: str, key: object, label: str):
    ref = ModelRef.parse(given)
    assert (ref.kind, ref.name, ref.key, ref.label) == (kind, name, key, label)
    assert ModelRef.parse(str(ref)) == ModelRef.parse(ref.key) == ModelRef.parse(ref) == ref
    assert ref.searched == (kind in ("best", "trial", "allocator"))


@pytest.mark.parametrize("given", [True, 1.5, -1, "-1", "finest", "", "trial x", "manual", ["uniform"], "٣"])
def test_what_is_no_reference_is_refused_with_what_is(given: object):
    assert ModelRef.find(given) is None
    with pytest.raises(ConfigError, match="trial must be a number, `best`, preset:NAME, dense:NAME, healed:FOLDER or one of uniform,"):
        ModelRef.parse(given)
