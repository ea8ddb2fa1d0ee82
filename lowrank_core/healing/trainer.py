"""The training loop that all ways to heal share: a warm-up and a cosine, validation, checkpoints, the best state kept."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank_core.config.healing import HealingConfig
from lowrank_core.errors import ConfigError, NumericalError
from lowrank_core.evaluation import DenseReference, score_windows
from lowrank_core.healing.base import Healer, Student, compressed_layers
from lowrank_core.healing.checkpoints import Checkpoint, load_checkpoint, remove_checkpoint, save_checkpoint
from lowrank_core.healing.healers import HEALERS
from lowrank_core.healing.optimizers import packed_state, settle, unpacked_state
from lowrank_core.healing.rates import measured_rate
from lowrank_core.models.handle import ModelHandle
from lowrank_core.runs.healing_records import HealingPoint, HealingReport, write_history
from lowrank_core.text import WindowSet
from lowrank_core.types import Progress

__all__ = ["Healed", "heal"]

_LARGEST_GRADIENT = 1.0
"""Norm to which a step's gradient is cut."""


@dataclass(frozen=True)
class Healed:
    """The model after training, of the size that it had, and what happened; the handle is the given one if nothing was better."""

    handle: ModelHandle
    report: HealingReport


def heal(
    compressed: ModelHandle,
    dense: ModelHandle,
    texts: tuple[WindowSet, WindowSet],
    config: HealingConfig,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Healed:
    """Train ``compressed`` towards ``dense``; neither is changed.

    Args:
        texts: windows to train on, and windows to validate on; test windows are no business of this.
        folder: of checkpoints and the live history: a healing that was killed goes on from there when it is called again.
        progress: is called after each step; what it raises ends the training, which can go on later.

    Raises:
        ConfigError: nothing can be trained so.
        ModelError: the two models do not share a vocabulary.
        NumericalError: the validation before the first step is not finite.
        RunError: the folder holds another healing, or can't be written.
    """
    training, validation = texts
    _check(compressed, dense, training, validation)
    healer = HEALERS[config.method]
    course = _Course(healer, compressed, dense, texts, config, folder)
    course.begin()
    while course.stopped is None:
        course.step()
        if progress is not None:
            progress(course.taken, config.steps)
    healed = course.finish()
    if folder is not None:
        remove_checkpoint(folder)
    return healed


def _check(compressed: ModelHandle, dense: ModelHandle, training: WindowSet, validation: WindowSet) -> None:
    compressed.check_vocabulary(dense)
    if training.sha256 == validation.sha256:
        raise ConfigError("a model can't be healed on the windows that it is validated on. Give windows of two splits.")
    for windows in (training, validation):
        compressed.check_tokens(windows.ids)


class _Course:
    """One training from its first step to its last."""

    def __init__(
        self,
        healer: Healer,
        compressed: ModelHandle,
        dense: ModelHandle,
        texts: tuple[WindowSet, WindowSet],
        config: HealingConfig,
        folder: Path | None,
    ) -> None:
        self._healer, self._compressed, self._dense, self._config, self._folder = healer, compressed, dense, config, folder
        self._training, self._validation = texts
        self._student = _student(healer, compressed, config)
        self._optimizer = healer.optimizer(list(self._student.trained.values()))
        self._losses: list[float] = []
        self._history: list[HealingPoint] = []
        self._best: dict[str, Tensor] = {}
        self._best_step = 0
        self.taken = 0
        self.stopped: str | None = None

    def begin(self) -> None:
        """Validate before the first step, or go on from a checkpoint."""
        self._reference = DenseReference.compute(self._dense, self._validation, batch_size=self._config.batch_size)
        self._identity = self._identified() if self._folder is not None else ""
        result = None if self._folder is None else load_checkpoint(self._folder, self._identity, self._compressed.device)
        if result is None:
            self._rate = self._config.learning_rate or self._measured_rate()
            kl, nll = self._validated(self._compressed)
            self._note(HealingPoint(0, None, kl, nll, 0.0, 0, 0.0, kept=True))
        else:
            self._restore(result)
        self._began = time.perf_counter() - self._history[-1].seconds

    def step(self) -> None:
        """Take one step of the optimiser; validate where one is due."""
        config = self._config
        self.taken += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * config.rate_at(self.taken)
        ids = self._training.ids[self._batch(self.taken)].to(self._compressed.device)
        with torch.enable_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
            loss = self._healer.loss(self._student.module, self._dense.module, ids, config)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(list(self._student.trained.values()), _LARGEST_GRADIENT)
        if not math.isfinite(float(loss.detach())) or not math.isfinite(float(norm)):
            self.stopped = "diverged"
            return
        self._optimizer.step()
        self._losses.append(float(loss.detach()))
        if self.taken % config.validate_every == 0 or self.taken == config.steps:
            self._look()

    def _measured_rate(self) -> float:
        return self._healer.caution * measured_rate(self._student.trained, self._divergence, self._config.seed)

    def _divergence(self) -> float:
        """Measure the KL divergence on validation windows; infinite where the model diverges."""
        try:
            return self._validated(replace(self._compressed, module=self._student.module))[0]
        except NumericalError:
            return math.inf

    def _batch(self, step: int) -> Tensor:
        """Return the numbers of the windows of a step: every epoch has an order of its own, from the seed."""
        size, windows = min(self._config.batch_size, self._training.windows), self._training.windows
        epoch, place = divmod((step - 1) * size, windows - windows % size)
        generator = torch.Generator().manual_seed(self._config.seed * 1_000_003 + epoch)
        return torch.randperm(windows, generator=generator)[place : place + size]

    def _look(self) -> None:
        """Validate, keep the state if it is the best, and leave a checkpoint."""
        try:
            kl, nll = self._validated(replace(self._compressed, module=self._student.module))
        except NumericalError:
            self.stopped = "diverged"
            return
        kept = self._better(kl, nll)
        if kept:
            self._best_step = self.taken
            self._best = {name: value.detach().clone() for name, value in self._student.trained.items()}
        tokens = self.taken * min(self._config.batch_size, self._training.windows) * self._training.context
        rate = self._rate * self._config.rate_at(self.taken)
        loss, self._losses = sum(self._losses) / len(self._losses), []
        self._note(HealingPoint(self.taken, loss, kl, nll, rate, tokens, time.perf_counter() - self._began, kept=kept))
        self.stopped = self._end()
        settle(self._optimizer)
        self._save()

    def _end(self) -> str | None:
        """Return why training is over; None while it is not."""
        if self.taken >= self._config.steps:
            return "steps"
        waited = sum(point.step > self._best_step for point in self._history)
        return "patience" if waited >= self._config.patience else None

    def _better(self, kl: float, nll: float) -> bool:
        """Whether these losses are the best so far by the criterion."""
        best = next(point for point in self._history if point.step == self._best_step)
        return self._config.figure(kl, nll) < self._config.figure(best.kl, best.nll)

    def _note(self, point: HealingPoint) -> None:
        self._history.append(point)
        if self._folder is not None:
            write_history(self._folder, tuple(self._history))

    def _validated(self, handle: ModelHandle) -> tuple[float, float]:
        scores, _ = score_windows(handle, self._validation, batch_size=self._config.batch_size, dense=self._reference)
        assert scores.kl is not None
        return float(scores.kl.mean()), float(scores.nll.mean())

    def finish(self) -> Healed:
        """Return the best state, folded into the factors; the given model where nothing was better than it."""
        start = self._history[0]
        healed, kl, nll = self._compressed, start.kl, start.nll
        if self._best_step:
            folded = self._folded()
            kl, nll = self._validated(folded)
            if self._config.figure(kl, nll) <= self._config.figure(start.kl, start.nll):
                healed = folded
            else:  # rounding in the model's own dtype ate what training had won
                self._best_step, kl, nll = 0, start.kl, start.nll
        last = self._history[-1]
        report = HealingReport(
            method=self._healer.name,
            label=self._healer.label,
            learning_rate=self._rate,
            steps=self.taken,
            best_step=self._best_step,
            stopped=self.stopped or "steps",
            trained_parameters=sum(value.numel() for value in self._student.trained.values()),
            tokens=last.tokens,
            seconds=last.seconds,
            kl_before=start.kl,
            kl_after=kl,
            nll_before=start.nll,
            nll_after=nll,
            training=self._training.protocol,
            validation=self._validation.protocol,
            history=tuple(self._history),
        )
        return Healed(healed, report)

    def _folded(self) -> ModelHandle:
        with torch.no_grad():
            for name, value in self._student.trained.items():
                value.copy_(self._best[name])
        module = self._student.fold().to(self._compressed.module.dtype)  # type: ignore[arg-type]
        module.requires_grad_(False)
        return replace(self._compressed, module=module.eval())

    def _save(self) -> None:
        if self._folder is None:
            return
        tensors, words = packed_state(self._optimizer)
        checkpoint = Checkpoint(
            identity=self._identity,
            rate=self._rate,
            step=self.taken,
            best_step=self._best_step,
            history=tuple(asdict(point) for point in self._history),
            values={name: value.detach() for name, value in self._student.trained.items()},
            best=self._best,
            moments=tensors,
            optimizer=words,
        )
        save_checkpoint(self._folder, checkpoint)

    def _restore(self, result: Checkpoint) -> None:
        self._rate = result.rate
        self.taken, self._best_step, self._best = result.step, result.best_step, dict(result.best)
        self._history = [HealingPoint(**point) for point in result.history]  # type: ignore[arg-type]
        with torch.no_grad():
            for name, value in self._student.trained.items():
                value.copy_(result.values[name])
        self._optimizer.load_state_dict(unpacked_state(result.moments, result.optimizer))  # type: ignore[arg-type]
        self.stopped = self._end()

    def _identified(self) -> str:
        """Hash everything that two parts of one healing must share."""
        parts = [self._compressed.fingerprint, self._dense.fingerprint, self._training.sha256, self._validation.sha256]
        return hashlib.sha256(json.dumps([*parts, asdict(self._config)], sort_keys=True).encode()).hexdigest()


def _student(healer: Healer, compressed: ModelHandle, config: HealingConfig) -> Student:
    """Return a copy of the model to be trained, in float32: the steps of a training are smaller than what bfloat16 tells apart."""
    compressed_layers(compressed.module)  # what can't be healed is reported before it is copied
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        module = copy.deepcopy(compressed.module)
        nn.Module.float(module)  # transformers' own refuses for every format that is registered as a quantisation
        return healer.student(module, config)
