"""``lowrank heal``: train a compressed folder, write it as a new one, and measure both on test text."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from lowrank_core.commands.shared import estimate_words, progress_line, warn
from lowrank_core.compression.build import CompressedModel
from lowrank_core.config import ExportConfig, ModelSource, TextConfig
from lowrank_core.config.healing import HealingConfig
from lowrank_core.errors import ConfigError
from lowrank_core.evaluation import EvaluationReport, evaluate
from lowrank_core.export import HeldOut, check_free, check_precision, healed_model, write_healed
from lowrank_core.export.manifest import read_manifest, report_of
from lowrank_core.healing.estimate import healing_times
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.models.loading import resolve_reference
from lowrank_core.runs.healing_records import HealingReport, read_history
from lowrank_core.runs.stage_times import PieceTimer, StageTime, TimeEstimate
from lowrank_core.text import load_windows, overlap_warnings
from lowrank_core.types import Result
from lowrank_core.wording import fixed

__all__ = ["HealedFolder", "estimate", "heal_folder"]

_EVALUATED = (2, 6)
"""Windows of the timed evaluations."""


@dataclass(frozen=True)
class HealedFolder:
    """Folder that `lowrank heal` writes.

    Attributes:
        out: new folder of the healed model.
        against: the dense model; None takes the one that the folder says it was made from.
        export: how the folder is written; command: for its model card.
    """

    out: Path
    against: str | None = None
    export: ExportConfig = field(default_factory=ExportConfig)
    command: str = ""

    def __post_init__(self) -> None:
        if self.export.rounding == "gptq":
            raise ConfigError("--rounding gptq needs the calibration of the dense model, which heal has not. Round to nearest here.")

    @property
    def checkpoint(self) -> Path:
        """Folder of the state of an interrupted healing."""
        return self.out.absolute().with_name(f".{self.out.name}.healing")


def heal_folder(source: ModelSource, text: TextConfig, config: HealingConfig, wanted: HealedFolder) -> Result:
    """Train the factors of a compressed folder on the calibration split, choose on validation, measure on test, and write.

    The same command goes on where it was killed.

    Raises:
        LowRankError: bad input; see ``heal`` and ``export``.
    """
    check_free(wanted.out)
    manifest = read_manifest(Path(resolve_reference(source.reference)))
    counts = report_of(manifest)
    compressed = CompressedModel(load_model(source), counts)
    dense = load_model(replace(source, reference=wanted.against or manifest.made_from))
    unknown = warn(*_check_same(counts.dense, dense))
    tokenizer = compressed.handle.tokenizer
    validation = load_windows(text, tokenizer, "validation", count=text.validation_windows)
    test = load_windows(text, tokenizer, "test", count=text.test_windows)
    check_precision(compressed.handle, wanted.export, test)
    calibration = load_windows(text, tokenizer, "calibration", count=text.calibration_windows)
    doubts = (*unknown, *overlap_warnings(calibration, validation, test))
    begun = read_history(wanted.checkpoint)
    if begun:
        print(f"going on after step {begun[-1].step} of {config.steps}", file=sys.stderr)
    healed = healed_model(compressed, dense, (text, validation), config, folder=wanted.checkpoint, progress=progress_line("Healing"))
    model, report = healed
    before = evaluate(compressed.handle, test, against=dense, progress=progress_line("Measuring one-shot"))
    after = evaluate(model.handle, test, against=dense, progress=progress_line("Measuring healed"))
    provenance = {**manifest.provenance, "command": wanted.command}
    write_healed(healed, wanted.out, (before, after), provenance=provenance, test=HeldOut(text, test), config=wanted.export)
    _forget(wanted.checkpoint)
    return {
        "out": str(wanted.out),
        "healing": asdict(report),
        "one_shot": before.to_mapping(),
        "healed": after.to_mapping(),
        "warnings": list(doubts),
        "text": _told(report, replace(before, warnings=(*doubts, *before.warnings)), after, wanted.out),
    }


def estimate(source: ModelSource, text: TextConfig, config: HealingConfig, against: str | None) -> Result:
    """Time pieces of ``heal_folder``; nothing is written.

    Raises:
        LowRankError: as ``heal_folder``, as far as the pieces reach.
    """
    timer, text = PieceTimer(), replace(text, seed=config.seed)
    manifest = read_manifest(Path(resolve_reference(source.reference)))
    models: list[ModelHandle] = []
    loading = timer.once(
        lambda: models.extend(load_model(replace(source, reference=r)) for r in (source.reference, against or manifest.made_from))
    )
    compressed, dense = models
    validation = load_windows(text, compressed.tokenizer, "validation", count=text.validation_windows)
    training = load_windows(text, compressed.tokenizer, "calibration", count=config.train_windows)
    fixed, each = timer.line(lambda n: evaluate(compressed, validation.first(n), against=dense), _EVALUATED, validation.windows)
    stages = (
        StageTime("Loading the models", loading, "measured: they are loaded"),
        *healing_times((compressed, dense), (training, validation), config),
        StageTime("Measuring before and after", 2 * (fixed + each * text.test_windows), "timed pieces"),
    )
    return estimate_words(TimeEstimate(stages))


def _check_same(recorded: Mapping[str, str], dense: ModelHandle) -> tuple[str, ...]:
    """Return a warning where the folder and ``dense`` can't be compared.

    Raises:
        ConfigError: the folder was made from another model.
    """
    if not recorded:
        return (f"This folder of an earlier version does not say which weights it was made from: those of {dense.reference} are used.",)
    if dense.identity == recorded:
        return ()
    if dense.identity["config"] != recorded["config"] or dense.identity["dtype"] == recorded["dtype"]:
        raise ConfigError(f"{dense.reference} is not the model that the folder was made from. Give that one: --against MODEL.")
    return (
        f"The folder was made from the dense model as {recorded['dtype']}; as {dense.identity['dtype']} its weights can't be compared: "
        f"--dtype {recorded['dtype']} checks them.",
    )


def _forget(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _recovered(before: EvaluationReport, after: EvaluationReport) -> str:
    """Return the share of the lost perplexity that is back; nothing where these windows do not tell that any was lost."""
    assert before.dense_perplexity is not None
    ends = before.perplexity_difference_interval
    if ends is None or ends[0] <= 0:
        return ""
    share = 1 - (after.perplexity - before.dense_perplexity) / (before.perplexity - before.dense_perplexity)
    return f", {share:.0%} of the one-shot loss recovered"


def _told(report: HealingReport, before: EvaluationReport, after: EvaluationReport, out: Path) -> str:
    assert before.dense_perplexity is not None
    recovered = _recovered(before, after)
    kept = f"step {report.best_step} kept" if report.best_step else "no step was better than the start: the model is unchanged"
    ends = {"steps": "all steps taken", "patience": "validation stopped improving", "diverged": "stopped: a loss was not finite"}
    return "\n".join(
        [
            f"perplexity  dense {before.dense_perplexity:.3f}  one-shot {before.perplexity:.3f}  healed {after.perplexity:.3f}{recovered}",
            f"KL          one-shot {fixed(before.kl or 0.0, 5)}  healed {fixed(after.kl or 0.0, 5)} nats per token",
            *(f"warning: {warning}" for warning in before.warnings),
            before.protocol,
            f"{report.label}: {report.steps} steps, {report.tokens:,} tokens, {report.seconds:.0f} s, rate {report.learning_rate:.2g}; "
            f"{ends[report.stopped]}, {kept}.",
            f"trained on {report.training}",
            f"Wrote {out}.",
        ]
    )
