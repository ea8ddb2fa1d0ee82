"""Requests to a worker and its answers: each kind is declared once, for who asks, for the worker, and for who reads. Torch-free.

::

    requests/<id>.json    {"id", "kind", "arguments": a request}
    results/<id>.json     {"ok": true, "kind", "arguments", "time", ... an answer}, or {"ok": false, "error", ...}

A request is checked when it is made: by who asks, and again by the worker that reads the file. ``worker.handlers`` has a function for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, TypeVar

from lowrank_core.allocation import Ranks
from lowrank_core.config import ExportConfig, from_mapping
from lowrank_core.config.directions import DirectionsConfig
from lowrank_core.config.evaluation import BehaviourConfig, Sampling
from lowrank_core.config.healing import HealingConfig
from lowrank_core.config.mapping import INLINE, build
from lowrank_core.config.speed import SpeedConfig
from lowrank_core.errors import ConfigError
from lowrank_core.runs import JsonMapping, Run, client
from lowrank_core.runs.measurements import BehaviourComparison, ContinuationFacts, SpeedComparison, TextLosses
from lowrank_core.sensitivity.config import SensitivityConfig
from lowrank_core.spectra.directions import Directions
from lowrank_core.studies.model_ref import ModelKey, ModelRef
from lowrank_core.studies.records import MANUAL

__all__ = [
    "REQUESTS",
    "Answer",
    "BehaviourAnswer",
    "BehaviourRequest",
    "CompareAnswer",
    "CompareRequest",
    "CurvesAnswer",
    "CurvesRequest",
    "DirectionsAnswer",
    "DirectionsRequest",
    "ExportAnswer",
    "ExportRequest",
    "GenerateAnswer",
    "GenerateRequest",
    "HealAnswer",
    "HealRequest",
    "MeasureAnswer",
    "MeasureRequest",
    "OtherTextAnswer",
    "OtherTextRequest",
    "SensitivityAnswer",
    "SensitivityRequest",
    "SpeedAnswer",
    "SpeedRequest",
    "TokensAnswer",
    "TokensRequest",
    "VerifyAnswer",
    "VerifyRequest",
    "answers_in",
    "answers_of",
    "request_of",
]

A = TypeVar("A", bound="Answer")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Result of a request of ``kind``; ``time`` is when, in seconds since the epoch."""

    kind: ClassVar[str]
    time: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ModelAnswer(Answer):
    """About one model: ``trial`` as it was requested, and the label of its measurements."""

    trial: ModelKey | None = None
    label: str = ""

    @property
    def filed_as(self) -> str:
        """The label, which manual trials share: theirs is the number."""
        return f"trial {self.trial}" if self.label in ("", MANUAL) and type(self.trial) is int else self.label or str(self.trial)


@dataclass(frozen=True)
class Request:
    """Request to a worker: its fields are the arguments; ``words`` describe it in a queue."""

    answer: ClassVar[type[Answer]]
    words: ClassVar[str]

    @property
    def kind(self) -> str:
        return self.answer.kind


@dataclass(frozen=True)
class ModelRequest(Request):
    """About one model: a trial's number, None or ``best``, an allocator, ``preset:NAME``, ``dense:NAME`` or ``healed:FOLDER``."""

    trial: ModelKey | None = None

    def __post_init__(self) -> None:
        _ = self.ref

    @property
    def ref(self) -> ModelRef:
        """The model that is meant.

        Raises:
            ConfigError: it is none of these.
        """
        return ModelRef.parse(self.trial)


@dataclass(frozen=True, kw_only=True)
class CompareAnswer(ModelAnswer):
    """``report``: ``EvaluationReport`` in JSON, with the FLOPs of both models where they were counted."""

    kind = "compare"
    ranks: Mapping[str, int | None] = field(default_factory=dict)
    report: JsonMapping


@dataclass(frozen=True)
class CompareRequest(ModelRequest):
    """Measure a model on the run's test text, next to the dense model on the same windows."""

    answer = CompareAnswer
    words = "measuring on test text"


