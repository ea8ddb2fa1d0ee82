"""Facts of the current run's modules beyond spectra."""

from __future__ import annotations

from dataclasses import replace

from lowrank_core.runs import Run
from lowrank_core.studies.records import read_trials
from lowrank_core.studio.sensitivity.sensitivity_table import fullest, measured_costs
from lowrank_core.studio.shared.allocation_map import search_units
from lowrank_core.studio.shared.model_facts import model_facts
from lowrank_core.studio.shared.module_choices import RunFacts, chosen_trial, facts_of_trial
from pages.components import state

__all__ = ["run_facts"]


def run_facts(run: Run) -> RunFacts:
    """Return the facts of the modules of ``run`` beyond spectra.

    Raises:
        RunError: a file of the run is damaged.
    """
    costs = measured_costs(run)
    return replace(_decided(run), costs=costs, kept=fullest(costs))


def _decided(run: Run) -> RunFacts:
    """Return the ranks of the selected trial, else of the best one."""
    search, model = run.config.search, model_facts(run)
    if search is None or model is None:
        return RunFacts()
    trial = chosen_trial(read_trials(run), search, state.selection().trial)
    return RunFacts() if trial is None else facts_of_trial(trial, search_units(model.matrices, search.compression, model.head_units))
