"""What becomes of each causal type of transformers: analysed, compressed, written, read, generated; ``python tests/causal_table.py``.

Prints the table of ``docs/models.md``; the test of the marker ``families`` asks the same of each type.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from causal_types import CAUSAL_TYPES, NotBuilt, built_type
from checkpoints import VOCABULARY, save_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, __version__

from lowrank_core.compression.build import low_rank_layers, swap_layers
from lowrank_core.compression.decomposed import decompose
from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource
from lowrank_core.coverage import COMPRESSIBLE, shown
from lowrank_core.errors import LowRankError
from lowrank_core.export import export
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.models.attention import head_units
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.text import WindowSet

__all__ = ["Outcome", "outcome_of"]

TEXT = "Each line of this text is read by a tokenizer that has seen no other.\n" * 40
_RATIO = 0.3
_SHARE = 0.95


@dataclass(frozen=True)
class Outcome:
    """What was seen of one type.

    Attributes:
        share: compressible parameters, of those outside embeddings and head.
        left: the largest part of the others, with the reason; empty where the share is at least 95 %.
        heads: head units that were verified.
        deviation: of the logits at full rank, in standard deviations of the dense logits.
        problem: in a line; empty where everything worked.
    """

    model_type: str
    share: float = 0.0
    left: str = ""
    heads: int = 0
    deviation: float = float("nan")
    problem: str = ""


def outcome_of(model_type: str, folder: Path) -> Outcome:
    """Take the type through analysis, compression, export, reading and generation.

    Raises:
        NotBuilt: there is no tiny model of it.
    """
    module = built_type(model_type)
    try:
        save_checkpoint(folder / "dense", module, TEXT)
    except Exception as error:  # of transformers, before anything of ours
        raise NotBuilt(f"not saved: {error}") from error
    try:
        handle = load_model(ModelSource(str(folder / "dense")))
    except LowRankError as error:
        return Outcome(model_type, problem=str(error).replace(str(folder / "dense"), "the model"))
    share, left = handle.coverage.inner_share, ""
    if share < _SHARE:
        rows = [row for row in handle.coverage.rows if row.kind not in (*COMPRESSIBLE, "embedding", "tied", "head")]
        largest = max(rows, key=lambda row: row.parameters)
        left = f"{largest.label}: {largest.why}"
    try:
        deviation = _compressed(handle, folder / "small")
    except LowRankError as error:
        return Outcome(model_type, share, left, problem=str(error).replace(str(folder / "dense"), "the model"))
    return Outcome(model_type, share, left, len(head_units(handle)), deviation)


def _compressed(handle: ModelHandle, folder: Path) -> float:
    """Compress, write, read and generate; return the deviation of the logits at full rank."""
    ids = torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
    config = CompressionConfig(basis="whitened")
    windows = WindowSet("random tokens", "calibration", ids, bos=False, available_tokens=ids.numel())
    statistics = collect_statistics(handle, windows, CalibrationConfig(group_size=2, batch_size=3))
    decomposed = decompose(handle, statistics, config)
    full = low_rank_layers(handle, decomposed.bases, {unit.name: unit.max_rank for unit in decomposed.units}, storage="factored")
    dense = _logits(handle.module, ids[:2])
    with swap_layers(handle, full):
        deviation = float((_logits(handle.module, ids[:2]) - dense).abs().max() / dense.std())
    smaller = decomposed.compress(decomposed.allocate("uniform", _RATIO), windows)
    export(smaller, folder)
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(_logits(again, ids[:2]), _logits(smaller.handle.module, ids[:2])), "reading gives another model"
    if _cached_as_without(handle.module, ids[:1, :8]):
        assert _cached_as_without(again, ids[:1, :8]), "generation differs with a cache, and that of the dense model does not"
    return deviation


def _cached_as_without(module: nn.Module, prompt: Tensor) -> bool:
    """Whether greedy tokens are the same with a cache; some classes' own are not, or raise."""
    try:
        return torch.equal(*(module.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=cached) for cached in (True, False)))
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False


@torch.no_grad()
def _logits(module: nn.Module, ids: Tensor) -> Tensor:
    result: Tensor = module(input_ids=ids, use_cache=False).logits
    return result


def _row(outcome: Outcome) -> str:
    result = outcome.problem or f"{outcome.deviation:.0e}"
    return f"| {outcome.model_type} | {shown(outcome.share)} | {outcome.heads} | {result} | {outcome.left} |"


def main() -> None:
    """Print the table, a line for each type, and what could not be built."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    lines, missing = [], []
    for model_type in sys.argv[1:] or CAUSAL_TYPES:
        folder = Path(tempfile.mkdtemp())
        try:
            lines.append(_row(outcome_of(model_type, folder)))
        except NotBuilt as error:
            missing.append(f"{model_type} ({error})")
        except Exception as error:  # a traceback would be a fault of ours: the table says so
            lines.append(f"| {model_type} | | | FAULT {type(error).__name__}: {str(error)[:100]} | |".replace("\n", " "))
        finally:
            shutil.rmtree(folder)
        print(lines[-1] if lines else missing[-1], file=sys.stderr, flush=True)
    print(f"transformers {__version__}: {len(lines)} of {len(lines) + len(missing)} types of its causal mapping.\n")
    print("| type | compressible, of what is no embedding | head units | full rank, deviation of the logits | largest part left alone |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(lines))
    print(f"\nNo tiny model could be built of: {'; '.join(missing) or 'none'}.")


if __name__ == "__main__":
    main()
