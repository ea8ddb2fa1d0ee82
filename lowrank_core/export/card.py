"""The model card of an export: what was done to which model, what is left, what was measured, and how to load it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from lowrank_core.compression.build import CompressionReport
from lowrank_core.config.mapping import build
from lowrank_core.export.base_model import BaseModel
from lowrank_core.export.manifest import ExportManifest, report_of
from lowrank_core.files.weights import REGISTERING
from lowrank_core.runs.measurements import BehaviourComparison
from lowrank_core.wording import NO_INTERVAL, fixed_interval, fraction_words

__all__ = ["model_card", "rank_rows", "with_todays_loading"]

_COMPRESSED_REFUSAL = """

In any other way (`from_pretrained`, `pipeline`, `transformers serve`) transformers warns of a quantization type that it does not know,
and refuses the folder: its error speaks of mismatched sizes. Don't follow its advice to set `ignore_mismatched_sizes`: the compressed
layers would be random. Import `lowrank_core.models.hf` first. vLLM reads these factors where lowrank-studio is installed; for other
runtimes, export the plain form (`--form plain`: vLLM) or the dense one (`--form dense`: llama.cpp)."""
_PLAIN_REFUSAL = """

vLLM: `vllm serve path/to/this/folder --trust-remote-code`. Without that option transformers refuses the folder with an error about
mismatched sizes. Don't follow its advice to set `ignore_mismatched_sizes`: the compressed layers would be random."""
_REFUSALS = {"compressed": _COMPRESSED_REFUSAL, "plain": _PLAIN_REFUSAL, "dense": ""}


def model_card(manifest: ExportManifest, report: CompressionReport, base: BaseModel) -> str:
    """Return README.md: metadata that the hub reads, and a text for people."""
    tags = ["low-rank", "compression", "lowrank-studio", *_words(manifest.details, "preset", "basis")]
    carried: dict[str, Any] = {"pipeline_tag": "text-generation", **base.metadata}
    data = ModelCardData(base_model=base.repository, library_name="transformers", tags=tags, **carried)
    sections = (
        _head(manifest, base),
        _sizes(manifest, report),
        _ranks(report),
        _figures(manifest),
        _behaviour(manifest),
        _warned(manifest),
        _made(manifest, base),
        _loading(manifest),
    )
    body = "\n\n".join([*filter(None, sections), _licence(base)])
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def _words(details: Mapping[str, object], *names: str) -> list[str]:
    return [str(details[name]) for name in names if details.get(name)]


def _head(manifest: ExportManifest, base: BaseModel) -> str:
    method = ", ".join(
        f"{name} `{manifest.details[name]}`"
        for name in ("preset", "basis", "storage", "quantization", "rounding", "allocation")
        if manifest.details.get(name)
    )
    form = {
        "compressed": "Linear layers are quantised." if _quantised_dense(manifest) else "Linear layers are stored as low-rank factors.",
        "plain": "Each compressed linear layer is stored as two (`down`, `up`), by a module of this folder.",
        "dense": "The low-rank factors are multiplied out into the plain architecture: any runtime reads it, and **it is not smaller**.",
    }[manifest.form]
    imported = manifest.details.get("imported_form")
    made = f"as factors in the form of {imported}, and written by lowrank-studio" if imported else "by lowrank-studio"
    return f"# {base.reference}, compressed\n\nMade from `{base.reference}` {made}{f' ({method})' if method else ''}. {form}"


def _quantised_dense(manifest: ExportManifest) -> bool:
    return not manifest.details.get("units") and str(manifest.details.get("quantization", "")).startswith("dense layers")


def _sizes(manifest: ExportManifest, report: CompressionReport) -> str:
    rows = [
        ("parameters of the compressible linears", report.linear_parameters_before, report.linear_parameters_after),
        ("parameters of the model", report.parameters_before, report.parameters_after),
        ("bytes of the weights, in the base model's float dtype", report.bytes_before, report.bytes_after),
    ]
    lines = [f"| {name} | {before:,} | {after:,} | {1 - after / before:.1%} |" for name, before, after in rows]
    table = _table(("", "before", "after", "removed"), lines)
    coverage = report.dense_coverage
    table += f"\n\nOf the base model, {coverage.statement()}. {coverage.ratio_words(report.compression_ratio)}."
    files = f"The files here hold {manifest.written_parameters:,} numbers in {manifest.written_bytes:,} bytes ({manifest.stored_dtype})."
    if manifest.guards:
        files += f" {manifest.guards} empty tensors guard the compressed layers (see Loading): they hold no numbers and no bytes of data."
    if manifest.form == "dense":
        files += f" Stored as factors they would be {report.parameters_after:,}: the dense form is for runtimes that read no other."
    elif manifest.written_parameters > report.parameters_after and manifest.form == "plain":
        files += f" The form compressed would hold {report.parameters_after:,}: this one shares no factors, and leaves out no rows."
    files += dropped_biases(manifest)
    return f"## Size\n\n{table}\n\n{files}"


