"""Any causal language model: each type of transformers' own mapping, from analysis to generation."""

from __future__ import annotations

from pathlib import Path

import pytest
from causal_table import outcome_of
from causal_types import CAUSAL_TYPES, REPRESENTATIVE, NotBuilt

_TYPES = [
    pytest.param(name, marks=[pytest.mark.families, *([pytest.mark.slow] if name in REPRESENTATIVE else [])]) for name in CAUSAL_TYPES
]


@pytest.mark.filterwarnings("default")  # of a hundred authors' classes
@pytest.mark.parametrize("model_type", _TYPES)
def test_a_causal_type_is_compressed_to_generation(model_type: str, tmp_path: Path):
    try:
        outcome = outcome_of(model_type, tmp_path)
    except NotBuilt as error:
        if model_type in REPRESENTATIVE:
            raise
        pytest.skip(str(error))
    if outcome.problem:
        assert "\n" not in outcome.problem
        assert model_type not in REPRESENTATIVE, outcome.problem
        return
    assert outcome.deviation <= 1e-4
    assert outcome.share >= 0.95 or outcome.left
