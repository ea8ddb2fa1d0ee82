"""Time that a run will take, by this machine's record of earlier ones, in words."""

from __future__ import annotations

from lowrank_core.config import RunConfig
from lowrank_core.runs.stage_times import TimeEstimate, estimated, stages_of, work_of
from lowrank_core.studio.shared.formatting import duration
from lowrank_core.studio.shared.model_facts import ModelFacts

__all__ = ["stage_estimate", "stage_estimate_words"]


def stage_estimate(config: RunConfig, facts: ModelFacts) -> TimeEstimate:
    """Return what the machine's record says of every stage of a run with the model of ``facts``."""
    work = work_of(config, facts.matrices, facts.hidden * facts.vocabulary)
    return estimated(config.model, work, stages_of(config))


def stage_estimate_words(estimate: TimeEstimate) -> str:
    """Return the total, the longest stage and what they go by; what is missing where a stage is not known."""
    if estimate.total is None:
        unknown = ", ".join(stage.name.lower() for stage in estimate.stages if stage.seconds is None)
        return f"Time not known before the first run on this machine ({unknown}); `lowrank search --estimate` times a piece of each stage."
    longest = max(estimate.stages, key=lambda stage: stage.seconds or 0.0)
    basis = " and ".join(dict.fromkeys(stage.words for stage in estimate.stages))
    return f"Time: about **{duration(estimate.total)}** ({longest.name.lower()} {duration(longest.seconds)}), going by {basis}."
