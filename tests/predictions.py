"""Allocations drawn near to and far from what a search tries, predicted and measured.

    python tests/predictions.py tests/predictions.json

measures them on the bundled model, with the default recipe and protocol, as the trials of a run would (ten minutes on an idle core).
The file holds numbers alone: ranks by place among the run's units, 0 where a unit is dense or not used, and the measured KL divergence.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lowrank_core.allocation import Draft
from lowrank_core.allocation.curves import CurveRecord, load_curves
from lowrank_core.config import ModelSource, RunConfig
from lowrank_core.parameters import Unit
from lowrank_core.presets.recipes import DEFAULT_PRESET, search_by
from lowrank_core.runs import create_run
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studio.manual.starting_points import Recipe

NEAR, FAR = "near", "far"
Ranks = Mapping[str, int | None]


def kinds(draft: Draft) -> list[list[str]]:
    """Return the names of the rows of each type."""
    result: dict[str, list[str]] = {}
    for unit in draft.rows:
        result.setdefault(unit.kind, []).append(unit.name)
    return list(result.values())


def thirds(draft: Draft) -> list[list[str]]:
    """Return the names of the rows of each third of the depth."""
    blocks = 1 + max(unit.depth for unit in draft.rows)
    return [names for third in range(3) if (names := [u.name for u in draft.rows if u.depth * 3 // blocks == third])]


def near_draws(recipe: Recipe, start: Draft, ratio: float, generator: np.random.Generator) -> dict[str, Callable[[], Draft]]:
    """Return small changes of ``start``, each as a user may make it."""

    def jitter() -> Draft:
        draft = start
        for name in draft.ranks:
            draft = draft.with_kept(name, min(1.0, draft.kept([name]) * float(np.exp(0.15 * generator.standard_normal()))))
        return draft.fitted(ratio)

    def slider() -> Draft:
        names = _one(generator, [*kinds(start), *thirds(start)])
        moved = start.scaled(names, min(1.0, start.kept(names) * float(generator.uniform(0.7, 1.3))))
        return moved.fitted(ratio) if generator.random() < 0.5 else moved

    def single() -> Draft:
        name = _one(generator, list(start.ranks))
        return start.with_kept(name, min(1.0, start.kept([name]) * float(generator.uniform(0.6, 1.4))))

    def budget() -> Draft:
        return start.fitted(ratio + float(generator.uniform(-0.05, 0.05)))

    return {"jitter": jitter, "slider": slider, "single": single, "budget": budget}


def far_draws(recipe: Recipe, starts: Sequence[Draft], generator: np.random.Generator) -> dict[str, Callable[[], Draft]]:
    """Return large changes: by type, by depth, of one row, of all; flat ones, rules at other ratios."""

    def start() -> Draft:
        return _one(generator, starts)

    def ratio() -> float:
        return float(generator.uniform(0.1, 0.75))

    def flat() -> Draft:
        draft = start()
        return draft.scaled(list(draft.ranks), 1 - ratio())

    def grouped(groups: Callable[[Draft], list[list[str]]]) -> Draft:
        draft = start()
        for names in groups(draft):
            draft = draft.scaled(names, float(generator.uniform(0.12, 1.0)))
        return draft

    def each() -> Draft:
        draft = start()
        for name in draft.ranks:
            draft = draft.with_kept(name, float(generator.uniform(0.1, 1.0)))
        return draft.fitted(ratio())

    def rule() -> Draft:
        return recipe.ruled(_one(generator, ["uniform", "lagrangian", "lagrangian", "energy", "threshold", "svd_llm_v2"]), ratio())

    def alone(groups: Callable[[Draft], list[list[str]]]) -> Draft:
        draft = recipe.ruled("uniform", 0.4)
        chosen = _one(generator, groups(draft))
        dense = {name: None if name not in chosen else rank for name, rank in draft.ranks.items()}
        return replace(draft, ranks=dense).scaled(chosen, float(generator.uniform(0.05, 0.6)))

    def cut() -> Draft:
        draft = start()
        names = _one(generator, [*kinds(draft), *thirds(draft)])
        return draft.scaled(names, float(generator.uniform(0.02, 0.25)))

    def single() -> Draft:
        draft = start()
        return draft.with_kept(_one(generator, list(draft.ranks)), float(generator.uniform(0.0, 0.1)))

    return {
        "flat": flat,
        "by type": lambda: grouped(kinds),
        "by depth": lambda: grouped(thirds),
        "each": each,
        "rule": rule,
        "one type alone": lambda: alone(kinds),
        "one row alone": lambda: alone(lambda draft: [[name] for name in draft.ranks]),
        "cut": cut,
        "one row cut": single,
    }


def _one(generator: np.random.Generator, values: Sequence):  # type: ignore[type-arg, no-untyped-def]
    return values[int(generator.integers(len(values)))]


def draws(recipe: Recipe, best: Ranks, *, near: int, far: int, seed: int) -> list[tuple[str, str, Ranks]]:
    """Return ``near`` and ``far`` many drafts as (near or far, how it was drawn, ranks), no two alike."""
    generator, ratio = np.random.default_rng(seed), recipe.search.compression_ratio
    first = Draft.of(recipe.units, best)
    uniform = recipe.ruled("uniform", ratio)
    made: dict[str, Ranks] = {}
    result: list[tuple[str, str, Ranks]] = []
    for where, count, ways in (
        (NEAR, near, near_draws(recipe, first, ratio, generator)),
        (FAR, far, far_draws(recipe, [first, uniform], generator)),
    ):
        names = list(ways)
        while sum(kind == where for kind, _, _ in result) < count:
            how = names[len(result) % len(names)]
            ranks = dict(ways[how]().ranks)
            key = json.dumps({name: rank for name, rank in ranks.items() if rank is not None}, sort_keys=True)
            if key not in made and key != "{}":
                made[key] = ranks
                result.append((where, how, ranks))
    return result


class Bench:
    """A model ready for trials: factorised once, as the worker of a search has it."""

    def __init__(self, model: str, *, windows: int | None = None, ratio: float = 0.4) -> None:
        from lowrank_core.worker.reporter import Reporter
        from lowrank_core.worker.session import prepare, record_curves, search_bench

        self.config = RunConfig(ModelSource(model), search=search_by(DEFAULT_PRESET, ratio))
        if windows is not None:
            text = replace(self.config.text, calibration_windows=windows, validation_windows=max(2, windows // 8))
            self.config = replace(self.config, text=text, calibration=replace(self.config.calibration, gradient_windows=windows))
        assert self.config.search is not None
        with tempfile.TemporaryDirectory() as folder:
            run = create_run(self.config, path=Path(folder) / "run")
            reporter = Reporter(run, verbose=True)
            session = prepare(run, reporter)
            self.bench = search_bench(session, self.config.search, reporter)
            record_curves(run, self.config.search, self.bench)
            record = load_curves(run.path / "curves.npz")
            reporter.close("finished")
        assert record is not None
        self.record: CurveRecord = record
        self.units: tuple[Unit, ...] = self.bench.space.units

    def recipe(self) -> Recipe:
        assert self.config.search is not None
        return Recipe(self.units, self.config.search, self.record)

    def kl(self, ranks: Ranks) -> float:
        """Return the KL divergence that a trial would measure."""
        from lowrank_core.evaluation import score_windows

        bench = self.bench
        with bench.decomposed.swapped(ranks):
            scores, _ = score_windows(bench.handle, bench.windows, batch_size=bench.batch_size, dense=bench.dense)
        assert scores.kl is not None
        return float(scores.kl.mean())

    def search(self, ratio: float, trials: int, seed: int) -> list[tuple[str, Ranks, float]]:
        """Return (label, ranks, KL) of a search's trials."""
        from lowrank_core.search.study import run_trial, study_in_memory
        from lowrank_core.studies.records import records_of
        from lowrank_core.studies.space import SearchSpace

        assert self.config.search is not None
        config = replace(self.config.search, compression_ratio=ratio, trials=trials, seed=seed)
        space = SearchSpace.of(self.units, config, (), self.bench.space.curves)
        bench, study = replace(self.bench, space=space), study_in_memory(config, space)
        for _ in range(trials):
            run_trial(study, bench, config)
        return [(trial.label, trial.ranks, trial.kl) for trial in records_of(study) if trial.finished and trial.kl is not None]