def written_words(manifest: ExportManifest) -> str:
    """Return what a folder holds, for a terminal: its counts as it was written, and where that makes nothing smaller."""
    report = report_of(manifest)
    written = f"{manifest.written_parameters:,} numbers in {manifest.written_bytes:,} bytes"
    removed = (
        f"{report.compression_ratio:.1%} of the compressible linears' parameters removed "
        f"({report.linear_parameters_before:,} to {report.linear_parameters_after:,}), "
        f"{report.model_compression_ratio:.1%} of the whole model"
    )
    if manifest.form == "dense":
        plain = f"{written}, multiplied out into the plain architecture: no smaller than the dense model."
        return f"{plain} As factors: {removed}. {report.dense_coverage.statement()}.{dropped_biases(manifest)}"
    if not report.grids:
        return f"{written}; {removed}. {report.dense_coverage.statement()}."
    share = 1 - report.bytes_after / report.bytes_before
    size = (
        f"quantised ({report.quantization}): {share:.1%} of the model's bytes removed ({report.bytes_before:,} to {report.bytes_after:,})"
    )
    return f"{written}, {size}{'' if _quantised_dense(manifest) else f'; {removed}'}. {report.dense_coverage.statement()}."


def dropped_biases(manifest: ExportManifest) -> str:
    """Return a sentence on the biases that a dense form left out, and what that costs; empty where there are none."""
    dropped = manifest.details.get("dropped_biases")
    if not isinstance(dropped, dict):
        return ""
    before, after = dropped.get("perplexity_with_them"), manifest.measured
    cost = (
        "what that costs was not measured"
        if before is None or after is None
        else f"perplexity {after.perplexity:.6g} in place of {before:.6g}"
    )
    return f" The architecture has no place for the biases that the metric gave {dropped['layers']} layers, so they were left out: {cost}."


def rank_rows(report: CompressionReport) -> list[tuple[str, int, int, float, int]]:
    """Return module type, number compressed, and minimum, median and maximum rank, in model order."""
    result: dict[str, list[int]] = {}
    for name, rank in report.ranks.items():
        if rank is not None:
            result.setdefault(_kind(name), []).append(rank)
    return [(kind, len(ranks), min(ranks), median(ranks), max(ranks)) for kind, ranks in result.items()]


def _kind(unit: str) -> str:
    """Return the type of a unit's modules: their paths within a block, of experts without their numbers."""
    paths = (re.sub(r"^.*?\.\d+\.", "", member) for member in unit.split("+"))
    return " + ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".", path) for path in paths))


def _ranks(report: CompressionReport) -> str:
    rows = [f"| {kind} | {count} | {minimum} | {middle:g} | {maximum} |" for kind, count, minimum, middle, maximum in rank_rows(report)]
    table = _table(("module type", "compressed", "least rank", "median", "largest"), rows)
    dense = sum(rank is None for rank in report.ranks.values())
    kept = f" {dense} {'others stay' if rows else 'layers stay'} dense." if dense else ""
    counts = Counter(report.grids.values())
    rounded = f" Quantised: {', '.join(f'{count} to {name}' for name, count in sorted(counts.items()))}." if counts else ""
    return f"## Ranks\n\n{table if rows else 'No layer has factors.'}\n\nEvery rank and grid is in `lowrank.json`.{kept}{rounded}"


