"""Handlers that measure models: test text, second text, single tokens, time and memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

from lowrank_core.compression.build import CompressedModel
from lowrank_core.config import ModelSource, from_mapping
from lowrank_core.errors import ConfigError
from lowrank_core.evaluation import evaluate
from lowrank_core.evaluation.generation import continue_prompt
from lowrank_core.evaluation.texts import losses_of, tokens_of_text
from lowrank_core.export import export
from lowrank_core.runs.client import TEMPERATURE, results_of
from lowrank_core.speed import SpeedConfig, compare_speed
from lowrank_core.studies.model_ref import ModelRef
from lowrank_core.text import WindowSet, load_windows
from lowrank_core.worker.context import WorkerContext
from lowrank_core.worker.models import BuiltModel, built_model

__all__ = ["KINDS"]

Answer = dict[str, object]

_DECIMALS = 6
_MAX_TOKENS = 512
"""Of a text that is shown token by token."""


def _compare(worker: WorkerContext, arguments: Mapping[str, object]) -> Answer:
    """Measure a model on the run's test text, next to the dense model on the same windows."""
    return _measured(worker, arguments, worker.session.windows.test, "test text")


def _other_text(worker: WorkerContext, arguments: Mapping[str, object]) -> Answer:
    """Measure a model on the test split of another text, next to the dense model on the same windows."""
    reference, config = str(arguments.get("text") or ""), worker.run.config.text
    if not reference:
        raise ConfigError("no second text is given. Name one, such as file:notes.txt.")
    with worker.reporter.stage(f"Reading {reference}"):
        other = replace(config, reference=reference)
        windows = load_windows(other, worker.session.handle.tokenizer, "test", count=config.test_windows)
    _check_unchanged(worker, reference, windows)
    return {"text": reference, "sha256": windows.sha256, **_measured(worker, arguments, windows, windows.dataset)}


def _check_unchanged(worker: WorkerContext, reference: str, windows: WindowSet) -> None:
    """Raise unless earlier results on this text used the same tokens; older results do not record them."""
    known = {body.get("sha256") for body in results_of(worker.run, "other_text") if body.get("text") == reference}
    if known - {None, windows.sha256}:
        raise ConfigError(
            f"{reference} has changed since models of this run were measured on it: its test split has other tokens. "
            "Put the old text back, or give the new one under another name."
        )


def _measured(worker: WorkerContext, arguments: Mapping[str, object], windows: WindowSet, where: str) -> Answer:
    bench, _, _ = worker.search
    model = built_model(worker, ModelRef.parse(arguments.get("trial")))
    with worker.reporter.stage(f"Measuring {model.label} on {where}", windows.windows) as progress:
        report = evaluate(model.handle, windows, against=worker.session.handle, batch_size=bench.batch_size, progress=progress)
    if model.of_search and windows is worker.session.windows.test:
        worker.evaluations.keep(model.ranks, report)
    return {
        "trial": arguments.get("trial"),
        "label": model.label,
        "ranks": dict(model.ranks),
        "report": _rounded(report.to_mapping()) | _flops(model),
    }


def _rounded(report: Mapping[str, object]) -> dict[str, object]:
    """Return the report with windows and positions at six decimals, to keep results small."""
    result = dict(report)
    for name in ("window_nll", "dense_window_nll"):
        values = result.get(name)
        if isinstance(values, list | tuple):
            result[name] = [round(float(value), _DECIMALS) for value in values]
    rows = result.get("by_position")
    if isinstance(rows, list):
        result["by_position"] = [
            {name: round(value, _DECIMALS) if isinstance(value, float) else value for name, value in row.items()} for row in rows
        ]
    return result


def _flops(model: BuiltModel) -> dict[str, object]:
    report = model.report
    return {} if report is None else {"flops": report.model_flops_after, "dense_flops": report.model_flops_before}


