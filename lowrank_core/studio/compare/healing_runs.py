"""Healings of a run: settings, validation curve, result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lowrank_core.allocation import ALLOCATORS, with_current_names
from lowrank_core.config import SearchConfig
from lowrank_core.config.healing import HEALER_LABELS, HealingConfig
from lowrank_core.config.mapping import build
from lowrank_core.runs import Run, read_json
from lowrank_core.runs.healing_records import HealingPoint, HealingReport, read_history, read_report
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studio.shared.formatting import number, percent
from lowrank_core.studio.shared.trial_names import model_name

__all__ = ["Healing", "curve_table", "healings", "trial_of"]

_ENDS = {
    "steps": "All steps were taken",
    "patience": "Validation stopped improving",
    "diverged": "A loss was not finite, and training stopped there",
}


@dataclass(frozen=True)
class Healing:
    """One healing.

    Attributes:
        folder: its name under the run's ``healed``; label: of the healed model, as its measurement is called.
        allocation: what was healed, ``trial N`` or an allocator's name.
        settings: how it is trained.
        history: validations so far; report: None until it is done.
        changed: when its files last changed, seconds since the epoch.
    """

    folder: str
    label: str
    allocation: str
    settings: HealingConfig
    history: tuple[HealingPoint, ...]
    report: HealingReport | None
    changed: float

    @property
    def name(self) -> str:
        return f"{model_name(self.label)} ({self.folder[-4:]})"

    @property
    def method(self) -> str:
        """Label of the method."""
        return HEALER_LABELS[self.settings.method]

    @property
    def words(self) -> str:
        """Training and result, or progress, in sentences."""
        report = self.report
        if report is None:
            done = self.history[-1].step if self.history else 0
            return f"{self.name}: {self.method}, not done; validated up to step {done:,} of {self.steps:,}. Start it again to resume."
        return (
            f"{self.name}: {report.label}, {report.steps:,} steps on {report.tokens:,} tokens in {report.seconds:,.0f} s, largest rate "
            f"{number(report.learning_rate, 2)}, {report.trained_parameters:,} numbers trained. KL on validation text "
            f"{number(report.kl_before)} before, {number(report.kl_after)} after ({percent(report.recovered)} of it gone). "
            f"{_ends_in_words(report)}"
        )

    @property
    def steps(self) -> int:
        """Maximum number of steps."""
        return self.settings.steps


def healings(run: Run) -> list[Healing]:
    """Return the healings of a run, the most recently changed first.

    Raises:
        RunError, ConfigError: a file is damaged, or holds settings that there are not.
    """
    result = []
    root = run.path / "healed"
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        body = read_json(folder / "request.json")
        if body is None:
            continue
        body = with_current_names(body)
        settings = body.get("healing")
        history = read_history(folder)
        paths = [path for name in ("history.json", "report.json", "request.json") if (path := folder / name).exists()]
        result.append(
            Healing(
                folder=folder.name,
                label=str(body.get("label")),
                allocation=str(body.get("allocation")),
                settings=build(HealingConfig, settings if isinstance(settings, Mapping) else {}, f"{folder.name}/request.json"),
                history=history,
                report=read_report(folder),
                changed=max(path.stat().st_mtime for path in paths),
            )
        )
    return sorted(result, key=lambda healing: healing.changed, reverse=True)


def trial_of(healing: Healing, trials: Sequence[TrialRecord], search: SearchConfig) -> int | None:
    """Return the number of the healed trial; None for a rule that no trial of this search used."""
    single = search.max_ratio is None  # else a rule has a trial at each of several ratios
    complete = [trial for trial in trials if trial.state == "complete"]
    names = {f"trial {trial.number}": trial.number for trial in complete}
    rules = {trial.label: trial.number for trial in complete if trial.label in ALLOCATORS} if single else {}
    return names.get(healing.allocation, rules.get(healing.allocation))


def curve_table(history: Sequence[HealingPoint]) -> pd.DataFrame:
    """Return a row for each validation: step, loss, kl and nll (nats per token), perplexity, learning_rate, tokens, seconds, kept."""
    columns = ["step", "loss", "kl", "nll", "learning_rate", "tokens", "seconds", "kept"]
    table = pd.DataFrame([[getattr(point, name) for name in columns] for point in history], columns=columns)
    table.insert(4, "perplexity", np.exp(table["nll"].astype(float)))
    return table


def _ends_in_words(report: HealingReport) -> str:
    """Return the end of a healing in words."""
    kept = f"the state after step {report.best_step} was kept" if report.best_step else "nothing was better than the start, which was kept"
    return f"{_ENDS[report.stopped]}; {kept}."
