"""Which matrices are priced together under a config: every matrix is covered, and what stays dense is in no stack."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from lowrank_core.allocation.units import check_reachable, plan_units, value_layers
from lowrank_core.config import CompressionConfig
from lowrank_core.errors import BudgetError, ConfigError
from lowrank_core.metrics import METRICS, metric_named
from lowrank_core.parameters import STORAGES, HeadUnit, MatrixShape

KINDS = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32), "gate_proj": (80, 32), "up_proj": (80, 32)}
GROUPS = {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "gate_proj": "gate_proj", "up_proj": "gate_proj"}
SHAPES = tuple(
    MatrixShape(f"{depth}.{kind}", kind, depth, *size, kind == "v_proj", f"{depth}.{GROUPS.get(kind, kind)}")
    for depth in range(3)
    for kind, size in {**KINDS, "down_proj": (32, 80)}.items()
)
HEADS = tuple(HeadUnit((SHAPES[7 * depth + 2], SHAPES[7 * depth + 3]), heads=4, groups=2, head_dim=8) for depth in range(3))


def names(config: CompressionConfig) -> list[str]:
    return [unit.name for unit in plan_units(SHAPES, config, HEADS)]


@pytest.mark.parametrize("basis", [*METRICS, "shared_input:two_sided", "drift_aware:shared_input"])
@pytest.mark.parametrize("value_dense", [True, False])
def test_without_alternatives_each_matrix_is_in_one_unit(basis: str, value_dense: bool):
    units = plan_units(SHAPES, CompressionConfig(basis=basis, value_dense=value_dense))
    assert Counter(member.name for unit in units for member in unit.members) == {shape.name: 1 for shape in SHAPES}


@pytest.mark.parametrize("basis", METRICS)
@pytest.mark.parametrize("stacks", [True, False])
def test_value_projections_that_stay_dense_stand_alone(basis: str, stacks: bool):
    units = plan_units(SHAPES, CompressionConfig(basis=basis, value_dense=True, stacks=stacks, heads=True), HEADS)
    with_value = [unit for unit in units if any(member.kind == "v_proj" for member in unit.members)]
    assert [unit.name for unit in with_value] == list(value_layers(SHAPES)) == ["0.v_proj", "1.v_proj", "2.v_proj"]


def test_stacks_stand_beside_single_matrices():
    config = CompressionConfig(basis="two_sided", value_dense=False, stacks=True)
    first = [name for name in names(config) if name.startswith("0.")]
    alone = [f"0.{kind}" for kind in (*KINDS, "down_proj")]
    assert sorted(first) == sorted([*alone, "0.q_proj+0.k_proj+0.v_proj", "0.gate_proj+0.up_proj"])
    assert first.index("0.q_proj") < first.index("0.q_proj+0.k_proj+0.v_proj") < first.index("0.k_proj")  # in the order of the model
    assert set(names(replace(config, stacks=False, heads=False))) == {shape.name for shape in SHAPES}


def test_a_basis_that_stacks_by_itself_offers_no_stack_twice():
    result = names(CompressionConfig(basis="shared_input", value_dense=False, stacks=True))
    assert len(result) == len(set(result))


def test_heads_stand_beside_single_matrices_where_values_are_compressed():
    result = plan_units(SHAPES, CompressionConfig(basis="two_sided", value_dense=False, heads=True), HEADS)
    heads = [unit for unit in result if isinstance(unit, HeadUnit)]
    assert [unit.name for unit in heads] == [f"{depth}.v_proj+{depth}.o_proj" for depth in range(3)]
    assert all(unit.adds_bias for unit in heads)
    assert {shape.name for shape in SHAPES} < {unit.name for unit in result}
    assert not any(isinstance(unit, HeadUnit) for unit in plan_units(SHAPES, CompressionConfig(value_dense=False), HEADS))


@pytest.mark.parametrize("basis", METRICS)
@pytest.mark.parametrize("storage", STORAGES)
def test_units_have_the_prices_of_the_basis_and_the_storage(basis: str, storage: str):
    units = plan_units(SHAPES, CompressionConfig(basis=basis, storage=storage, value_dense=False))
    assert all(unit.storage == storage for unit in units)
    assert all(unit.adds_bias == metric_named(basis).centred for unit in units)


def test_units_are_in_the_order_of_the_model():
    for basis in METRICS:
        units = plan_units(SHAPES, CompressionConfig(basis=basis, value_dense=False, stacks=True))
        first = [SHAPES.index(unit.members[0]) for unit in units]
        assert first == sorted(first)


def test_an_unknown_basis_is_told():
    with pytest.raises(ConfigError, match="basis must be one of"):
        plan_units(SHAPES, CompressionConfig(basis="best"))


@pytest.mark.parametrize("config", [CompressionConfig(), CompressionConfig(basis="two_sided", stacks=True, value_dense=False)])
def test_a_ratio_out_of_reach_is_told_before_any_work(config: CompressionConfig):
    units = plan_units(SHAPES, config)
    check_reachable(units, 0.5, config)
    with pytest.raises(BudgetError, match=r"0\.99 can't be met"):
        check_reachable(units, 0.99, config)


def test_dense_value_projections_count_against_what_can_be_reached():
    values = CompressionConfig(basis="weight_svd", value_dense=True), CompressionConfig(basis="weight_svd", value_dense=False)
    for config, reachable in zip(values, (False, True), strict=True):
        units = plan_units(SHAPES, config)
        if reachable:
            check_reachable(units, 0.93, config)
        else:
            with pytest.raises(BudgetError):
                check_reachable(units, 0.93, config)
