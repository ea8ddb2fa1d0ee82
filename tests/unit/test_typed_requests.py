"""Requests and answers are declared once: their JSON opens again, that of earlier runs too, and bad ones are refused at once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lowrank_core.config import ExportConfig, to_mapping
from lowrank_core.config.directions import DirectionsConfig
from lowrank_core.config.evaluation import BehaviourConfig, Sampling
from lowrank_core.config.healing import HealingConfig
from lowrank_core.config.mapping import INLINE, build, from_mapping
from lowrank_core.config.speed import SpeedConfig
from lowrank_core.errors import ConfigError, RunError
from lowrank_core.runs import Run, client, recorded_run
from lowrank_core.sensitivity.config import SensitivityConfig
from lowrank_core.studies.requests import (
    REQUESTS,
    BehaviourRequest,
    CompareAnswer,
    CompareRequest,
    CurvesRequest,
    DirectionsRequest,
    ExportRequest,
    GenerateRequest,
    HealRequest,
    MeasureRequest,
    OtherTextRequest,
    Request,
    SensitivityRequest,
    SpeedAnswer,
    SpeedRequest,
    TokensAnswer,
    TokensRequest,
    VerifyRequest,
    answers_in,
    answers_of,
    request_of,
)
from lowrank_core.worker.background import BACKGROUND
from lowrank_core.worker.handlers import HANDLERS

ASKED: tuple[Request, ...] = (
    CompareRequest(3),
    OtherTextRequest("preset:svd", "file:notes.txt"),
    TokensRequest("uniform", window=2),
    GenerateRequest("healed:trial-3-lora-12345678", "def f(", Sampling(3, seed=1)),
    BehaviourRequest(None, BehaviourConfig(prompts=3, new_tokens=9)),
    SpeedRequest(None, memory=False, config=SpeedConfig(rounds=2)),
    ExportRequest(2, config=ExportConfig(form="dense")),
    VerifyRequest("trial-2-dense"),
    HealRequest(4, HealingConfig("lora", steps=2)),
    DirectionsRequest(DirectionsConfig("model.layers.0.mlp.down_proj", side="output")),
    MeasureRequest({"a": 3, "b": None}, "uniform"),
    SensitivityRequest(SensitivityConfig(kept=(0.5,), kinds=("q_proj",))),
    CurvesRequest(),
)


@pytest.mark.parametrize("request_", ASKED, ids=lambda request: request.kind)
def test_a_request_survives_its_file(request_: Request, tmp_path: Path):
    run = Run(tmp_path)
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    client.submit(run, request_, launch=False)
    (body,) = client.pending_requests(run)
    assert request_of(str(body["kind"]), body["arguments"]) == request_  # type: ignore[arg-type]


def test_every_kind_is_here_and_has_a_handler():
    assert {type(request) for request in ASKED} == set(REQUESTS.values())
    assert set(HANDLERS) | {REQUESTS[kind] for kind in BACKGROUND} == set(REQUESTS.values())


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("shrink", {}, "no request is called 'shrink'; there are compare, other_text,"),
        ("compare", {"trial": "finest"}, "trial must be a number, `best`, preset:NAME"),
        ("compare", {"trail": 3}, "CompareRequest: unknown trail; it knows trial"),
        ("other_text", {"trial": 3}, "no second text is given"),
        ("speed", {"trial": 3, "rounds": 0}, "rounds must be at least 1"),
        ("speed", {"trial": 3, "laps": 2}, "SpeedConfig: unknown laps"),
        ("speed", {"config": {"rounds": 2}}, "SpeedConfig: unknown config"),
        ("heal", {"healing": 3}, "HealingConfig: expected an object, got int"),
        ("directions", {}, "has no 'module'"),
        ("measure", {"ranks": {"a": 2.5}}, "whole ranks, or to null"),
        ("generate", {"tokens": "many"}, "tokens: expected int, got 'many'"),
    ],
)
def test_a_bad_request_says_what_is_wrong(kind: str, arguments: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        request_of(kind, arguments)


def test_answers_of_the_recorded_run_open_as_what_they_are():
    run = recorded_run()
    assert run is not None
    bodies = client.results(run)
    opened = [answer for request in REQUESTS.values() for answer in answers_in(bodies, request.answer)]
    assert len(opened) == sum(bool(body["ok"]) for body in bodies) == len(bodies)
    for answer in opened:
        body = next(body for body in bodies if body["time"] == answer.time)
        written = json.loads(json.dumps(to_mapping(answer)))
        assert written.items() >= {name: value for name, value in body.items() if name in written}.items()
    (speed,) = answers_of(run, SpeedAnswer)
    assert speed.result.dense.memory is not None
    assert speed.result.memory_ratio == next(body["memory_ratio"] for body in bodies if body["kind"] == "speed")
    tokens = answers_of(run, TokensAnswer)[0]
    assert len(tokens.losses.pieces) == len(tokens.losses.nll) + 1
    assert all(answer.report["kl"] > 0 for answer in answers_of(run, CompareAnswer))


def test_a_damaged_answer_is_named():
    with pytest.raises(RunError, match="the answer to 'tokens' has no 'nll'"):
        answers_in([{"ok": True, "kind": "tokens", "protocol": "p", "pieces": ["a"]}], TokensAnswer)
    assert answers_in([{"ok": False, "kind": "tokens", "error": "no"}], TokensAnswer) == []


@dataclass(frozen=True)
class Inner:
    width: int = 1
    height: int = 1


@dataclass(frozen=True)
class Outer:
    name: str
    size: Inner = field(default=Inner(), metadata=INLINE)


def test_the_keys_of_an_inline_field_stand_among_the_others():
    body = {"name": "a", "width": 3, "height": 1}
    assert to_mapping(Outer("a", Inner(3))) == body
    assert from_mapping(Outer, body) == build(Outer, {**body, "depth": 4}, "a file") == Outer("a", Inner(3))
    with pytest.raises(ConfigError, match="Inner: unknown depth"):
        from_mapping(Outer, {**body, "depth": 4})
