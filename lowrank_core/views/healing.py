"""Healings of a run: settings, the curve so far, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lowrank_core.healing.config import HEALER_LABELS
from lowrank_core.healing.records import HealingPoint, HealingReport, read_history, read_report
from lowrank_core.runs import Run, read_json

__all__ = ["Healing", "curve_table", "ends_in_words", "healings"]

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
        method: in words; steps: at most.
        history: validations so far; report: None until it is done.
        changed: when its files last changed, seconds since the epoch.
    """

    folder: str
    label: str
    method: str
    steps: int
    history: tuple[HealingPoint, ...]
    report: HealingReport | None
    changed: float

    @property
    def name(self) -> str:
        return f"{self.label} ({self.folder[-4:]})"


def healings(run: Run) -> list[Healing]:
    """Return the healings of a run, the one that changed last first.

    Raises:
        RunError: a file is damaged.
    """
    found = []
    root = run.path / "healed"
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        body = read_json(folder / "request.json")
        if body is None:
            continue
        settings = body.get("healing", {})
        history = read_history(folder)
        paths = [path for name in ("history.json", "report.json", "request.json") if (path := folder / name).exists()]
        found.append(
            Healing(
                folder=folder.name,
                label=str(body.get("label")),
                method=HEALER_LABELS.get(str(settings.get("method")), str(settings.get("method"))),
                steps=int(settings.get("steps", 0)),
                history=history,
                report=read_report(folder),
                changed=max(path.stat().st_mtime for path in paths),
            )
        )
    return sorted(found, key=lambda healing: healing.changed, reverse=True)


def curve_table(history: Sequence[HealingPoint]) -> pd.DataFrame:
    """Return a row for each validation: step, loss, kl and nll (nats per token), perplexity, learning_rate, tokens, seconds, kept."""
    columns = ["step", "loss", "kl", "nll", "learning_rate", "tokens", "seconds", "kept"]
    table = pd.DataFrame([[getattr(point, name) for name in columns] for point in history], columns=columns)
    table.insert(4, "perplexity", np.exp(table["nll"].astype(float)))
    return table


def ends_in_words(report: HealingReport) -> str:
    """Return how a healing ended, in a sentence or two."""
    kept = f"the state after step {report.best_step} was kept" if report.best_step else "nothing was better than the start, which was kept"
    return f"{_ENDS[report.stopped]}; {kept}."
