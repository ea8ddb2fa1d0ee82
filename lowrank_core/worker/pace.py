"""Remaining time: of a stage, from the steps of this session; of all that follow it, from an estimate."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from time import monotonic, perf_counter, process_time, strftime

from lowrank_core.runs.stage_times import TimeEstimate
from lowrank_core.wording import duration

__all__ = ["FinishedStage", "LogLines", "Pace", "StageClock"]

LOG_SECONDS = 30.0
"""From one line of a log to the next."""


class Pace:
    """Timer of a stage's steps, from the first reported one.

    What was done before it (blocks, steps or cells that an earlier session left) cost this session nothing, and the first step's own
    time is not known where some of it was. So there is no estimate before the second step. A stage that counts again (fewer steps, or
    another total) is timed again; so is one that has not moved since its first report: it waited for something else.
    """

    def __init__(self) -> None:
        self._first = self._total = -1
        self._last = -1
        self._began = 0.0

    def remaining(self, done: int, total: int) -> float | None:
        """Return the seconds until ``total`` steps are done; None before this session's first step."""
        now = perf_counter()
        if total != self._total or done < self._last or done == self._first:
            self._first, self._total, self._began = done, total, now
        self._last = done
        if done == self._first:
            return None
        return (now - self._began) / (done - self._first) * max(0, total - done)


@dataclass(frozen=True)
class FinishedStage:
    """Seconds of a stage, and those of all its threads on a processor; ``whole`` unless an earlier session did a part of it."""

    name: str
    seconds: float
    cpu_seconds: float
    whole: bool


class StageClock:
    """Timer of stages, one after the other.

    Attributes:
        plan: the stages that there will be, with what is known of their seconds.
        done, total: steps of the current stage; total 0 where it has told none.
        steps_left: seconds until the stage ends, by its steps; None before the second.
        finished: the stages so far.
    """

    steps_left: float | None

    def __init__(self) -> None:
        self.plan = TimeEstimate()
        self.finished: list[FinishedStage] = []
        self.begin("")

    def begin(self, name: str, total: int = 0) -> None:
        """Time another stage from now on."""
        self._name, self.done, self.total = name, 0, total
        self._pace, self._first, self.steps_left = Pace(), -1, None
        self._began, self._cpu = perf_counter(), process_time()

    def step(self, done: int, total: int, left: float | None = None) -> None:
        """Take ``done`` of ``total`` steps as finished; ``left`` are the seconds of the others, where the caller knows better."""
        self._first = done if self._first < 0 else self._first
        timed = self._pace.remaining(done, total)
        self.done, self.total, self.steps_left = done, total, timed if left is None else left

    def end(self) -> FinishedStage:
        """Return what the stage took; one that reports steps was whole if it began with the first and ended with the last."""
        whole = self._first <= 1 and self.done == self.total if self._first >= 0 else self.total == 0
        result = FinishedStage(self._name, perf_counter() - self._began, process_time() - self._cpu, whole)
        self.finished.append(result)
        return result

    @property
    def number(self) -> int:
        """Place of the stage in the plan, from 1 on; 0 where it is not in it."""
        return self.plan.number(self._name)

    @property
    def left(self) -> float | None:
        """Seconds until the stage ends: by its steps, else by the plan; None where neither tells."""
        planned = self.plan.seconds(self._name)
        if self.steps_left is not None or planned is None:
            return self.steps_left
        return max(0.0, planned - (perf_counter() - self._began))

    @property
    def all_left(self) -> float | None:
        """Seconds until the last stage of the plan ends; None where one of them is not known."""
        own, after = self.left, self.plan.after(self._name)
        return None if own is None or after is None else own + after

    @property
    def words(self) -> str:
        """The stage, its steps and what is left, in a line."""
        words = [f"{self._name} {self.done}/{self.total}" if self.total else self._name]
        if self.number:
            words.append(f"stage {self.number} of {len(self.plan.stages)}")
        words += [f"about {duration(left)} left{of}" for left, of in ((self.left, ""), (self.all_left, " in all")) if left is not None]
        return ", ".join(words)


class LogLines:
    """Lines of a log, one every half minute; none on a terminal, where progress is shown in place."""

    def __init__(self, clock: StageClock) -> None:
        self._clock, self._printed = clock, monotonic()

    def tick(self) -> None:
        """Print the line that is due, if one is."""
        if not sys.stderr.isatty() and monotonic() - self._printed >= LOG_SECONDS:
            self._printed = monotonic()
            print(f"{strftime('%H:%M:%S')} {self._clock.words}", file=sys.stderr, flush=True)