@dataclass(frozen=True, kw_only=True)
class OtherTextAnswer(CompareAnswer):
    """``sha256``: of the text's tokens; empty in those of earlier versions."""

    kind = "other_text"
    text: str
    sha256: str = ""


@dataclass(frozen=True)
class OtherTextRequest(ModelRequest):
    """Measure a model on the test split of another text, next to the dense model on the same windows."""

    answer = OtherTextAnswer
    words = "measuring on a second text"
    text: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.text:
            raise ConfigError("no second text is given. Name one, such as file:notes.txt.")


@dataclass(frozen=True, kw_only=True)
class TokensAnswer(ModelAnswer):
    """``window``: of the test text, None for a text that was given; ``left_out``: tokens beyond what is read."""

    kind = "tokens"
    window: int | None = None
    left_out: int = 0
    protocol: str
    losses: TextLosses = field(metadata=INLINE)


@dataclass(frozen=True)
class TokensRequest(ModelRequest):
    """Compare both models token by token, on a given text or a test window."""

    answer = TokensAnswer
    words = "reading a text token by token"
    text: str | None = None
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class GenerateAnswer(ModelAnswer):
    """The continuations of both models; of an earlier version without their facts."""

    kind = "generate"
    prompt: str
    sampling: Sampling = field(metadata=INLINE)
    dense_text: str
    compressed_text: str
    dense_facts: ContinuationFacts | None = None
    compressed_facts: ContinuationFacts | None = None


@dataclass(frozen=True)
class GenerateRequest(ModelRequest):
    """Continue a prompt with both models, with one seed."""

    answer = GenerateAnswer
    words = "continuing a prompt"
    prompt: str = ""
    sampling: Sampling = field(metadata=INLINE, default=Sampling())


@dataclass(frozen=True, kw_only=True)
class BehaviourAnswer(ModelAnswer):
    kind = "behaviour"
    result: BehaviourComparison = field(metadata=INLINE)


@dataclass(frozen=True)
class BehaviourRequest(ModelRequest):
    """Continue the first tokens of test windows with both models, greedily."""

    answer = BehaviourAnswer
    words = "measuring behaviour"
    config: BehaviourConfig = field(metadata=INLINE, default=BehaviourConfig())


@dataclass(frozen=True, kw_only=True)
class SpeedAnswer(ModelAnswer):
    """``flops``, ``dense_flops``: for one token, None where they were not counted."""

    kind = "speed"
    config: JsonMapping = field(default_factory=dict)
    result: SpeedComparison = field(metadata=INLINE)
    flops: int | None = None
    dense_flops: int | None = None


@dataclass(frozen=True)
class SpeedRequest(ModelRequest):
    """Time both models in alternation; peak memory, if requested, in a fresh process for each."""

    answer = SpeedAnswer
    words = "timing"
    memory: bool = True
    config: SpeedConfig = field(metadata=INLINE, default=SpeedConfig())


@dataclass(frozen=True, kw_only=True)
class ExportAnswer(ModelAnswer):
    """``path``: of the folder that was written; ``healed``: the healed model that it holds, if it is one."""

    kind = "export"
    path: str
    healed: str | None = None


@dataclass(frozen=True)
class ExportRequest(ModelRequest):
    """Write the model of a trial, or the ``healed`` one of that name, into the run's exports."""

    answer = ExportAnswer
    words = "writing the model"
    healed: str | None = None
    config: ExportConfig = field(metadata=INLINE, default=ExportConfig())


@dataclass(frozen=True, kw_only=True)
class VerifyAnswer(Answer):
    """``verification``: ``export.Verification`` in JSON."""

    kind = "verify"
    path: str
    verification: JsonMapping


@dataclass(frozen=True)
class VerifyRequest(Request):
    """Check the export of the run that ``path`` names, and measure it again in a fresh process."""

    answer = VerifyAnswer
    words = "measuring an exported folder again"
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class HealAnswer(ModelAnswer):
    """The healed model: ``report`` measures it, ``one_shot`` what it was before; ``folder``: its name under ``healed``.

    ``healing``: ``HealingReport.summary``.
    """

    kind = "heal"
    report: JsonMapping
    one_shot: JsonMapping
    path: str = ""
    healing: JsonMapping = field(default_factory=dict)
    folder: str = ""


