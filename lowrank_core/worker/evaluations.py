"""Handlers that measure models: test text, second text, single tokens, time and memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from lowrank_core.compression.build import CompressedModel
from lowrank_core.config import ModelSource
from lowrank_core.errors import ConfigError
from lowrank_core.evaluation.behaviour import behaviour_protocol, measure_behaviour
from lowrank_core.evaluation.generation import side_by_side
from lowrank_core.evaluation.texts import losses_of, tokens_of_text
from lowrank_core.export import export
from lowrank_core.speed import compare_speed
from lowrank_core.studies import requests
from lowrank_core.text import WindowSet, load_windows
from lowrank_core.worker.context import WorkerContext
from lowrank_core.worker.models import BuiltModel, built_model

__all__ = ["compare", "compare_on_other_text", "compare_speeds", "compare_tokens", "generate", "measure_behaviours"]

_DECIMALS = 6
_DECIMALS_OF = {"window_nll": _DECIMALS, "dense_window_nll": _DECIMALS, "window_kl": 9}
_MAX_TOKENS = 512
"""Of a text that is shown token by token."""


def compare(worker: WorkerContext, request: requests.CompareRequest) -> requests.CompareAnswer:
    """Measure a model on the run's test text, next to the dense model on the same windows."""
    test = worker.session.windows.test
    model, report = _measured(worker, request, test, "test text")
    return requests.CompareAnswer(trial=request.trial, label=model.label, ranks=dict(model.ranks), report=report)


def compare_on_other_text(worker: WorkerContext, request: requests.OtherTextRequest) -> requests.OtherTextAnswer:
    """Measure a model on the test split of another text, next to the dense model on the same windows."""
    config = worker.run.config.text
    with worker.reporter.stage(f"Reading {request.text}"):
        other = replace(config, reference=request.text)
        windows = load_windows(other, worker.session.handle.tokenizer, "test", count=config.test_windows)
    _check_unchanged(worker, request.text, windows)
    model, report = _measured(worker, request, windows, windows.dataset)
    return requests.OtherTextAnswer(
        trial=request.trial, label=model.label, ranks=dict(model.ranks), report=report, text=request.text, sha256=windows.sha256
    )


def _check_unchanged(worker: WorkerContext, reference: str, windows: WindowSet) -> None:
    """Raise unless earlier results on this text used the same tokens; older results do not record them."""
    known = {answer.sha256 for answer in requests.answers_of(worker.run, requests.OtherTextAnswer) if answer.text == reference}
    if known - {"", windows.sha256}:
        raise ConfigError(
            f"{reference} has changed since models of this run were measured on it: its test split has other tokens. "
            "Put the old text back, or give the new one under another name."
        )


def _measured(
    worker: WorkerContext, request: requests.ModelRequest, windows: WindowSet, where: str
) -> tuple[BuiltModel, dict[str, object]]:
    model = built_model(worker, request.ref)
    report = worker.measured(model.handle, windows, f"Measuring {model.name} on {where}")
    if model.of_search and windows is worker.session.windows.test:
        worker.evaluations.keep(model.ranks, report)
    return model, _rounded(report.to_mapping()) | _flops(model)


def _rounded(report: Mapping[str, object]) -> dict[str, object]:
    """Return the report with windows and positions at few decimals, to keep results small."""
    result = dict(report)
    for name, decimals in _DECIMALS_OF.items():
        values = result.get(name)
        if isinstance(values, list | tuple):
            result[name] = [round(float(value), decimals) for value in values]
    rows = result.get("by_position")
    if isinstance(rows, list):
        result["by_position"] = [
            {name: round(value, _DECIMALS) if isinstance(value, float) else value for name, value in row.items()} for row in rows
        ]
    return result


def _flops(model: BuiltModel) -> dict[str, int]:
    report = model.report
    return {} if report is None else {"flops": report.model_flops_after, "dense_flops": report.model_flops_before}


