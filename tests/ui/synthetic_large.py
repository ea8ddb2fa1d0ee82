"""A run as large as the dashboard must stay smooth with: 80 blocks of 7 modules, 1000 trials, 1000 windows, 10 000 words."""

from __future__ import annotations

import json

import numpy as np
import optuna
import synthetic
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial
from synthetic_answers import detailed, speed_answer, tokens_answer

from lowrank_core.config import SearchConfig
from lowrank_core.parameters import MatrixShape
from lowrank_core.runs import Run, write_json
from lowrank_core.spectra.spectrum import LayerSpectrum
from lowrank_core.studies.storage import open_journal

LAYERS, WIDTH, TRIALS, WINDOWS, TOKENS = 80, 512, 1000, 1000, 2048
SHAPES = {
    "q_proj": (WIDTH, WIDTH),
    "k_proj": (WIDTH // 4, WIDTH),
    "v_proj": (WIDTH // 4, WIDTH),
    "o_proj": (WIDTH, WIDTH),
    "gate_proj": (3 * WIDTH, WIDTH),
    "up_proj": (3 * WIDTH, WIDTH),
    "down_proj": (WIDTH, 3 * WIDTH),
}


def spectra(seed: int = 0) -> list[LayerSpectrum]:
    """Descending values with noise in every digit, so that no number is short by chance."""
    generator = np.random.default_rng(seed)

    def values(count: int, decay: float) -> np.ndarray:
        return np.sort(np.exp(-decay * np.arange(count) / count) * generator.uniform(0.5, 1.5, count))[::-1]

    def spectrum(shape: MatrixShape) -> LayerSpectrum:
        full = shape.max_rank
        weights, features, sample, shuffled = (values(full, decay) for decay in (2.0, 12.0, 11.0, 1.0))
        return LayerSpectrum(shape, weights, features, sample, values(shape.d_in, 10.0), shuffled)

    return [spectrum(shape) for shape in synthetic.matrices()]


def write_long_study(run: Run) -> None:
    """Write 1000 trials with ranks of their own, every tenth stopped early."""
    study = optuna.create_study(storage=open_journal(run.journal), study_name=run.study_name, direction="minimize")
    generator = np.random.default_rng(2)
    space = {name: FloatDistribution(0.1, 1.0) for name in synthetic.VARIABLES}
    units, trials = synthetic.priced_units(), []
    for number in range(TRIALS):
        loss = float(0.3 + generator.exponential(0.1))
        stopped = number % 10 == 9
        point = {"params": {name: float(generator.uniform(0.1, 1.0)) for name in space}, "distributions": space}
        ranks = {unit.name: int(rank) for unit, rank in zip(units, generator.integers(1, 100, len(units)), strict=True)}
        attributes = {"label": "uniform" if number == 0 else "sampled", "ranks": json.dumps(ranks), "worker": "elsewhere:77:0.5"}
        attributes |= {
            "compression_ratio": synthetic.RATIO,
            "kl": loss,
            "perplexity": float(np.exp(3 + loss)),
            "tokens": 124,
            "seconds": 2.0,
        }
        state = {"state": TrialState.PRUNED} if stopped else {"state": TrialState.COMPLETE, "value": loss}
        seen = synthetic._windows(loss, 4 if stopped else synthetic.WINDOWS)
        trials.append(create_trial(user_attrs=attributes, intermediate_values=seen, **state, **({} if number == 0 else point)))
    study.add_trials(trials)


def _long_answers(run: Run) -> None:
    """Write comparisons over 1000 windows of 1000 positions, and a text of 2048 tokens."""
    generator = np.random.default_rng(3)
    bodies = []
    for position, (label, trial) in enumerate((("trial 3", 3), ("uniform", "uniform"), ("trial 5", 5))):
        body = detailed(synthetic.comparison(label, trial, 3.2 + 0.01 * position))
        report = body["report"]
        assert isinstance(report, dict)
        dense = generator.normal(3.0, 0.3, WINDOWS)
        report |= {"windows": WINDOWS, "dense_window_nll": list(dense), "window_nll": list(dense + generator.exponential(0.2, WINDOWS))}
        bodies.append(body)
    pieces = [f" word{generator.integers(10_000)}" for _ in range(TOKENS + 1)]
    tokens = tokens_answer(pieces=pieces)
    tokens |= {name: list(generator.exponential(1.0, TOKENS)) for name in ("nll", "dense_nll", "kl")}
    tokens |= {name: [f" word{generator.integers(10_000)}" for _ in range(TOKENS)] for name in ("likeliest", "dense_likeliest")}
    for number, body in enumerate([*bodies, tokens, speed_answer()]):
        write_json(run.path / "results" / f"{number + 1}.json", body)


def large_run(patch) -> Run:
    """Write the run; what ``synthetic`` writes is made large by ``patch`` (a monkeypatch)."""
    for name, value in (("BLOCKS", LAYERS), ("HIDDEN", WIDTH), ("KINDS", SHAPES), ("spectra", spectra)):
        patch.setattr(synthetic, name, value)
    run = synthetic.make_run(config=SearchConfig(synthetic.RATIO, trials=TRIALS), study=write_long_study)
    write_json(run.path / "model.json", synthetic.model_json() | {"vocabulary": 10_000})
    _long_answers(run)
    return run