def _tokens(worker: WorkerContext, arguments: Mapping[str, object]) -> Answer:
    """Compare both models token by token, on a given text or a test window."""
    session, given, window = worker.session, arguments.get("text"), arguments.get("window")
    test = session.windows.test
    left_out, source = 0, "the text that was given"
    if given is not None:
        maximum = min(session.handle.max_context or _MAX_TOKENS, _MAX_TOKENS)
        ids, left_out = tokens_of_text(session.handle, str(given), bos=test.bos, maximum=maximum)
    elif type(window) is int and 0 <= window < test.windows:
        source = f"{test.dataset}, {test.split} split, window {window}"
        ids = test.ids[window][:_MAX_TOKENS]
        left_out = test.context - len(ids)
    else:
        raise ConfigError(f"window must be a number from 0 to {test.windows - 1}; got {window!r}. Or give a text.")
    model = built_model(worker, ModelRef.parse(arguments.get("trial")))
    with worker.reporter.stage(f"Reading a text with {model.label}"):
        result = losses_of(model.handle, session.handle, ids)
    protocol = f"{source}: {len(result.nll)} tokens predicted, {'BOS first' if test.bos else 'no BOS'}"
    return {
        "trial": arguments.get("trial"),
        "label": model.label,
        "window": window if given is None else None,
        "left_out": left_out,
        "protocol": protocol + (f", {left_out} more tokens left out" if left_out else ""),
        **asdict(result),
    }


def _generate(worker: WorkerContext, arguments: Mapping[str, object]) -> Answer:
    """Continue a prompt with both models, with one seed."""
    prompt = str(arguments.get("prompt", ""))
    tokens, seed = int(str(arguments.get("tokens", 64))), int(str(arguments.get("seed", 0)))
    temperature = float(str(arguments.get("temperature", TEMPERATURE)))
    model = built_model(worker, ModelRef.parse(arguments.get("trial")))
    with worker.reporter.stage(f"Continuing the prompt with {model.label}"):
        texts = {
            name: continue_prompt(handle, prompt, tokens=tokens, seed=seed, temperature=temperature)
            for name, handle in (("dense_text", worker.session.handle), ("compressed_text", model.handle))
        }
    chosen = {"prompt": prompt, "tokens": tokens, "seed": seed, "temperature": temperature}
    return {"trial": arguments.get("trial"), "label": model.label, **chosen, **texts}


def _speed(worker: WorkerContext, arguments: Mapping[str, object]) -> Answer:
    """Time both models in alternation; peak memory, if requested, in a fresh process for each."""
    config = from_mapping(SpeedConfig, {f.name: arguments[f.name] for f in fields(SpeedConfig) if f.name in arguments})
    config.check_fits(worker.session.handle)
    model, source = built_model(worker, ModelRef.parse(arguments.get("trial"))), worker.run.config.model
    rounds = 2 * (config.rounds + config.warmup)
    with tempfile.TemporaryDirectory(dir=worker.run.path, prefix="speed-") as folder:
        sources = (source, _on_disk(worker, model, Path(folder))) if arguments.get("memory", True) else None
        with worker.reporter.stage(f"Timing {model.label} and the dense model in turns", rounds) as progress:
            result = compare_speed(worker.session.handle, model.handle, config, sources=sources, progress=progress)
    return {
        "trial": arguments.get("trial"),
        "label": model.label,
        "config": asdict(config),
        **result.to_mapping(),
        **_flops(model),
    }


def _on_disk(worker: WorkerContext, model: BuiltModel, folder: Path) -> ModelSource:
    """Return the model's path for a fresh process; an unsaved model is written to ``folder`` temporarily."""
    source = worker.run.config.model
    if model.folder is not None:
        return replace(source, reference=str(model.folder))
    assert model.report is not None
    with worker.reporter.stage(f"Writing {model.label} to measure its memory"):
        export(CompressedModel(model.handle, model.report), folder / "model", provenance={"allocation": model.label})
    return replace(source, reference=str(folder / "model"))


KINDS: Mapping[str, Callable[[WorkerContext, Mapping[str, object]], Answer]] = {
    "compare": _compare,
    "other_text": _other_text,
    "tokens": _tokens,
    "generate": _generate,
    "speed": _speed,
}
"""Kind of a request -> what answers it."""
