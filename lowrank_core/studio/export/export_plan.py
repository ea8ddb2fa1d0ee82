"""Preview of an export: source, size of each form, files, runtimes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lowrank_core.allocation import ALLOCATORS, Ranks, allocation_from_ranks
from lowrank_core.allocation.units import dense_layers
from lowrank_core.config import ExportConfig, SearchConfig
from lowrank_core.config.healing import HealingConfig
from lowrank_core.errors import LowRankError
from lowrank_core.files.grids import GRIDS, Grid
from lowrank_core.parameters import INDEX_BYTES, Unit, allocated_parameters, budget_for_ratio, compression_ratio, dense_parameters
from lowrank_core.runs import JsonMapping, Run, read_json
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studies.space import SearchSpace
from lowrank_core.studio.compare.comparison import label_of
from lowrank_core.studio.compare.healing_runs import Healing, healings, trial_of
from lowrank_core.studio.shared.model_facts import ModelFacts

__all__ = [
    "Planned",
    "Source",
    "files_of",
    "folder_name_of",
    "folder_of",
    "forms_table",
    "healed_source",
    "healed_sources",
    "planned",
    "runtimes",
    "trial_source",
]

_ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Source:
    """The model to export.

    Attributes:
        name: what its folder is called; label: for people.
        trial: number or an allocator's name; None for a healed model.
        healed: folder of the healed model under the run's exports; empty for an allocation.
        healing: how that one was trained; None for an allocation.
        ranks: by unit; None where only the worker can tell them.
        number: of a trial that has these ranks, for the command line; None without one.
    """

    name: str
    label: str
    trial: int | str | None
    healed: str = ""
    ranks: Ranks | None = None
    number: int | None = None
    healing: HealingConfig | None = None

    def removed(self, units: Sequence[Unit]) -> float | None:
        """Return the fraction of compressible parameters removed by its ranks; None if only the worker knows them."""
        return (
            None if self.ranks is None or not units else compression_ratio(dense_parameters(units), allocated_parameters(units, self.ranks))
        )


def trial_source(
    trial: int | str, label: str, trials: Sequence[TrialRecord], search: SearchConfig, model: tuple[Sequence[Unit], Sequence[JsonMapping]]
) -> Source:
    """Return the source for ``trial``, a number or an allocator's name.

    Args:
        model: units of the search, and the worker's answers: where an allocator was measured, they hold its ranks.
    """
    units, bodies = model
    record = next((record for record in trials if record.number == trial), None)
    if record is not None:
        single = search.max_ratio is None
        return Source(label_of(trial, trials) if single else f"trial {trial}", label, trial, ranks=record.ranks or None, number=int(trial))
    ranks = _measured_ranks(str(trial), bodies) or _ruled_ranks(str(trial), units, search)
    same = next((record.number for record in trials if record.state == "complete" and ranks is not None and record.ranks == ranks), None)
    return Source(str(trial), label, trial, ranks=ranks, number=same)


def _measured_ranks(allocator: str, bodies: Sequence[JsonMapping]) -> Ranks | None:
    """Return the ranks that the worker measured for ``allocator``, if any."""
    result = [body.get("ranks") for body in bodies if body.get("kind") == "compare" and body.get("ok") and body.get("trial") == allocator]
    return dict(result[-1]) if result and isinstance(result[-1], Mapping) and result[-1] else None


def _ruled_ranks(allocator: str, units: Sequence[Unit], search: SearchConfig) -> Ranks | None:
    """Return the ranks of an allocator that needs shapes only; None for others."""
    rule = ALLOCATORS[allocator]
    if rule.needs_curves or rule.needs_influence or rule.measures or not units:
        return None
    try:
        return (
            SearchSpace.of(tuple(units), search, dense_layers(units, search.compression), None)
            .by_allocator(allocator, search.compression_ratio)
            .ranks
        )
    except LowRankError:
        return None


def healed_source(healing: Healing, trials: Sequence[TrialRecord], search: SearchConfig, ranks: Ranks | None = None) -> Source:
    """Return the healed model of ``healing``, with ``ranks`` where known."""
    number = trial_of(healing, trials, search)
    return Source(healing.folder, f"Healed: {healing.name}", None, healing.folder, ranks, number, healing.settings)


def healed_sources(run: Run, trials: Sequence[TrialRecord]) -> list[Source]:
    """Return the healed models of a run that are on disk.

    Raises:
        RunError, ConfigError: a file of a healing is damaged.
    """
    search = run.config.search
    if search is None:
        return []
    result = []
    for healing in healings(run):
        folder = run.path / "exports" / healing.folder
        body = read_json(folder / "lowrank.json") if healing.report is not None else None
        if body is not None:
            ranks = body.get("ranks")
            reported = dict(ranks) if isinstance(ranks, Mapping) and ranks else None
            result.append(healed_source(healing, trials, search, reported))
    return result


@dataclass(frozen=True)
class Planned:
    """One form of an export, counted and not yet written.

    Attributes:
        parameters: numbers in the weight files, biases, indices and scales included.
        bytes: of the tensors in them; without a header of some kilobytes.
        exact: whether both are exact; else they are upper bounds.
        dtype: of the floats.
    """

    parameters: int
    bytes: int
    exact: bool
    dtype: str


def planned(facts: ModelFacts, units: Sequence[Unit], source: Source, search: SearchConfig, config: ExportConfig) -> Planned:
    """Return the size of ``source`` in the form of ``config``.

    Raises:
        ConfigError, RankError: its ranks do not fit the model.
    """
    dtype = facts.stored_dtype or facts.dtype if config.dtype == "auto" else config.dtype
    itemsize = _ITEMSIZE.get(dtype, 4)
    rest = facts.parameters - dense_parameters(units)
    if config.form == "dense":
        biases = _added_biases(units) if source.ranks is None or any(rank is not None for rank in source.ranks.values()) else 0
        return Planned(facts.parameters + biases, (facts.parameters + biases) * itemsize, biases == 0, dtype)
    if source.ranks is None and config.form == "plain":
        maximum = rest + sum(max(unit.dense_parameters, unit.plain_parameters(unit.break_even_rank)) for unit in units)
        return Planned(maximum, maximum * itemsize, False, dtype)
    if source.ranks is None:
        maximum = rest + budget_for_ratio(units, search.compression_ratio)
        return Planned(maximum, maximum * itemsize + _max_indices(units) * max(0, INDEX_BYTES - itemsize), False, dtype)
    ranks = allocation_from_ranks(source.name, units, source.ranks).ranks
    if config.form == "plain":
        chosen = [(unit, rank) for unit in units if (rank := ranks.get(unit.name)) is not None]
        added = sum(unit.plain_parameters(rank) - unit.parameters(rank) for unit, rank in chosen)
        plain = rest + allocated_parameters(units, ranks) + added
        return Planned(plain, plain * itemsize, True, dtype)
    pieces = _pieces(units, ranks, config)
    parameters = rest + sum(unit.parameters(rank) + (unit.scales(rank, grid) if grid else 0) for unit, rank, grid in pieces)
    return Planned(parameters, rest * itemsize + sum(unit.bytes(rank, itemsize, grid) for unit, rank, grid in pieces), True, dtype)


def _pieces(units: Sequence[Unit], ranks: Ranks, config: ExportConfig) -> list[tuple[Unit, int | None, Grid | None]]:
    """Return what is stored, each matrix once: units with factors and their rank, and layers that stay dense, with their grids."""
    factors = [unit for unit in units if ranks.get(unit.name) is not None]
    covered = {member.name for unit in factors for member in unit.members}
    dense = {member.name: member for unit in units for member in unit.members if member.name not in covered}
    return [
        *((unit, ranks[unit.name], GRIDS.get(config.quantization)) for unit in factors),
        *((Unit((member,)), None, GRIDS.get(config.dense_quantization)) for member in dense.values()),
    ]


def _max_indices(units: Sequence[Unit]) -> int:
    return sum(unit.stored(unit.break_even_rank)[1] for unit in units)


def _added_biases(units: Sequence[Unit]) -> int:
    """Return the number of biases that a dense merge adds: a centred metric gives them to whole module types."""
    members = {member.name: member for unit in units if unit.adds_bias for member in unit.members}
    return sum(member.d_out for member in members.values() if not member.bias)


def forms_table(facts: ModelFacts, units: Sequence[Unit], source: Source, search: SearchConfig, config: ExportConfig) -> pd.DataFrame:
    """Return a row for the dense model, then one per form of ``source``; that of ``config`` is marked as chosen.

    Columns chosen, form, dtype, parameters, bytes, share (of the dense model's bytes), exact.
    """
    original = Planned(facts.parameters, facts.bytes, True, facts.stored_dtype or facts.dtype)
    factors = [ExportConfig(quantization=grid, dtype=dtype) for grid in ("none", "int8", "int4") for dtype in ("auto", "bfloat16")]
    usual = [*factors, ExportConfig(form="plain"), ExportConfig(form="dense")]
    forms = {}
    for each in [*usual, config]:  # the last one of a form and dtype is the chosen one
        result = planned(facts, units, source, search, each)
        forms[_form_words(each), result.dtype] = _row(_form_words(each), result, facts.bytes, chosen=each is config)
    return pd.DataFrame([_row("Dense", original, facts.bytes, chosen=False), *forms.values()])


def _form_words(config: ExportConfig) -> str:
    if config.form != "compressed":
        return {"dense": "Dense merge", "plain": "Plain factors"}[config.form]
    grids = {"": config.quantization, "dense layers ": config.dense_quantization}
    return ", ".join(["Factors", *(f"{kind}{grid}" for kind, grid in grids.items() if grid != "none")])


def _row(form: str, result: Planned, original: int, *, chosen: bool) -> dict[str, object]:
    share = result.bytes / original if original else None
    words = form if result.exact else f"{form}, at most"
    row: dict[str, object] = {"chosen": "→" if chosen else "", "form": words, "dtype": result.dtype}
    return row | {"parameters": result.parameters, "bytes": result.bytes, "share": share, "exact": result.exact}


def files_of(result: Planned, config: ExportConfig) -> list[tuple[str, str]]:
    """Return the names and contents of the folder's files."""
    shards = math.ceil(result.bytes / config.shard_bytes)
    weights = [("model.safetensors", "the weights")]
    if shards > 1:
        weights = [
            (f"model-00001-of-{shards:05}.safetensors …", f"the weights, in at least {shards} files"),
            ("model.safetensors.index.json", "index of tensors and files"),
        ]
    config_words = "the architecture" if config.form == "dense" else "the architecture, and which layers are factors, at which rank"
    code = [("modeling_lowrank.py, lowrank_*.py", "our code, Apache-2.0")] if config.with_code else []
    if config.form == "plain":
        code = [("modeling_lowrank_plain.py", "the two linear layers for each compressed one, Apache-2.0")]
    return [
        *weights,
        ("config.json, generation_config.json", config_words),
        ("tokenizer.json, tokenizer_config.json …", "the tokenizer of the base model"),
        *code,
        ("lowrank.json", "sizes and SHA-256 of the weight files, ranks, settings, versions, measured quality"),
        ("README.md", "the model card"),
        ("LICENSE …", "license of the base model, if any"),
    ]


def runtimes(config: ExportConfig) -> pd.DataFrame:
    """Return the runtimes for the folder: columns runtime, loads (yes or no), how."""
    trusted, plainly = "with `trust_remote_code=True`", "write it as plain factors, or merged"
    alone = {"dense": "as any model", "plain": trusted}.get(
        config.form, trusted if config.with_code else "write it with our code, or plain"
    )
    rows = [
        ("This studio and `lowrank`", True, "`--model FOLDER`"),
        (
            "transformers, with this package installed",
            True,
            "after `import lowrank_core.models.hf`" if config.form == "compressed" else alone,
        ),
        ("transformers alone", config.form != "compressed" or config.with_code, alone),
        (
            "vLLM, with this package installed",
            True,
            {"dense": "as the base model", "plain": "with `--trust-remote-code`"}.get(
                config.form, "as any model: `lowrank serve --engine vllm`"
            ),
        ),
        (
            "vLLM alone",
            config.form != "compressed",
            {"dense": "as the base model", "plain": "with `--trust-remote-code`"}.get(config.form, plainly),
        ),
        ("llama.cpp's converter and others", config.form == "dense", "as the base model" if config.form == "dense" else "runs merged only"),
    ]
    return pd.DataFrame([(name, "yes" if loads else "no", how) for name, loads, how in rows], columns=["runtime", "loads", "how"])


def folder_name_of(source: Source, config: ExportConfig) -> str:
    """Return the folder's name, the relative path in all commands."""
    return config.folder_name(source.healed or source.name)


def folder_of(run: Run, source: Source, config: ExportConfig) -> Path:
    """Return the worker's target folder; an unchanged healed model stays in its own."""
    return run.path / "exports" / folder_name_of(source, config)
