"""MPIFA's refit: the published turns of least squares, on data and on a model."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import gradients, inputs_of, layer_data, random, rows, second_moment
from torch import Tensor

from lowrank_core.compression.decomposed import decompose
from lowrank_core.config import CalibrationConfig, CompressionConfig
from lowrank_core.decomposition.factorization import Damping, FactorBasis, factorize_unit, refit_unit
from lowrank_core.decomposition.units import factorize, units_of
from lowrank_core.evaluation import evaluate
from lowrank_core.layers.base import CompressedModule
from lowrank_core.metrics import LayerData, metric_named
from lowrank_core.metrics.drift_aware import DriftAware
from lowrank_core.metrics.refitted import REFITTED
from lowrank_core.metrics.two_sided import TWO_SIDED
from lowrank_core.models import ModelHandle
from lowrank_core.parameters import Unit, budget_for_ratio
from lowrank_core.presets.recipes import PRESETS
from lowrank_core.statistics.calibration import LayerStatistics, collect_statistics
from lowrank_core.text import WindowSet

M, N, RANK = 14, 18, 5
NONE = Damping(columns=0.0, rows=1e-2)
Matrix = npt.NDArray[np.float64]


def drifted(seed: int = 0, *, bias: bool = False, amount: float = 0.3) -> tuple[LayerData, Tensor, Tensor]:
    """Return a matrix with the statistics of its drifted input, and both inputs (tokens, n)."""
    x = rows(N, seed=seed)
    own = x + amount * random(len(x), N, seed=seed + 9) @ random(N, N, seed=seed + 10) / N
    given = layer_data(M, x, bias=bias, seed=seed + 3, g=gradients(M, tokens=len(x), seed=seed + 5))
    cross = x.T @ own / len(x)
    return replace(given, inputs=inputs_of(own), cross=cross, dense_mean=x.mean(0)), x, own


def started(given: LayerData, x: Tensor, damping: Damping = NONE, basis: DriftAware = REFITTED) -> FactorBasis:
    """Return the dense model's factors: no drift is known."""
    plain = replace(given, inputs=inputs_of(x), cross=None, dense_mean=None)
    return factorize_unit(Unit((given.shape,), "factored", basis.centred), [plain], basis, damping)


def refit(
    given: LayerData, x: Tensor, steps: int, *, rank: int = RANK, damping: Damping = NONE, basis: DriftAware = REFITTED
) -> FactorBasis:
    start = started(given, x, damping, basis).slice(rank)
    return refit_unit(Unit((given.shape,), "factored", basis.centred), [given], replace(basis, refit_steps=steps), damping, start)


def product(result: FactorBasis, rank: int | None = None) -> Tensor:
    factors = result.slice(result.max_rank if rank is None else rank)
    return factors.ups[0] @ factors.down


def published(w: Matrix, x: Matrix, own: Matrix, rank: int) -> Matrix:
    """Return the matrix of MPIFA: SVD-LLM's factors, then U by its normal equations, then V by its own."""
    root = np.linalg.cholesky(x.T @ x)
    u, s, vt = np.linalg.svd(w @ root)
    up, down = u[:, :rank] * s[:rank], vt[:rank] @ np.linalg.inv(root)
    target = 0.75 * own @ w.T + 0.25 * x @ w.T
    xtx, ytx = own.T @ own, target.T @ own
    up = ytx @ down.T @ np.linalg.inv(down @ xtx @ down.T)
    down = np.linalg.pinv(up) @ ytx @ np.linalg.inv(xtx)
    return np.asarray(up @ down)


@pytest.mark.parametrize("seed", range(5))
def test_two_turns_are_the_published_ones(seed: int):
    given, x, own = drifted(seed)
    expected = published(given.weight.numpy(), x.numpy(), own.numpy(), RANK)
    result = product(refit(given, x, steps=2)).numpy()
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-7 * np.abs(expected).max())
    assert np.abs(product(started(given, x), RANK).numpy() - expected).max() > 1e-2  # before, they are others


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 13), st.booleans())
def test_no_turn_raises_the_objective(seed: int, rank: int, two_sided: bool):
    """In the metric that is minimised, so its damping is 0; never below the closed form, which many turns come down to."""
    given, x, _ = drifted(seed)
    basis = replace(REFITTED, inner=replace(TWO_SIDED, centred=False)) if two_sided else REFITTED
    damping = Damping(columns=0.0, rows=1e-12)
    errors = [float(refit(given, x, steps, rank=rank, damping=damping, basis=basis).errors[-1]) for steps in range(7)]
    slack = 1e-9 * errors[0]
    assert all(after <= before + slack for before, after in itertools.pairwise(errors))
    best = factorize_unit(Unit((given.shape,), "factored"), [given], DriftAware(inner=basis.inner, beta=basis.beta), damping)
    assert errors[-1] >= float(best.errors[rank]) - slack