def _packed(units: Sequence[Unit], ranks: Ranks) -> list[int]:
    return [ranks.get(unit.name) or 0 for unit in units]


def unpacked(units: Sequence[Unit], places: Sequence[int]) -> dict[str, int | None]:
    """Return the ranks of the units in use."""
    return {unit.name: rank for unit, rank in zip(units, places, strict=True) if rank}


def as_trials(units: Sequence[Unit], rows: Sequence[tuple[str, Sequence[int], float]]) -> list[TrialRecord]:
    """Return complete trials of (label, ranks by place, KL)."""
    return [
        TrialRecord(number, "complete", label, kl, {}, unpacked(units, places), None, kl, None, None, None)
        for number, (label, places, kl) in enumerate(rows)
    ]


def measure(bench: Bench, searches: Mapping[str, tuple[float, int]], *, near: int, far: int, seed: int) -> dict[str, object]:
    """Run ``searches`` (name -> ratio, trials), and measure drafts around the best of the first one."""
    result: dict[str, list[tuple[str, list[int], float]]] = {}
    for number, (name, (ratio, trials)) in enumerate(searches.items()):
        result[name] = [(label, _packed(bench.units, ranks), kl) for label, ranks, kl in bench.search(ratio, trials, number)]
        print(f"searched: {name}", file=sys.stderr, flush=True)
    best = min(next(iter(result.values())), key=lambda row: row[2])[1]
    drafts = []
    for where, how, ranks in draws(bench.recipe(), unpacked(bench.units, best), near=near, far=far, seed=seed):
        drafts.append((where, how, _packed(bench.units, ranks), bench.kl(ranks)))
        print(f"{len(drafts)} {where}, {how}: {drafts[-1][-1]:.4g}", file=sys.stderr, flush=True)
    return {"searches": result, "drafts": drafts}


SEARCHES = {"40%, 30 trials": (0.4, 30), "40%, 12 trials": (0.4, 12), "20%, 15 trials": (0.2, 15), "60%, 15 trials": (0.6, 15)}

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measure(Bench("demo"), SEARCHES, near=36, far=72, seed=1)))
