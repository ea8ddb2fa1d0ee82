"""A budget of bytes: never exceeded, spent where it errs least, counted as it is written, and exact when read again."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank_core.allocation import AllocationProblem
from lowrank_core.allocation.byte_budget import allocate_bytes, bytes_for_ratio, bytes_on, chosen_words, stored_bytes_of
from lowrank_core.cli import main
from lowrank_core.compression.pipeline import Pipeline
from lowrank_core.config import CompressionConfig, ModelSource, TextConfig
from lowrank_core.errors import BudgetError, ConfigError
from lowrank_core.files.grids import GRIDS
from lowrank_core.layers.base import CompressedModule
from lowrank_core.models import load_model
from lowrank_core.models.handle import weight_of
from lowrank_core.parameters import MatrixShape, Unit

UNITS = tuple(
    Unit((MatrixShape(f"l.{i}.p", "p", i, 24, 20 + 4 * i),), storage) for i, storage in enumerate(("factored", "pivoted", "factored"))
)
CURVES = {unit.name: 3.0 ** -np.arange(21) * (index + 1) for index, unit in enumerate(UNITS)}
ADDED = {"int8": 1e-5, "int4": 3e-3}
ROUNDING = {
    unit.name: {grid: np.append(added * np.sqrt(np.arange(1, unit.break_even_rank + 1)), 2 * added) for grid, added in ADDED.items()}
    for unit in UNITS
}
PROBLEM = AllocationProblem(UNITS, 0.0, curves=CURVES)
DENSE = sum(unit.bytes(None, 2) for unit in UNITS)


def error_of(unit: Unit, rank: int | None, grid: str) -> float:
    added = 0.0 if grid == "" else float(ROUNDING[unit.name][grid][-1 if rank is None else rank - 1])
    return added + (0.0 if rank is None else float(CURVES[unit.name][rank]))


def total(allocation) -> float:
    return sum(error_of(unit, allocation.ranks[unit.name], allocation.grids.get(unit.name, "")) for unit in UNITS)


@pytest.mark.parametrize("limit", [280, 400, 500, 800, 1200, 2000, DENSE])
def test_no_choice_of_one_slope_and_no_even_choice_errs_less(limit: int):
    """Against all combinations: the error is that of the best one but for less than the largest step of a unit."""
    result = allocate_bytes(PROBLEM, ROUNDING, limit, 2)
    spent = stored_bytes_of(result, UNITS, 2)
    assert spent <= limit
    choices = [
        [
            (unit.bytes(rank, 2, GRIDS.get(grid)), error_of(unit, rank, grid))
            for grid in ("", *ADDED)
            for rank in (None, *range(1, unit.break_even_rank + 1))
        ]
        for unit in UNITS
    ]
    sums = [(sum(cost for cost, _ in combination), sum(error for _, error in combination)) for combination in product(*choices)]
    best = min(error for cost, error in sums if cost <= spent)
    assert total(result) <= 1.35 * best + 1e-12
    for grid in ("", *ADDED):
        if sum(unit.bytes(None, 2, GRIDS.get(grid)) for unit in UNITS) <= limit:
            assert total(result) <= sum(error_of(unit, None, grid) for unit in UNITS)


def test_what_there_is_enough_for_stays_dense_in_floats():
    result = allocate_bytes(PROBLEM, ROUNDING, DENSE, 2)
    assert set(result.ranks.values()) == {None}
    assert not result.grids
    assert chosen_words(result)["l.0.p"] == "dense, floats"


def test_a_unit_that_shall_stay_dense_has_grids_alone():
    problem = AllocationProblem(UNITS, 0.0, frozenset({"l.0.p"}), CURVES)
    result = allocate_bytes(problem, ROUNDING, DENSE // 4, 2)
    assert result.ranks["l.0.p"] is None
    assert result.grids["l.0.p"] == "int4"


def test_what_can_not_be_met_says_how_far_it_goes():
    with pytest.raises(
        BudgetError, match=r"60 bytes can't be met: the compressible layers take at least \d+\. Lower the ratio to at most 0\.\d"
    ):
        allocate_bytes(PROBLEM, ROUNDING, 60, 2)
    with pytest.raises(ConfigError, match="takes no locked ranks"):
        allocate_bytes(AllocationProblem(UNITS, 0.0, curves=CURVES, fixed={"l.0.p": 2}), ROUNDING, 500, 2)


def test_a_ratio_is_of_sixteen_bits():
    assert bytes_for_ratio(AllocationProblem(UNITS, 0.75, curves=CURVES)) == DENSE // 4


@pytest.fixture(scope="module")
def pipeline(llama_checkpoint: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    compression = CompressionConfig(basis="two_sided", storage="pivoted", value_dense=False, stacks=True, heads=True)
    text = TextConfig(f"file:{text_file}", context=32, calibration_windows=20, validation_windows=4, test_windows=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_HOME", str(tmp_path_factory.mktemp("home")))
        result = Pipeline(ModelSource(str(llama_checkpoint)), text, compression=compression)
        _ = result.decomposed
        return result


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_the_model_takes_the_bytes_that_were_allocated(rounding: str, pipeline: Pipeline):
    itemsize = pipeline.handle.stored_dtype.itemsize
    rest = pipeline.handle.bytes - sum(unit.bytes(None, itemsize) for unit in pipeline.units if len(unit.members) == 1)
    limit = bytes_on(GRIDS["int4"], pipeline.units, itemsize)
    allocation = pipeline.allocate_bytes(limit, rounding=rounding)
    spent = stored_bytes_of(allocation, pipeline.units, itemsize)
    assert 0.98 * limit < spent <= limit
    model = pipeline.compress(allocation, rounding=rounding)
    assert model.report.bytes_after == model.handle.bytes == rest + spent
    assert set(model.report.ranks) == set(allocation.ranks)
    assert set(model.report.grids) <= set(allocation.ranks)


def test_errors_of_rounding_are_those_of_the_layers(pipeline: Pipeline):
    """q of dense layers, by its formula in the metric of the run."""
    _ = pipeline.allocate_bytes(10**9)
    (errors,) = (errors for (_, rounding), errors in pipeline._rounding.items() if rounding == "nearest")
    quantised = pipeline.quantized(pipeline.compress(0), dense="int4").handle.module
    for layer in pipeline.handle.layers[:4]:
        change = (weight_of(pipeline.handle.module.get_submodule(layer.name)) - quantised.get_submodule(layer.name).weight).double()
        gradient = pipeline.statistics.outputs[layer.name].gradient
        damped = (
            gradient + torch.eye(len(gradient), dtype=torch.float64) * pipeline.compression.gradient_damping * gradient.diagonal().mean()
        )
        exact = 0.5 * float(((damped @ change) * (change @ pipeline.moments.inputs[layer.input_group].moment_about(torch.zeros(1)))).sum())
        assert float(errors[layer.name]["int4"][-1]) == pytest.approx(exact, rel=0.05)
        assert float(errors[layer.name]["int8"][-1]) < 0.02 * exact
        assert (np.diff(errors[layer.name]["int4"].shape) == 0).all()


@pytest.fixture
def source(llama_checkpoint: Path, text_file: Path) -> list[str]:
    windows = ["--calibration-windows", "20", "--validation-windows", "4", "--test-windows", "4"]
    return ["--model", str(llama_checkpoint), "--text", f"file:{text_file}", "--context", "32", *windows]


def test_the_command_writes_what_it_counted(source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--budget", "bytes", "--compression-ratio", "0.7", "--export-dtype", "bfloat16", "--rounding", "gptq"]
    assert main(["compress", *source, *options, "--out", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert 0.98 * result["byte_budget"] < result["compressible_bytes"] <= result["byte_budget"]
    assert set(result["choices"]) == set(result["ranks"])
    assert {words.split(", ")[1] for words in result["choices"].values()} <= {"floats", "int8", "int4"}
    loaded = load_model(ModelSource(str(tmp_path / "out")))
    assert loaded.bytes <= result["written_bytes"] < loaded.bytes + 20_000
    grids = {name: layer.grid.name for name, layer in loaded.module.named_modules() if isinstance(layer, CompressedModule) and layer.grid}
    assert set(grids.values()) == set(result["grids"].values())
    assert main(["verify", "--model", str(tmp_path / "out")]) == 0


REFUSED = {
    "allocation": (["--preset", "svd_llm"], "leave out --allocation uniform"),
    "grids": (["--quantize", "int8"], "leave out --quantize and --quantize-dense"),
    "slopes": (["--slopes"], "leave out --slopes"),
    "form": (["--form", "dense"], "leave out --form dense"),
    "budget": (["--budget", "bits"], "budget must be one of parameters, bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_budget_of_bytes_has_no_place_for_is_refused(
    case: str, source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options, reason = REFUSED[case]
    assert main(["compress", *source, "--budget", "bytes", "--compression-ratio", "0.7", *options, "--out", str(tmp_path / "out")]) == 2
    assert reason in capsys.readouterr().err
