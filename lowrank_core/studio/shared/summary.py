"""Tables of the report beyond the pages: spectra by type, all measurements, failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from lowrank_core.config.mapping import build
from lowrank_core.runs import JsonMapping
from lowrank_core.spectra.spectrum import LayerSpectrum
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studio.compare.comparison import Comparison, Failure
from lowrank_core.studio.compare.loss_details import comparison_table
from lowrank_core.studio.shared.formatting import kind_label
from lowrank_core.studio.shared.table import frame_of
from lowrank_core.studio.shared.trial_names import kind_of, state_words, trial_label
from lowrank_core.studio.spectra.spectrum_table import atlas_table

__all__ = [
    "by_protocol",
    "comparisons_table",
    "failures",
    "flat_table",
    "min_relative",
    "measured_table",
    "protocol_of",
    "seed_table",
    "type_table",
    "unfinished_table",
]

_MEASURED = (
    *("model", "form", "perplexity", "low", "high", "difference", "difference_low", "difference_high"),
    *("kl", "kl_low", "kl_high", "agreement", "removed", "model_removed", "linears", "parameters", "bytes"),
)


def type_table(spectra: Sequence[LayerSpectrum], metric: str) -> pd.DataFrame:
    """Return a row for each module type: count, and minimum, median and maximum share of full rank by ``metric``.

    Columns type, modules, then ``features_least``, ``features_median``, ``features_most`` and the same of ``weights``, in [0, 1];
    below_even: how many modules have a feature metric below the break-even rank.
    """
    rows = []
    for kind, alike in atlas_table(spectra, metric).groupby("kind", sort=False):
        row: dict[str, object] = {"type": kind_label(str(kind)), "modules": len(alike)}
        for source in ("features", "weights"):
            shares = alike[f"{source}_relative"]
            row |= {f"{source}_least": shares.min(), f"{source}_median": shares.median(), f"{source}_most": shares.max()}
        rows.append(row | {"below_even": int((alike["features"] < alike["break_even"]).sum())})
    return pd.DataFrame(rows)


def min_relative(spectra: Sequence[LayerSpectrum], metric: str) -> LayerSpectrum:
    """Return the module with the lowest feature share of full rank by ``metric``."""
    return spectra[int(atlas_table(spectra, metric)["features_relative"].argmin())]


def protocol_of(comparison: Comparison) -> str:
    """Return the protocol of a comparison in words."""
    if comparison.protocol:
        return comparison.protocol
    bos = "BOS first in every window" if comparison.bos == "window" else "no BOS"
    return (
        f"{comparison.dataset}, {comparison.split} split, context {comparison.context}, {comparison.windows} windows, "
        f"{comparison.tokens:,} tokens, {bos}"
    )


def by_protocol(result: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """Return comparisons by protocol; only equal protocols are comparable."""
    groups: dict[str, list[Comparison]] = {}
    for comparison in result:
        groups.setdefault(protocol_of(comparison), []).append(comparison)
    return groups


def measured_table(result: Sequence[Comparison]) -> pd.DataFrame:
    """Return the dense model as a first row, then a row for each comparison (of one protocol), intervals of 95 % as low and high.

    ``difference`` is compressed - dense perplexity, its interval paired by window; ``form`` says dense, one-shot or healed.
    """
    if not result:
        return pd.DataFrame(columns=list(_MEASURED))
    return comparison_table(result).rename(columns={"allocation": "model"})[list(_MEASURED)]


def comparisons_table(result: Sequence[Comparison]) -> pd.DataFrame:
    """Return the rows of ``measured_table`` for every protocol, with the protocol as a last column."""
    parts = [measured_table(alike).assign(protocol=protocol) for protocol, alike in by_protocol(result).items()]
    return pd.concat(parts, ignore_index=True) if parts else measured_table([])


def failures(bodies: Sequence[JsonMapping]) -> list[Failure]:
    """Return every failed request, the oldest first."""
    refused = [body for body in bodies if not body.get("ok") and "measured" not in body]  # a proof that failed is reported with its model
    return [build(Failure, {"kind": "request", "error": "no reason given", **body}, "an answer") for body in refused]


def unfinished_table(trials: Sequence[TrialRecord]) -> pd.DataFrame:
    """Return a row for each trial without a valid value: name, kind, outcome."""
    unfinished = [trial for trial in trials if trial.state != "complete"]
    return frame_of(unfinished, trial="number", name=trial_label, state=kind_of, reason=state_words)


def flat_table(body: Mapping[str, object]) -> pd.DataFrame:
    """Return a row for each leaf of a nested mapping: its dotted name and its value in words."""
    return pd.DataFrame(list(_leaves(body, "")), columns=["name", "value"])


def _leaves(body: Mapping[str, object], prefix: str) -> list[tuple[str, str]]:
    result: list[tuple[str, str]] = []
    for name, value in body.items():
        if isinstance(value, Mapping):
            result += _leaves(value, f"{prefix}{name}.")
        else:
            result.append((f"{prefix}{name}", "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)))
    return result


def seed_table(body: Mapping[str, object]) -> pd.DataFrame:
    """Return the rows of ``flat_table`` that are seeds."""
    frame = flat_table(body)
    return frame[[str(name).rsplit(".", 1)[-1].endswith("seed") for name in frame["name"]]].reset_index(drop=True)
