"""Sensitivities: a cell is what an evaluation with that module alone compressed finds, and what is written is not measured again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowrank_core.allocation import allocation_from_ranks
from lowrank_core.compression.build import compress
from lowrank_core.compression.decomposed import Decomposed, decompose
from lowrank_core.compression.sensitivity import evenly_spaced, measured_cell
from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource, RunConfig, TextConfig, from_mapping, to_mapping
from lowrank_core.errors import ConfigError, RunError
from lowrank_core.evaluation import DenseReference, evaluate, score_windows
from lowrank_core.models import ModelHandle
from lowrank_core.presets.recipes import preset_named
from lowrank_core.runs import Run, create_run
from lowrank_core.sensitivity.config import MODULE, TYPE, SensitivityConfig, coarse_first, single_compression
from lowrank_core.sensitivity.planning import PlannedCell, planned_cells
from lowrank_core.sensitivity.records import SensitivityCell, SensitivitySetting, append_cell, read_record, read_records, record_path
from lowrank_core.statistics.calibration import LayerStatistics, collect_statistics
from lowrank_core.statistics.gradients import collect_gradients
from lowrank_core.text import WindowSet
from lowrank_core.worker import sensitivity as bench
from lowrank_core.worker.main import measure_alone

CALIBRATION = CalibrationConfig(group_size=8)
STUDIO = preset_named("studio").compression
SINGLE = single_compression(STUDIO, SensitivityConfig(storage="factored"))
QUERY, GATE = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj"


@pytest.fixture(scope="module")
def statistics(llama: ModelHandle, windows: WindowSet) -> LayerStatistics:
    gradients = collect_gradients(llama, windows, CALIBRATION)
    return collect_statistics(llama, windows, CALIBRATION).with_outputs(gradients)


@pytest.fixture(scope="module")
def decomposed(llama: ModelHandle, statistics: LayerStatistics) -> Decomposed:
    return decompose(llama, statistics, SINGLE)


@pytest.fixture(scope="module")
def few(windows: WindowSet) -> WindowSet:
    return replace(windows.first(10), split="validation")


@pytest.fixture(scope="module")
def dense(llama: ModelHandle, few: WindowSet) -> DenseReference:
    return DenseReference.compute(llama, few, batch_size=8, reverse=True)


def planned(llama: ModelHandle, scope: str, name: str, kept: float = 0.5) -> PlannedCell:
    cells = planned_cells(llama.shapes, SINGLE, SensitivityConfig(kept=(kept,)))
    return next(cell for cell in cells if (cell.scope, cell.name) == (scope, name))


# --- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scope", "name"), [(MODULE, QUERY), (MODULE, GATE), (TYPE, "down_proj")])
def test_a_cell_is_an_evaluation_with_nothing_else_compressed(
    llama: ModelHandle, decomposed: Decomposed, few: WindowSet, dense: DenseReference, scope: str, name: str
):
    plan = planned(llama, scope, name, 0.2)
    cell = measured_cell(decomposed, plan, few, dense)
    ranks = {unit.name: plan.ranks.get(unit.name) for unit in decomposed.units}
    alone = compress(llama, decomposed.bases, allocation_from_ranks("manual", decomposed.units, ranks))
    report = evaluate(alone.handle, few, against=llama)
    assert cell.kl == pytest.approx(report.kl, rel=1e-5, abs=1e-9)
    assert (cell.kl or 0) > 1e-6
    assert cell.parameters == plan.dense_parameters - (alone.report.linear_parameters_before - alone.report.linear_parameters_after)
    assert 0 < cell.kept_share <= 0.2
    assert cell.matrices == len(plan.ranks) == (2 if scope == TYPE else 1)
    assert cell.kl_stderr is not None
    assert 0 < cell.kl_stderr < (cell.kl or 0)


def test_full_rank_costs_nothing(llama: ModelHandle, decomposed: Decomposed, few: WindowSet, dense: DenseReference):
    plan = planned(llama, MODULE, GATE)
    full = next(unit for unit in decomposed.units if unit.name == GATE).max_rank
    whole = measured_cell(decomposed, replace(plan, ranks={GATE: full}), few, dense)
    assert whole.kl == pytest.approx(0, abs=1e-7)  # float32, 150 tokens
    assert whole.predicted == pytest.approx(0, abs=1e-12)
    assert (measured_cell(decomposed, plan, few, dense).kl or 0) > 100 * abs(whole.kl or 0)


def test_the_dense_model_is_bitwise_as_before(llama: ModelHandle, decomposed: Decomposed, few: WindowSet, dense: DenseReference):
    modules = dict(llama.module.named_modules())
    before = {name: tensor.clone() for name, tensor in llama.module.state_dict().items()}
    with torch.no_grad():
        logits = llama.module(input_ids=few.ids).logits
        measured_cell(decomposed, planned(llama, TYPE, "q_proj"), few, dense)
        assert torch.equal(llama.module(input_ids=few.ids).logits, logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.module.state_dict().items())
    assert all(module is modules[name] for name, module in llama.module.named_modules())


def test_a_type_with_one_module_is_that_module(llama: ModelHandle, decomposed: Decomposed, few: WindowSet, dense: DenseReference):
    first = [shape for shape in llama.shapes if shape.depth == 0]
    cells = {cell.name: cell for cell in planned_cells(first, SINGLE, SensitivityConfig(kept=(0.4,)))}
    kind, module = (measured_cell(decomposed, cells[name], few, dense) for name in ("q_proj", QUERY))
    assert replace(kind, name=QUERY, scope=MODULE, seconds=0.0) == replace(module, seconds=0.0)


def test_predictions_of_a_type_add_up_and_other_bases_have_none(
    llama: ModelHandle, statistics: LayerStatistics, decomposed: Decomposed, few: WindowSet, dense: DenseReference
):
    plan = planned(llama, TYPE, "up_proj")
    expected = sum(float(decomposed.bases[name].errors[rank]) for name, rank in plan.ranks.items())
    assert measured_cell(decomposed, plan, few, dense).predicted == pytest.approx(expected)
    plain = decompose(llama, statistics, replace(SINGLE, basis="weight_svd"))
    assert measured_cell(plain, planned(llama, MODULE, QUERY), few, dense).predicted is None


def test_a_model_that_diverges_makes_a_cell_that_says_so(llama: ModelHandle, decomposed: Decomposed, few: WindowSet, dense: DenseReference):
    basis = decomposed.bases[QUERY]
    broken = replace(decomposed, bases={**decomposed.bases, QUERY: replace(basis, down=torch.full_like(basis.down, torch.nan))})
    cell = measured_cell(broken, planned(llama, MODULE, QUERY), few, dense)
    assert cell.kl is None
    assert QUERY in cell.error


def test_windows_are_spread_evenly_over_the_split(windows: WindowSet):
    some = evenly_spaced(windows, 4)
    assert torch.equal(some.ids, windows.ids[[0, 13, 26, 39]])
    assert evenly_spaced(windows, None) is evenly_spaced(windows, 99) is windows


# --- what is planned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "order"),
    [
        ((0.2, 0.35, 0.5, 0.65, 0.8), (0.5, 0.2, 0.8, 0.35, 0.65)),
        ((0.8, 0.2), (0.8, 0.2)),
        ((0.3, 0.3), (0.3,)),
        ((0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), (0.5, 0.2, 0.8, 0.3, 0.4, 0.6, 0.7)),
    ],
)
def test_the_middle_is_measured_first_then_the_gaps(ratios: tuple[float, ...], order: tuple[float, ...]):
    assert coarse_first(ratios) == order


def test_cells_come_ratio_by_ratio_and_keep_at_most_what_was_asked_for(llama: ModelHandle):
    cells = planned_cells(llama.shapes, SINGLE, SensitivityConfig(kept=(0.3, 0.5, 0.7)))
    each = 7 + len(llama.shapes)
    assert len(cells) == 3 * each
    assert [cell.kept for cell in cells[::each]] == [0.5, 0.3, 0.7]
    assert [cell.scope for cell in cells[:each]] == [TYPE] * 7 + [MODULE] * len(llama.shapes)
    assert len({cell.key for cell in cells}) == len(cells)
    for cell in cells:
        assert cell.parameters <= cell.kept * cell.dense_parameters
    only = planned_cells(llama.shapes, SINGLE, SensitivityConfig(kept=(0.5,), scopes=(MODULE,), kinds=("o_proj",)))
    assert [cell.name for cell in only] == [shape.name for shape in llama.shapes if shape.kind == "o_proj"]


def test_matrices_are_factorised_one_by_one_whatever_the_run_does(llama: ModelHandle):
    result = single_compression(STUDIO, SensitivityConfig())
    assert (result.basis, result.storage, result.stacks, result.heads, result.value_dense) == ("two_sided", "pivoted", False, False, False)
    inner = single_compression(CompressionConfig(basis="cross_layer:drift_aware:two_sided_half"), SensitivityConfig(storage="factored"))
    assert (inner.basis, inner.storage) == ("two_sided_half", "factored")
    assert single_compression(CompressionConfig(), SensitivityConfig(basis="data_free_joint")).basis == "weight_svd"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kept": []}, "at least one kept ratio"),
        ({"kept": [1.0]}, r"between 0 and 1 .* got 1\.0"),
        ({"kept": ["half"]}, "got 'half'"),
        ({"kept": 0.5}, "kept: expected list, got 0.5"),
        ({"scopes": ["layer"]}, "scopes must be some of type, module; got layer"),
        ({"windows": 0}, "windows must be at least 1"),
        ({"basis": "magic"}, "basis must be one of"),
        ({"storage": "zip"}, "storage must be one of factored, pivoted"),
    ],
)
def test_what_can_not_be_measured_is_refused(changes: dict[str, object], said: str):
    with pytest.raises(ConfigError, match=said):
        from_mapping(SensitivityConfig, changes)


def test_a_type_that_is_not_there_is_named(llama: ModelHandle):
    with pytest.raises(ConfigError, match="no module type 'q'; it has q_proj, k_proj"):
        planned_cells(llama.shapes, SINGLE, SensitivityConfig(kinds=("q",)))


def test_a_request_survives_json():
    config = SensitivityConfig(kept=(0.5,), kinds=("q_proj",), windows=3)
    assert from_mapping(SensitivityConfig, json.loads(json.dumps(to_mapping(config)))) == config


# --- what is written --------------------------------------------------------------------------------------------------

SETTING = SensitivitySetting("two_sided", "pivoted", 1e-6, 1e-2, 4, 60, "text", "a" * 64, "b" * 64, "float32", "c")


def test_the_key_of_a_setting_says_of_shrinkage_only_where_there_is_some():
    """Records of earlier versions are found by their names."""
    plain = {name: value for name, value in to_mapping(SETTING).items() if not name.endswith("_shrinkage")}
    assert SETTING.key == hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]
    assert len({SETTING.key, replace(SETTING, input_shrinkage=0.1).key, replace(SETTING, gradient_shrinkage=0.1).key}) == 3


def cell(name: str = QUERY, kept: float = 0.5, kl: float | None = 1e-3) -> SensitivityCell:
    return SensitivityCell(MODULE, name, kept, 5, 1, 500, 1024, kl, 1e-4, 2e-3, 0.5)


def test_cells_are_appended_and_read_back(tmp_path: Path):
    path = tmp_path / "deep" / "cells.jsonl"
    assert read_record(path) is None
    cells = (cell(), cell(GATE), cell(GATE, 0.2, None))
    for one in cells:
        append_cell(path, SETTING, one)
    record = read_record(path)
    assert record is not None
    assert (record.setting, record.cells) == (SETTING, cells)


@pytest.mark.parametrize("torn", [1, 30])
def test_a_kill_while_writing_loses_one_cell_at_most(tmp_path: Path, torn: int):
    path = tmp_path / "cells.jsonl"
    for one in (cell(), cell(GATE)):
        append_cell(path, SETTING, one)
    path.write_bytes(path.read_bytes()[:-torn])
    record = read_record(path)
    assert record is not None
    assert record.cells == (cell(),)
    append_cell(path, SETTING, cell(kept=0.2))
    assert read_record(path).cells == (cell(), cell(kept=0.2))  # type: ignore[union-attr]


def test_a_kill_in_the_first_line_leaves_nothing_and_harms_nothing(tmp_path: Path):
    path = tmp_path / "cells.jsonl"
    path.write_text('{"basis": "two')
    assert read_record(path) is None
    append_cell(path, SETTING, cell())
    assert read_record(path).cells == (cell(),)  # type: ignore[union-attr]


@pytest.mark.parametrize("line", ["{", "[]", '{"scope": "module"}', '{"colour": 1}'])
def test_a_damaged_line_is_named_with_what_to_do(tmp_path: Path, line: str):
    path = tmp_path / "cells.jsonl"
    append_cell(path, SETTING, cell())
    with path.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(RunError, match=r"cells\.jsonl is damaged in line 3: .*Delete the file to measure again"):
        read_record(path)


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(llama_checkpoint: Path, text_file: Path) -> Run:
    text = TextConfig(f"file:{text_file}", context=32, calibration_windows=40, validation_windows=4, test_windows=6)
    return create_run(RunConfig(model=ModelSource(str(llama_checkpoint)), text=text, calibration=CALIBRATION))


def test_what_is_measured_is_not_measured_again(run: Run, monkeypatch: pytest.MonkeyPatch):
    config = SensitivityConfig(kept=(0.5,), kinds=("q_proj", "o_proj"))
    seen: list[str] = []
    real = measured_cell

    def dying(decomposed: Decomposed, plan: PlannedCell, *rest: object, **options: object) -> SensitivityCell:
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(plan.name)
        return real(decomposed, plan, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(bench, "measured_cell", dying)
    with pytest.raises(KeyboardInterrupt):
        measure_alone(run, config, verbose=False)
    (record,) = read_records(run)
    assert [one.name for one in record.cells] == seen == ["q_proj", "o_proj", QUERY, "model.layers.0.self_attn.o_proj"]
    (path,) = (run.path / "sensitivity").iterdir()
    before = path.read_bytes()

    monkeypatch.setattr(bench, "measured_cell", real)
    result = measure_alone(run, config, verbose=False)
    assert (result.measured, len(result.cells)) == (2, 6)
    assert path.read_bytes().startswith(before)
    assert record_path(run, result.setting) == path
    assert measure_alone(run, config, verbose=False).measured == 0
    assert run.status().state == "finished"


def test_the_dense_model_is_at_no_distance_from_itself(run: Run, monkeypatch: pytest.MonkeyPatch):
    """What cells are compared with has no rounding of its own; what trials are compared with has."""
    held: list[tuple[ModelHandle, WindowSet, DenseReference]] = []

    def watched(decomposed: Decomposed, plan: PlannedCell, windows: WindowSet, dense: DenseReference, **options: int) -> SensitivityCell:
        held.append((decomposed.handle, windows, dense))
        return measured_cell(decomposed, plan, windows, dense, **options)

    monkeypatch.setattr(bench, "measured_cell", watched)
    measure_alone(run, SensitivityConfig(kept=(0.5,), kinds=("q_proj",), scopes=(TYPE,)), verbose=False)
    ((handle, windows, dense),) = held
    itself = score_windows(handle, windows, dense=dense)[0].kl
    assert itself is not None
    assert (itself == 0).all()
    usual = score_windows(handle, windows, dense=DenseReference.compute(handle, windows, batch_size=8))[0].kl
    assert usual is not None
    assert (usual != 0).any()


def test_more_ratios_and_other_windows(run: Run):
    first = measure_alone(run, SensitivityConfig(kept=(0.5,), kinds=("q_proj",)), verbose=False)
    more = measure_alone(run, SensitivityConfig(kept=(0.5, 0.3), kinds=("q_proj",)), verbose=False)
    assert (first.measured, more.measured, len(more.cells)) == (3, 3, 6)
    assert more.setting == first.setting
    assert more.setting.tokens == 4 * 31
    assert "validation split" in more.setting.protocol
    fewer = measure_alone(run, SensitivityConfig(kept=(0.5,), kinds=("q_proj",), windows=2), verbose=False)
    assert (fewer.measured, fewer.setting.windows) == (3, 2)
    assert [record.setting.windows for record in read_records(run)] == [2, 4]  # a file of its own, the newest first


def test_a_run_keeps_its_state_and_a_mistake_does_not_fail_it(run: Run):
    run.write_status(replace(run.status(), state="stopped", message="as it was"))
    with pytest.raises(ConfigError, match="no module type"):
        measure_alone(run, SensitivityConfig(kinds=("nope",)), verbose=False)
    assert (run.status().state, run.status().message) == ("stopped", "as it was")