def test_many_turns_come_down_to_the_drift_aware_closed_form():
    given, x, _ = drifted(2)
    best = factorize_unit(Unit((given.shape,)), [given], DriftAware(beta=0.25), NONE)
    torch.testing.assert_close(product(refit(given, x, steps=400)), product(best, RANK), rtol=0, atol=1e-4)


def test_its_error_is_the_weighed_distance_to_the_target():
    given, x, own = drifted(4)
    result = refit(given, x, steps=2)
    target = given.weight @ (0.75 * own + 0.25 * x).T @ own @ torch.linalg.inv(own.T @ own)
    for rank in range(RANK + 1):
        gap = target - (product(result, rank) if rank else 0.0)
        assert float(result.errors[rank]) == pytest.approx(float((gap @ second_moment(own) @ gap.T).trace()), rel=1e-9)


@pytest.mark.parametrize("damping", [NONE, Damping(columns=1e-2)])
def test_without_drift_the_best_factors_stay_and_full_rank_is_lossless(damping: Damping):
    given, x, _ = drifted(1, amount=0.0)
    torch.testing.assert_close(product(refit(given, x, 2, damping=damping)), product(started(given, x, damping), RANK), rtol=0, atol=1e-8)
    torch.testing.assert_close(product(refit(given, x, 2, rank=M, damping=damping)), given.weight, rtol=0, atol=1e-8)


def test_a_matrix_of_a_lower_rank_than_its_factors_is_refitted_exactly():
    """Where least squares has no single answer."""
    given, x, _ = drifted(6, amount=0.0)
    low = replace(given, weight=random(M, 3, seed=1) @ random(3, N, seed=2))
    torch.testing.assert_close(product(refit(low, x, 2, rank=6)), low.weight, rtol=0, atol=1e-8)


def test_a_bias_is_carried_and_a_centred_basis_keeps_the_mean_output():
    given, x, own = drifted(7, bias=True)
    factors = refit(given, x, 2).slice(RANK)
    assert factors.biases[0] is not None
    torch.testing.assert_close(factors.biases[0], given.bias)
    factors = refit(given, x, 2, basis=replace(REFITTED, inner=metric_named("pooled_feature"))).slice(RANK)
    y = own.mean(0) @ factors.down.T @ factors.ups[0].T + factors.biases[0]
    torch.testing.assert_close(y, given.weight @ x.mean(0) + given.bias)


# --- on a model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def statistics(llama: ModelHandle, windows: WindowSet) -> LayerStatistics:
    return collect_statistics(llama, windows, CalibrationConfig(group_size=40))


def test_the_preset_keeps_to_the_budget_and_is_closer_than_its_storage_alone(
    llama: ModelHandle, windows: WindowSet, statistics: LayerStatistics
):
    """On the calibration text; ranks are those of pifa, so that only the refit differs."""
    losses = {}
    for name in ("mpifa", "pifa"):
        result = decompose(llama, statistics, PRESETS[name].compression)
        allocation = result.allocate(PRESETS[name].allocation, 0.5)
        model = result.compress(allocation, windows)
        assert model.report.linear_parameters_after == allocation.parameters <= budget_for_ratio(result.units, 0.5)
        losses[name] = evaluate(model.handle, windows, against=llama).kl
    assert losses["mpifa"] < losses["pifa"]


def test_where_nothing_is_compressed_before_the_whitened_factors_stay(llama: ModelHandle, windows: WindowSet, statistics: LayerStatistics):
    result = decompose(llama, statistics, PRESETS["mpifa"].compression)
    model = result.compress(result.allocate("uniform", 0.5), windows).handle.module
    bases = factorize(llama, statistics, units_of(llama, PRESETS["pifa"].compression), PRESETS["pifa"].compression)
    changed = []
    for name, module in model.named_modules():
        if isinstance(module, CompressedModule):
            rank = result.allocate("uniform", 0.5).ranks[name]
            assert rank is not None
            changed.append(float((module.weight.double() - product(bases[name], rank)).abs().max()))  # type: ignore[arg-type]
    assert max(changed[:3]) < 1e-4  # q, k and v of the first block
    assert max(changed[3:]) > 1e-3


def test_beta_is_a_setting_and_the_preset_has_the_paper_s(llama: ModelHandle, windows: WindowSet, statistics: LayerStatistics):
    preset = PRESETS["mpifa"].compression
    assert (preset.basis, preset.storage, preset.drift_beta) == ("refitted", "pivoted", 0.25)
    assert all(PRESETS[name].compression.fit_windows > 10_000 for name in ("mpifa", "aa_svd"))  # as published: on all windows
    assert metric_named("refitted").refit_steps == 2
    assert metric_named("drift_aware").refit_steps == 0
    assert metric_named("shared_input:refitted").refit_steps == 2
    config = CompressionConfig(basis="refitted:two_sided", value_dense=False)
    assert metric_named(config.basis).centred