def compare_tokens(worker: WorkerContext, request: requests.TokensRequest) -> requests.TokensAnswer:
    """Compare both models token by token, on a given text or a test window."""
    session, window, test = worker.session, request.window, worker.session.windows.test
    left_out, source = 0, "the text that was given"
    if request.text is not None:
        maximum = min(session.handle.max_context or _MAX_TOKENS, _MAX_TOKENS)
        ids, left_out = tokens_of_text(session.handle, request.text, bos=test.bos, maximum=maximum)
    elif window is not None and 0 <= window < test.windows:
        source = f"{test.dataset}, {test.split} split, window {window}"
        ids = test.ids[window][:_MAX_TOKENS]
        left_out = test.context - len(ids)
    else:
        raise ConfigError(f"window must be a number from 0 to {test.windows - 1}; got {window!r}. Or give a text.")
    model = built_model(worker, request.ref)
    with worker.reporter.stage(f"Reading a text with {model.name}"):
        losses = losses_of(model.handle, session.handle, ids)
    protocol = f"{source}: {len(losses.nll)} tokens predicted, {'BOS first' if test.bos else 'no BOS'}"
    protocol += f", {left_out} more tokens left out" if left_out else ""
    of_test = window if request.text is None else None
    return requests.TokensAnswer(
        trial=request.trial, label=model.label, window=of_test, left_out=left_out, protocol=protocol, losses=losses
    )


def generate(worker: WorkerContext, request: requests.GenerateRequest) -> requests.GenerateAnswer:
    """Continue a prompt with both models, with one seed."""
    model, prompt, sampling = built_model(worker, request.ref), request.prompt, request.sampling
    with worker.reporter.stage(f"Continuing the prompt with {model.name}"):
        dense, ours = side_by_side([worker.session.handle, model.handle], prompt, sampling)
    return requests.GenerateAnswer(
        trial=request.trial,
        label=model.label,
        prompt=prompt,
        sampling=sampling,
        dense_text=dense.text,
        compressed_text=ours.text,
        dense_facts=dense.facts,
        compressed_facts=ours.facts,
    )


def measure_behaviours(worker: WorkerContext, request: requests.BehaviourRequest) -> requests.BehaviourAnswer:
    """Continue the first tokens of test windows with both models; the dense one's on the same prompts are reused."""
    model, test, config = built_model(worker, request.ref), worker.session.windows.test, request.config
    protocol = behaviour_protocol(test, config)
    known = (answer.result for answer in requests.answers_of(worker.run, requests.BehaviourAnswer))
    dense = next((result.dense for result in known if result.protocol == protocol), None)
    with worker.reporter.stage(f"Continuing test windows with {model.name}") as progress:
        result = measure_behaviour(model.handle, test, config, against=dense or worker.session.handle, progress=progress)
    return requests.BehaviourAnswer(trial=request.trial, label=model.label, result=result)


def compare_speeds(worker: WorkerContext, request: requests.SpeedRequest) -> requests.SpeedAnswer:
    """Time both models in alternation; peak memory, if requested, in a fresh process for each."""
    config, dense = request.config, worker.session.handle
    config.check_fits(dense)
    model, source = built_model(worker, request.ref), worker.run.config.model
    rounds = 2 * (config.rounds + config.warmup)
    with tempfile.TemporaryDirectory(dir=worker.run.path, prefix="speed-") as folder:
        sources = (source, _on_disk(worker, model, Path(folder))) if request.memory else None
        with worker.reporter.stage(f"Timing {model.name} and the dense model in turns", rounds) as progress:
            result = compare_speed(dense, model.handle, config, sources=sources, progress=progress)
    return requests.SpeedAnswer(trial=request.trial, label=model.label, config=asdict(config), result=result, **_flops(model))


def _on_disk(worker: WorkerContext, model: BuiltModel, folder: Path) -> ModelSource:
    """Return the model's path for a fresh process; an unsaved model is written to ``folder`` temporarily."""
    source = worker.run.config.model
    if model.folder is not None:
        return replace(source, reference=str(model.folder))
    assert model.report is not None
    with worker.reporter.stage(f"Writing {model.name} to measure its memory"):
        export(CompressedModel(model.handle, model.report), folder / "model", provenance={"allocation": model.label})
    return replace(source, reference=str(folder / "model"))
