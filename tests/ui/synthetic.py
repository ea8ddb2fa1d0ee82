"""A small run directory as a worker leaves it: consistent numbers, no torch, no model."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from lowrank_core.allocation import AllocationProblem, RankAllocation, allocate, allocation_from_ranks, module_group, project
from lowrank_core.config import CompressionConfig, ModelSource, RunConfig, SearchConfig, TextConfig
from lowrank_core.parameters import MatrixShape, Unit, budget_for_ratio
from lowrank_core.runs import Run, RunStatus, create_run, process_started, write_json
from lowrank_core.runs.healing_records import HealingPoint, HealingReport, write_history, write_report
from lowrank_core.sensitivity.config import SensitivityConfig, single_compression
from lowrank_core.sensitivity.planning import planned_cells
from lowrank_core.sensitivity.records import SensitivityCell, SensitivitySetting, append_cell, record_path
from lowrank_core.spectra.spectrum import LayerSpectrum, save_spectra
from lowrank_core.studies.storage import open_journal

BLOCKS, HIDDEN, FFN, VALUES = 3, 24, 48, 16
KINDS = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (VALUES, HIDDEN),
    "v_proj": (VALUES, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (FFN, HIDDEN),
    "up_proj": (FFN, HIDDEN),
    "down_proj": (HIDDEN, FFN),
}
INPUTS = {"q_proj": "attn", "k_proj": "attn", "v_proj": "attn", "o_proj": "o", "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "down"}
RATIO = 0.3
VARIABLES = ("qk", "o", "gate", "up", "down")
VALUES_OF_TRIALS = (0.41, 0.44, 0.52, 0.35, None, 0.38)
"""Objective by trial: the two baselines, then sampled ones; the fifth failed."""
DENSE_NLL = 3.0


def matrices() -> list[MatrixShape]:
    return [
        MatrixShape(
            f"model.layers.{depth}.{'mlp' if kind in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{kind}", kind, depth, *shape
        )
        for depth in range(BLOCKS)
        for kind, shape in KINDS.items()
    ]


def priced_units() -> list[Unit]:
    return [Unit((matrix,), adds_bias=True) for matrix in matrices()]


def spectra(seed: int = 0) -> list[LayerSpectrum]:
    """Spectra of random weights and of features with a decaying covariance."""
    generator = np.random.default_rng(seed)
    result = []
    for shape in matrices():
        weight = generator.standard_normal((shape.d_out, shape.d_in)) / np.sqrt(shape.d_in)
        pooled = np.diag(np.exp(-0.25 * np.arange(shape.d_in)))
        sample = pooled + 0.05 * np.eye(shape.d_in)

        def eigenvalues(covariance: np.ndarray, weight: np.ndarray = weight, count: int = shape.max_rank) -> np.ndarray:
            return np.maximum(np.linalg.eigvalsh(weight @ covariance @ weight.T)[::-1][:count], 0.0)

        values = np.linalg.svd(weight, compute_uv=False)
        mixed = np.linalg.svd(np.random.default_rng(seed + 1).permutation(weight.ravel()).reshape(weight.shape), compute_uv=False)
        result.append(LayerSpectrum(shape, values, eigenvalues(pooled), eigenvalues(sample), np.sort(np.diag(pooled))[::-1], mixed))
    return result


def model_json() -> dict[str, object]:
    layers = [
        {
            "name": m.name,
            "kind": m.kind,
            "depth": m.depth,
            "d_out": m.d_out,
            "d_in": m.d_in,
            "bias": m.bias,
            "parameters": m.dense_parameters,
            "input_group": f"{m.depth}.{INPUTS[m.kind]}",
        }
        for m in matrices()
    ]
    compressible = sum(m.dense_parameters for m in matrices())
    return {
        "reference": "demo",
        "architecture": "LlamaForCausalLM",
        "fingerprint": "0123456789abcdef",
        "dtype": "float32",
        "device": "cpu",
        "parameters": compressible + 128 * HIDDEN,
        "compressible_parameters": compressible,
        "bytes": 4 * (compressible + 128 * HIDDEN),
        "vocabulary": 128,
        "max_context": 64,
        "blocks": BLOCKS,
        "hidden": HIDDEN,
        "tied_embeddings": True,
        "layers": layers,
    }


def text_json() -> dict[str, object]:
    sizes = {"calibration": 40, "validation": 4, "test": 8}
    return {
        "reference": "python-stdlib",
        "context": 32,
        "bos": "window",
        "seed": 0,
        "preview": "import os\n",
        "splits": {
            name: {"windows": windows, "tokens": windows * 32, "available_tokens": windows * 100, "sha256": f"{name:0<64}"}
            for name, windows in sizes.items()
        },
    }


def calibration_json(tokens: int = 1280) -> dict[str, object]:
    inputs: dict[str, dict[str, object]] = {}
    for m in matrices():
        group = f"{m.depth}.{INPUTS[m.kind]}"
        entry = inputs.setdefault(
            group,
            {
                "input_group": group,
                "width": m.d_in,
                "layers": [],
                "tokens": tokens,
                "tokens_per_dimension": tokens / m.d_in,
                "condition": 1e4,
                "group_tokens": [1024, 256],
                "group_traces": [3.0, 5.0],
                "group_mean_shifts": [0.1, 0.2],
                "pooled_to_sample": 0.05,
            },
        )
        entry["layers"].append(m.name)  # type: ignore[attr-defined]
    figures = {"tokens": tokens, "windows": 40, "seconds": 12.5, "cached": False, "group_size": 32, "group_weights": "equal"}
    return {**figures, "inputs": list(inputs.values()), "warnings": []}


def write_study(run: Run, *, running: bool = False) -> None:
    """Write the journal that the worker would: two baselines, sampled trials, one failed, one in flight if ``running``."""
    study = optuna.create_study(storage=open_journal(run.journal), study_name=run.study_name, direction="minimize", load_if_exists=True)
    shapes = priced_units()
    dense = {m.name for m in shapes if module_group(m.kind) == "v"}
    generator = np.random.default_rng(1)
    for number, value in enumerate(VALUES_OF_TRIALS):
        label = ("uniform", "lord_manual")[number] if number < 2 else "sampled"
        params = {name: float(generator.uniform(0.1, 1.0)) for name in VARIABLES}
        targets = {m.name: params.get(module_group(m.kind), 1.0) for m in shapes}
        problem = AllocationProblem(tuple(shapes), RATIO, frozenset(dense))
        allocation = (
            allocate(label, shapes, RATIO, keep_dense=dense)
            if number < 2
            else allocation_from_ranks(label, shapes, project(problem, targets))
        )
        attributes = {"label": label, "ranks": json.dumps(dict(allocation.ranks)), "compression_ratio": allocation.compression_ratio}
        if value is not None:
            attributes |= {"kl": value, "perplexity": float(np.exp(DENSE_NLL + value)), "tokens": 128, "seconds": 1.5}
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if value is not None else TrialState.FAIL,
                value=value,
                params=params,
                distributions={name: FloatDistribution(0.1, 1.0) for name in VARIABLES},
                user_attrs=attributes,
            )
        )
    if running:
        study.ask({name: FloatDistribution(0.1, 1.0) for name in VARIABLES})


WINDOWS = 8


def _windows(mean: float, seen: int = WINDOWS) -> dict[int, float]:
    return {window: mean * (0.8 + 0.4 * window / (WINDOWS - 1)) for window in range(seen)}


def _journal(run: Run, directions: tuple[str, ...] = ("minimize",)) -> optuna.Study:
    storage = open_journal(run.journal)
    return optuna.create_study(storage=storage, study_name=run.study_name, directions=list(directions), load_if_exists=True)


def _attributes(allocation: RankAllocation, label: str, loss: float | None) -> dict[str, object]:
    result: dict[str, object] = {"label": label, "ranks": json.dumps(dict(allocation.ranks)), "worker": f"elsewhere:77:{0.5}"}
    result["compression_ratio"] = allocation.compression_ratio
    if loss is not None:
        result |= {"kl": loss, "perplexity": float(np.exp(DENSE_NLL + loss)), "tokens": 124, "seconds": 2.0}
    return result


def write_rich_study(run: Run) -> None:
    """Write a trial of every kind: three baselines, sampled, stopped early, manual (within, over the budget, waiting), failed, running."""
    study, shapes = _journal(run), priced_units()
    dense = {m.name for m in shapes if module_group(m.kind) == "v"}
    uniform = allocate("uniform", shapes, RATIO, keep_dense=dense)
    generous = allocation_from_ranks("manual", shapes, {shapes[0].name: 3})
    params = dict.fromkeys(VARIABLES, 0.5)
    space = {name: FloatDistribution(0.1, 1.0) for name in VARIABLES}
    point = {"params": params, "distributions": space}
    complete, given = TrialState.COMPLETE, {"given": True}
    for label, loss in (("uniform", 0.41), ("lord_manual", 0.44), ("lagrangian", 0.36), ("sampled", 0.33)):
        own = point if label == "sampled" else {}
        result = _attributes(uniform, label, loss)
        study.add_trial(create_trial(state=complete, value=loss, user_attrs=result, intermediate_values=_windows(loss), **own))
    stopped = {**_attributes(uniform, "sampled", None), "seconds": 0.7}
    study.add_trial(create_trial(state=TrialState.PRUNED, user_attrs=stopped, intermediate_values=_windows(0.9, 6), **point))
    manual = _attributes(uniform, "manual", 0.35) | given
    study.add_trial(create_trial(state=complete, value=0.35, user_attrs=manual, intermediate_values=_windows(0.35)))
    over = _attributes(generous, "manual", 0.1) | given
    study.add_trial(create_trial(state=complete, value=0.1, user_attrs=over, constraints={"keeps too much": 0.2}))
    failed = _attributes(uniform, "sampled", None) | {"error": "the objective kl is not finite at this allocation"}
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs=failed, **point))
    running = study.ask(space)
    me = f"{socket.gethostname()}:{os.getpid()}:{process_started(os.getpid())}"
    for name, value in (_attributes(uniform, "sampled", None) | {"worker": me}).items():
        running.set_user_attr(name, value)
    for window, loss in _windows(0.34, 4).items():
        running.report(loss, window)
    study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={"label": "manual", "ranks": "{}", **given}))


def write_long_study(run: Run, trials: int = 20) -> None:
    """Write sampled trials whose value is that of one variable, ``down``, alone."""
    study = _journal(run)
    uniform = allocate("uniform", priced_units(), RATIO)
    generator = np.random.default_rng(2)
    space = {name: FloatDistribution(0.1, 1.0) for name in VARIABLES}
    for _ in range(trials):
        params = {name: float(generator.uniform(0.1, 1.0)) for name in VARIABLES}
        result = _attributes(uniform, "sampled", params["down"])
        study.add_trial(create_trial(value=params["down"], params=params, distributions=space, user_attrs=result))


FRONT = ((0.2, 0.1), (0.4, 0.3), (0.3, 0.35), (0.6, 0.9), (0.5, 0.6))
"""Ratio asked for and objective by trial of ``write_front``: the third is beaten by the second; the first two are uniform."""


def write_front(run: Run) -> None:
    """Write the study of a search over a range of ratios."""
    study, shapes = _journal(run, ("maximize", "minimize")), priced_units()
    space = {"qk": FloatDistribution(0.2, 1.0), "compression_ratio": FloatDistribution(0.2, 0.6)}
    for number, (ratio, loss) in enumerate(FRONT):
        allocation = allocate("uniform", shapes, ratio)
        result = _attributes(allocation, "uniform" if number < 2 else "sampled", loss)
        values = [allocation.compression_ratio, loss]
        params = {"qk": 0.5, "compression_ratio": ratio}
        study.add_trial(create_trial(state=TrialState.COMPLETE, values=values, params=params, distributions=space, user_attrs=result))
    study.ask(space)


def comparison(label: str, trial: int | str, nll: float) -> dict[str, object]:
    """An answer to a request to compare."""
    dense = sum(m.dense_parameters for m in matrices())
    kept = budget_for_ratio(priced_units(), RATIO)
    rest = 128 * HIDDEN
    windows = [DENSE_NLL - 0.2, DENSE_NLL + 0.2, DENSE_NLL - 0.1, DENSE_NLL + 0.1]
    report = {
        "dataset": "python-stdlib",
        "split": "test",
        "context": 32,
        "windows": 4,
        "tokens": 124,
        "bos": "window",
        "protocol": "python-stdlib, test split, 4 windows of 32 tokens",
        "perplexity": float(np.exp(nll)),
        "nll": nll,
        "nll_stderr": 0.05,
        "perplexity_interval": [float(np.exp(nll - 0.1)), float(np.exp(nll + 0.1))],
        "perplexity_difference_interval": [1.0, 3.0],
        "parameters": kept + rest,
        "compressible_parameters": kept,
        "bytes": 4 * (kept + rest),
        "seconds": 2.0,
        "window_nll": [value + nll - DENSE_NLL for value in windows],
        "dense_perplexity": float(np.exp(DENSE_NLL)),
        "dense_perplexity_interval": [float(np.exp(DENSE_NLL - 0.05)), float(np.exp(DENSE_NLL + 0.05))],
        "dense_nll": DENSE_NLL,
        "dense_parameters": dense + rest,
        "dense_compressible_parameters": dense,
        "dense_bytes": 4 * (dense + rest),
        "kl": 0.35,
        "top1_agreement": 0.81,
        "compression_ratio": 1 - kept / dense,
        "model_compression_ratio": (dense - kept) / (dense + rest),
        "kl_interval": [0.3, 0.4],
        "dense_window_nll": windows,
    }
    return {
        "ok": True,
        "kind": "compare",
        "arguments": {"trial": trial},
        "time": time.time(),
        "trial": trial,
        "label": label,
        "ranks": {},
        "report": report,
    }


def write_answers(run: Run) -> None:
    """Write answers to requests of each kind."""
    generation = {"ok": True, "kind": "generate", "trial": 3, "label": "trial 3", "prompt": "def f(", "tokens": 8, "seed": 0, "time": 1.0}
    bodies = [
        comparison("trial 3", 3, 3.2),
        comparison("uniform", "uniform", 3.4),
        {**generation, "dense_text": "x):", "compressed_text": "self):"},
        {"ok": True, "kind": "export", "trial": 3, "path": str(run.path / "exports" / "trial-3"), "time": 1.0},
    ]
    for number, body in enumerate(bodies):
        write_json(run.path / "results" / f"{number + 1}.json", body)


def directions(module: str, side: str = "input") -> dict[str, object]:
    """An answer to a request for the top directions of a module."""
    hits = [
        {"token": " def", "before": "\n", "after": " mean(", "projection": 7.5},
        {"token": "\n", "before": "x = 1", "after": "y", "projection": -3.25},
    ]
    result = [{"number": number, "share": share, "tokens": hits} for number, share in ((1, 0.5), (2, 0.125))]
    body = {"module": module, "side": side, "protocol": "python-stdlib, calibration split: 4 windows of 32 tokens", "directions": result}
    return {"ok": True, "kind": "directions", "arguments": {"module": module, "side": side}, "time": 1.0, **body}


def write_healing(run: Run, *, done: bool = True) -> None:
    """Write a healing of trial 3: its curve, and once it is done its report and the worker's answer."""
    folder = run.path / "healed" / "trial-3-distill-12345678"
    label = "trial 3, healed by distill"
    write_json(folder / "request.json", {"label": label, "allocation": "trial 3", "healing": {"method": "distill", "steps": 40}})
    curve = [(0, None, 0.30, 3.20), (20, 0.28, 0.25, 3.15), (40, 0.22, 0.26, 3.16)]
    seen = curve if done else curve[:2]
    points = tuple(HealingPoint(step, loss, kl, nll, 1e-4, 100 * step, float(step), kept=step < 40) for step, loss, kl, nll in seen)
    write_history(folder, points)
    if not done:
        return
    words = ("distill", "Distillation of the factors", 1e-4, 40, 20, "steps", 1000, 4000, 40.0)
    write_report(folder, HealingReport(*words, 0.30, 0.25, 3.20, 3.15, "training text", "validation text", points))
    body = comparison(label, 3, 3.1)
    write_json(
        run.path / "results" / "7.json",
        {**body, "kind": "heal", "folder": folder.name, "one_shot": comparison("trial 3", 3, 3.2)["report"]},
    )


