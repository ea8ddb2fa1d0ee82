"""Records of a healing, written by the trainer and read by pages. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowrank_core.config.mapping import build, to_mapping
from lowrank_core.runs import read_json, write_json

__all__ = ["HealingPoint", "HealingReport", "read_history", "read_report", "write_history", "write_report"]

_HISTORY = "history.json"
_REPORT = "report.json"
_ADVICE = "Delete the folder, and heal again."


@dataclass(frozen=True)
class HealingPoint:
    """One validation.

    Attributes:
        step: of the optimiser; 0 is before the first.
        loss: mean training loss since the point before, in nats (relative error for block-wise refinement); None at step 0.
        kl, nll: on validation windows, per token, in nats.
        learning_rate: of the last step.
        tokens, seconds: trained on so far, pauses between sessions left out.
        kept: whether it was the best until then.
    """

    step: int
    loss: float | None
    kl: float
    nll: float
    learning_rate: float
    tokens: int
    seconds: float
    kept: bool


@dataclass(frozen=True)
class HealingReport:
    """Result of a healing; values at the start are those of one-shot compression, all on validation windows.

    Attributes:
        method, label, learning_rate: with what.
        steps: that were taken; best_step: the one that was kept, 0 where nothing was better than the start.
        stopped: ``steps`` (all were taken), ``patience`` (no better validation for so long) or ``diverged`` (a loss was not finite).
        trained_parameters: that the optimiser changed; the size of the model is as before.
        tokens, seconds: spent in training, up to the last step taken.
        kl_before, kl_after, nll_before, nll_after: nats per token; ``after`` is measured on what is returned.
        training, validation: protocol lines.
        history: one point for each validation.
    """

    method: str
    label: str
    learning_rate: float
    steps: int
    best_step: int
    stopped: str
    trained_parameters: int
    tokens: int
    seconds: float
    kl_before: float
    kl_after: float
    nll_before: float
    nll_after: float
    training: str
    validation: str
    history: tuple[HealingPoint, ...]

    @property
    def recovered(self) -> float:
        """Recovered fraction of the validation KL divergence."""
        return 1 - self.kl_after / self.kl_before if self.kl_before > 0 else 0.0

    @property
    def summary(self) -> dict[str, object]:
        """The report without its history, ready for JSON."""
        return {name: value for name, value in to_mapping(self).items() if name != "history"}


@dataclass(frozen=True)
class _History:
    points: tuple[HealingPoint, ...]


def write_history(folder: Path, points: tuple[HealingPoint, ...]) -> None:
    write_json(folder / _HISTORY, to_mapping(_History(points)))


def read_history(folder: Path) -> tuple[HealingPoint, ...]:
    """Return the points so far; empty before training starts.

    Raises:
        RunError: the file is damaged.
    """
    body = read_json(folder / _HISTORY)
    return () if body is None else build(_History, body, str(folder / _HISTORY), _ADVICE).points


def write_report(folder: Path, report: HealingReport) -> None:
    write_json(folder / _REPORT, to_mapping(report))


def read_report(folder: Path) -> HealingReport | None:
    """Return the report of a finished healing; None before.

    Raises:
        RunError: the file is damaged.
    """
    body = read_json(folder / _REPORT)
    return None if body is None else build(HealingReport, body, str(folder / _REPORT), _ADVICE)