@dataclass(frozen=True)
class HealRequest(ModelRequest):
    """Train the factors of a model towards the dense one."""

    answer = HealAnswer
    words = "healing"
    healing: HealingConfig = field(default_factory=HealingConfig)


@dataclass(frozen=True, kw_only=True)
class DirectionsAnswer(Answer):
    kind = "directions"
    result: Directions = field(metadata=INLINE)


@dataclass(frozen=True)
class DirectionsRequest(Request):
    """Find the tokens that lie furthest along a module's top directions."""

    answer = DirectionsAnswer
    words = "reading the top directions"
    config: DirectionsConfig = field(metadata=INLINE)


@dataclass(frozen=True, kw_only=True)
class MeasureAnswer(Answer):
    """The ranks that were queued; they become a trial of the study."""

    kind = "measure"
    ranks: Mapping[str, int | None]
    compression_ratio: float


@dataclass(frozen=True)
class MeasureRequest(Request):
    """Queue a manual allocation; the allocator ``complete`` completes a partial one within the budget."""

    answer = MeasureAnswer
    words = "queueing an allocation"
    ranks: Ranks
    complete: str | None = None

    def __post_init__(self) -> None:
        if not all(rank is None or type(rank) is int for rank in self.ranks.values()):
            raise ConfigError("an allocation maps unit names to whole ranks, or to null for dense.")


@dataclass(frozen=True, kw_only=True)
class SensitivityAnswer(Answer):
    """``file``: of the cells, in the run's folder; ``cells``: how many were requested; ``measured``: how many of them now."""

    kind = "sensitivity"
    file: str
    cells: int
    measured: int


@dataclass(frozen=True)
class SensitivityRequest(Request):
    """Measure what modules cost when they alone are compressed, when nothing else waits."""

    answer = SensitivityAnswer
    words = "measuring sensitivities"
    config: SensitivityConfig = field(metadata=INLINE, default=SensitivityConfig())


@dataclass(frozen=True, kw_only=True)
class CurvesAnswer(Answer):
    """``estimate``: what the curves mean, one of ``curves.ESTIMATES``."""

    kind = "curves"
    estimate: str


@dataclass(frozen=True)
class CurvesRequest(Request):
    """Write the error curves of a run of an earlier version."""

    answer = CurvesAnswer
    words = "writing the error curves"


REQUESTS: Mapping[str, type[Request]] = MappingProxyType(
    {
        request.answer.kind: request
        for request in (
            *(CompareRequest, OtherTextRequest, TokensRequest, GenerateRequest, SpeedRequest, ExportRequest, VerifyRequest),
            *(HealRequest, DirectionsRequest, MeasureRequest, SensitivityRequest, CurvesRequest, BehaviourRequest),
        )
    }
)
"""Kind -> what may be asked."""


def request_of(kind: str, arguments: Mapping[str, object]) -> Request:
    """Return the request that a file holds.

    Raises:
        ConfigError: there is no such kind, or an argument is none of its, missing, or out of range.
    """
    if kind not in REQUESTS:
        raise ConfigError(f"no request is called {kind!r}; there are {', '.join(REQUESTS)}.")
    return from_mapping(REQUESTS[kind], arguments)


def answers_in(results: Sequence[JsonMapping], *kinds: type[A]) -> list[A]:
    """Return the successful answers of some kinds, in the order of ``results`` (``client.results``).

    Raises:
        RunError: one is damaged.
    """
    wanted = {kind.kind: kind for kind in kinds}
    good = [body for body in results if body.get("kind") in wanted and body.get("ok")]
    return [build(wanted[body["kind"]], body, f"the answer to {body['kind']!r}") for body in good]


def answers_of(run: Run, kind: type[A]) -> list[A]:
    """Return the successful answers of one kind in a run, the oldest first.

    Raises:
        RunError: one is damaged.
    """
    return answers_in(client.results(run), kind)