def write_sensitivity(run: Run, *, cells: int | None = None, windows: int = 4) -> list[SensitivityCell]:
    """Write the first ``cells`` that a worker would measure: the divergence grows with depth, and with the square of what is removed."""
    setting = SensitivitySetting("two_sided", "factored", 1e-6, 1e-2, windows, 31 * windows, "synthetic text", "a", "b", "float32", "c")
    config = SensitivityConfig(kept=(0.2, 0.5, 0.8))
    depths = {m.name: m.depth for m in matrices()}
    compression = single_compression(CompressionConfig(basis="two_sided"), config)
    result = []
    for plan in planned_cells(matrices(), compression, config)[:cells]:
        kl = 1e-3 * (1 - plan.kept) ** 2 * (1 + depths.get(plan.name, 5))
        counts = (min(plan.ranks.values()), len(plan.ranks), plan.parameters, plan.dense_parameters)
        result.append(SensitivityCell(plan.scope, plan.name, plan.kept, *counts, kl, kl / 10, 2 * kl, 0.5))
        append_cell(record_path(run, setting), setting, result[-1])
    return result


def running_status(stage: str = "Searching", done: int = 5, total: int = 30, *, pid: int | None = None) -> RunStatus:
    """The status of a worker that lives: process ``pid``, or this very one."""
    pid = pid or os.getpid()
    return RunStatus(
        "running", stage, done, total, 12.0, pid=pid, pid_started=process_started(pid), heartbeat=time.time(), timings={"Calibrating": 12.5}
    )


def make_run(
    *,
    search: bool = True,
    state: str = "finished",
    parts: bool = True,
    path: Path | None = None,
    config: SearchConfig | None = None,
    study: Callable[[Run], None] | None = None,
) -> Run:
    """Write a run under the home: ``parts`` says whether its stages before the search are done, ``study`` writes its trials."""
    config = RunConfig(
        ModelSource("demo"),
        TextConfig("python-stdlib", context=32, calibration_windows=40),
        search=(config or SearchConfig(RATIO, trials=6)) if search else None,
    )
    run = create_run(config, path=path)
    if parts:
        write_json(run.path / "model.json", model_json())
        write_json(run.path / "text.json", text_json())
        write_json(run.path / "calibration.json", calibration_json())
        save_spectra(run.path / "spectra.npz", spectra())
    if search and parts and study is not None:
        study(run)
    elif search and parts:
        write_study(run, running=state == "running")
    message = "model: the loss of layer 3 is not finite." if state == "failed" else ""
    run.write_status(running_status() if state == "running" else RunStatus(state=state, message=message))
    return run
