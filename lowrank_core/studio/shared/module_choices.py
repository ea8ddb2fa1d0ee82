"""Facts of a run's modules beyond spectra: the chosen trial's ranks and measured losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lowrank_core.config import SearchConfig
from lowrank_core.parameters import Unit
from lowrank_core.runs import Run
from lowrank_core.studies.records import TrialRecord, best_trial, read_trials
from lowrank_core.studio.sensitivity.sensitivity_table import fullest, measured_costs
from lowrank_core.studio.shared.allocation_map import allocation_map, allocation_of
from lowrank_core.studio.shared.model_facts import model_facts
from lowrank_core.studio.shared.trial_names import trial_label

__all__ = ["Choice", "RunFacts", "chosen_trial", "facts_of_trial", "run_facts"]


@dataclass(frozen=True)
class Choice:
    """Rank of one module in the chosen trial.

    Attributes:
        kept: fraction of its parameters, that of its stack where it shares a rank.
        rank: of its compressed weight; None where it stays dense.
        words: the same for a reader.
    """

    kept: float
    rank: int | None
    words: str


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run's modules by name; empty if unknown.

    Attributes:
        trial: name of the chosen trial.
        choices: what it decided.
        costs: measured KL to the dense model (nats per token) of modules that alone keep a ratio, by that ratio.
        kept: which of these ratios is shown; None where nothing was measured.
    """

    trial: str = ""
    choices: Mapping[str, Choice] = field(default_factory=dict)
    costs: Mapping[float, Mapping[str, float]] = field(default_factory=dict)
    kept: float | None = None


def run_facts(run: Run, picked: int | None) -> RunFacts:
    """Return the facts of the modules of ``run`` beyond spectra: of the trial ``picked``, else of the best one.

    Raises:
        RunError: a file of the run is damaged.
    """
    costs, search, model = measured_costs(run), run.config.search, model_facts(run)
    trial = chosen_trial(read_trials(run), search, picked) if search is not None and model is not None else None
    if search is None or model is None or trial is None:
        return RunFacts(costs=costs, kept=fullest(costs))
    units = model.units(search.compression)
    return replace(facts_of_trial(trial, units), costs=costs, kept=fullest(costs))


def chosen_trial(trials: Sequence[TrialRecord], search: SearchConfig | None, number: int | None) -> TrialRecord | None:
    """Return trial ``number``, else the best one (none over a range of ratios), if it has ranks."""
    picked = next((trial for trial in trials if trial.number == number and trial.ranks), None)
    single = search is not None and search.max_ratio is None
    return picked or (best_trial(trials) if single else None)


def facts_of_trial(trial: TrialRecord, units: Sequence[Unit]) -> RunFacts:
    """Return the choice of ``trial`` for every matrix of ``units``.

    Raises:
        ConfigError: its ranks do not fit ``units``.
    """
    allocation = allocation_of(trial, units)
    known = {unit.name: unit for unit in units}
    ranks = {
        member.name: known[name].rank_of(member, rank)
        for name, rank in allocation.ranks.items()
        if rank is not None
        for member in known[name].members
    }
    frame = allocation_map(allocation, units).frame
    cells = zip(frame["module"], frame["value"], frame["label"], strict=True)
    return RunFacts(trial_label(trial), {str(name): Choice(float(kept), ranks.get(name), str(words)) for name, kept, words in cells})