def _figures(manifest: ExportManifest) -> str:
    parts = []
    rows = manifest.figures.get("perplexity")
    if isinstance(rows, Mapping):
        lines = [f"| {name} | {row['perplexity']:.3f} | {fixed_interval(row.get('interval'), 3)} |" for name, row in rows.items()]
        warnings = "".join(f"\n\n**Warning**: {warning}" for warning in _sentences(manifest.figures.get("warnings")))
        parts.append(f"{_table(('', 'perplexity', '95 % interval'), lines)}{warnings}\n\nProtocol: {manifest.figures.get('protocol')}.")
    result = manifest.measured
    if result is not None:
        words = fixed_interval(result.perplexity_interval, 3)
        low_high = words if words == NO_INTERVAL else f"95 % interval {words}"
        parts.append(
            f"This folder, loaded and run in {result.protocol.dtype}: perplexity {result.perplexity:.3f} ({low_high}). "
            f"Protocol: {result.protocol.line}. `lowrank verify --model .` measures it again."
        )
    return "## Perplexity\n\n" + "\n\n".join(parts or ["Not measured when this was written."])


def _behaviour(manifest: ExportManifest) -> str:
    """Return how the model repeats itself and ends, next to the dense one; nothing where it was not measured."""
    measured = manifest.figures.get("behaviour")
    if not isinstance(measured, Mapping):
        return ""
    result = build(BehaviourComparison, measured, "lowrank.json")
    lines = [
        f"| {name} | {fraction_words(row.repeated)} | {row.ended_words} | {row.tokens:.1f} | {'–' if ratio is None else f'{ratio:.2f}'} |"
        for name, row, ratio in result.rows
    ]
    table = _table(("", "repeated 4-grams", "ended by themselves", "tokens", "length over dense"), lines)
    return f"## Behaviour\n\n{table}\n\nProtocol: {result.protocol}."


def _sentences(result: object) -> list[str]:
    return [str(sentence) for sentence in result] if isinstance(result, list | tuple) else []


def _warned(manifest: ExportManifest) -> str:
    """Return what was reported when it was made; nothing where nothing was, or by an earlier version."""
    lines = [f"* {warning}" for warning in _sentences(manifest.details.get("warnings"))]
    return "\n".join(["## Warnings\n", *lines]) if lines else ""


def _made(manifest: ExportManifest, base: BaseModel) -> str:
    used = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    command = manifest.details.get("command")
    text = f"## How it was made\n\nVersions: {used}. Settings and seeds are in `lowrank.json`."
    text = " ".join([text, *(f"The base model: {note}" for note in base.notes)])
    return f"{text}\n\n```bash\n{command}\n```" if command else text


def with_todays_loading(card: str, *, with_code: bool) -> str:
    """Return an earlier version's card of a compressed model with today's section on loading; the card may be empty."""
    section = _loading_section("compressed", "AutoModelForCausalLM", with_code=with_code)
    before, heading, rest = card.partition("## Loading\n")
    _, following, after = rest.partition("\n## ")
    return f"{before if heading else before.rstrip() + chr(10) * 2}{section}\n{following}{after}".lstrip("\n")


def _loading(manifest: ExportManifest) -> str:
    return _loading_section(manifest.form, manifest.auto_class, with_code=manifest.with_code)


def _loading_section(form: str, auto_class: str, *, with_code: bool) -> str:
    ways = []
    if form == "dense":
        ways.append(("With transformers, or any runtime that reads its checkpoints", "", ""))
    elif form == "plain":
        ways.append(("With transformers, by the module in this folder", "", ", trust_remote_code=True"))
    else:
        ways.append(("With lowrank-studio installed", REGISTERING, ""))
    if with_code:
        ways.append(("Without it, by the code in this folder", "", ", trust_remote_code=True"))
    text = "\n\n".join(
        f"{title}:\n\n```python\n{first}from transformers import {auto_class}, AutoTokenizer\n\n"
        f'model = {auto_class}.from_pretrained("path/to/this/folder"{option})\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```'
        for title, first, option in ways
    )
    return f"## Loading\n\n{text}{_REFUSALS[form]}"


def _licence(base: BaseModel) -> str:
    copied = ", ".join(f"`{path.name}`" for path in base.licences)
    files = f" Its files are copied here: {copied}." if copied else ""
    return f"## Licence\n\nThat of the base model goes with what was made of it: {base.licence}.{files}"


def _table(head: Iterable[str], rows: Iterable[str]) -> str:
    names = list(head)
    return "\n".join([f"| {' | '.join(names)} |", "| --- " + "| ---: " * (len(names) - 1) + "|", *rows])
