"""The border to lm-eval: finding tasks, getting their data, asking a model. Its types end here."""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowrank_core.config.evaluation import TasksConfig
from lowrank_core.errors import ConfigError, ModelError
from lowrank_core.models import ModelHandle

__all__ = ["Answers", "Harness"]

_HUB_SECONDS = 5.0
_SIMILAR = 5
_HOW_TO_BE_LOCAL = (
    "Give a task whose data are local files: a .yaml file with `dataset_path: json` and `dataset_kwargs: {data_files: {test: FILE}}` "
    "in a folder named with --include-path"
)


@dataclass(frozen=True)
class Answers:
    """Result of lm-eval for one model.

    Attributes:
        results: its mapping of results, samples of single documents included.
        warnings: of lm-eval, each kind once.
    """

    results: dict[str, Any]
    warnings: tuple[str, ...]


class Harness:
    """Tasks that are known, and a model's answers to them."""

    def __init__(self, config: TasksConfig) -> None:
        """Read which tasks there are; those of lm-eval itself, some thousands of files, only where they are needed.

        Raises:
            ConfigError: lm-eval is not installed, or a task is not known.
        """
        try:
            from lm_eval import __version__
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigError(f'tasks need lm-eval, which is not installed ({error}): pip install "lowrank-studio[tasks]".') from error
        self.config = config
        self.version = str(__version__)
        folder = config.include_path
        self._manager: Any = TaskManager(include_path=folder, include_defaults=False) if folder is not None else None
        if self._manager is None or not all(self._matching(name) for name in config.tasks):
            self._manager = TaskManager(include_path=folder)
        self.names = tuple(dict.fromkeys(match for name in config.tasks for match in self._known(name)))

    def _matching(self, name: str) -> list[str]:
        return sorted(self._manager.match_tasks([name]))

    def _known(self, name: str) -> list[str]:
        result = self._matching(name)
        if result:
            return result
        similar = difflib.get_close_matches(name, self._manager.all_tasks, n=_SIMILAR, cutoff=0.4)
        proposed = f"Did you mean {', '.join(similar)}?" if similar else "Its names are listed by `lm-eval ls tasks`."
        raise ConfigError(f"tasks: {name!r} is not known to lm-eval {self.version}. {proposed} Own tasks need --include-path FOLDER.")

    def answers(self, handle: ModelHandle) -> Answers:
        """Ask a model everything.

        Raises:
            ConfigError: a task's data can't be had, or it would run code that a model wrote.
            ModelError: the model can't answer what a task asks.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        loaded = self._loaded()
        self._prepare(loaded["tasks"].values())
        devices = [handle.device] if handle.device.type == "cuda" else []
        with _listening() as reported, torch.random.fork_rng(devices):
            torch.manual_seed(self.config.seed)
            # The tokenizer is copied: it may be given a padding token.
            model = HFLM(
                pretrained=handle.module,
                tokenizer=copy.deepcopy(handle.tokenizer),
                max_length=handle.max_context,
                batch_size=self.config.batch_size,
            )
            reported.clear()  # it warns about models that are not loaded by name
            try:
                results = evaluate(model, task_dict=loaded, limit=self.config.limit)
            except (ValueError, RuntimeError, KeyError, TypeError, AssertionError) as error:
                raise ModelError(
                    f"tasks: {handle.reference} could not be asked ({type(error).__name__}: {_first_line(error)}). "
                    "Lower --batch-size or --few-shot, or leave the task out."
                ) from error
        return Answers(dict(results), _by_kind(reported))

    def _prepare(self, tasks: Any) -> None:
        for task in tasks:
            if getattr(task, "UNSAFE_CODE", False):
                raise ConfigError(f"tasks: {task.task_name} runs code that the model writes, which is not done here. Leave it out.")
            usual = task.get_config("num_fewshot")
            if usual is None or (self.config.few_shot is not None and usual != 0):  # as lm-eval: a task that says 0 means it
                task.set_config(key="num_fewshot", value=self.config.few_shot or 0)
            task.set_fewshot_seed(seed=self.config.seed)

    def _loaded(self) -> Any:
        """Return the tasks with their data: from files and caches, and only if these have them not, from the hub."""
        import datasets

        datasets.disable_progress_bars()
        try:
            with _offline():
                return self._manager.load(list(self.names))
        except Exception as error:
            if not _hub_answers():
                raise self._unloaded(error) from error
        try:
            return self._manager.load(list(self.names))
        except Exception as error:  # the library raises its own, the hub's, the connection's, pyarrow's, yaml's and jinja's errors
            raise self._unloaded(error) from error

    def _unloaded(self, error: Exception) -> ConfigError:
        names = ", ".join(self.names[:3]) + (" …" if len(self.names) > 3 else "")
        if isinstance(error, ConnectionError):
            missing = re.sub(r" \(\w+\)$", "", _first_line(error))  # our being offline, in the library's words
            return ConfigError(f"tasks: the data of {names} are on the hub, which is out of reach ({missing}). {_HOW_TO_BE_LOCAL}.")
        return ConfigError(
            f"tasks: the data of {names} can't be loaded ({type(error).__name__}: {_first_line(error)}). "
            "Check the task's .yaml file; paths in data_files start from the working directory."
        )


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let the hub's libraries take what they have: they would try for half a minute where there is no connection."""
    import datasets.config
    import huggingface_hub.constants

    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


def _hub_answers() -> bool:
    """Ask once, shortly."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception:  # the errors of name resolution, proxies, certificates and time-outs have no common base
        return False
    return True


class _Told(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """Collect what lm-eval warns of, instead of printing it."""
    logger, reported = logging.getLogger("lm_eval"), list[str]()
    handler, passed_on = _Told(reported), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield reported
    finally:
        logger.removeHandler(handler)
        logger.propagate = passed_on


def _by_kind(messages: Sequence[str]) -> tuple[str, ...]:
    """Return the first of all messages that differ in numbers alone, with how many there were."""
    kinds = [re.sub(r"\d+", "0", message) for message in messages]
    firsts: dict[str, str] = {}
    for kind, message in zip(kinds, messages, strict=True):
        firsts.setdefault(kind, " ".join(message.split()))
    counts = Counter(kinds)
    return tuple(first if counts[kind] == 1 else f"{first} ({counts[kind]} like this)" for kind, first in firsts.items())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200].rstrip(" .:")
