"""One matrix of all experts of a mixture, side by side: tokens seen, ranks, energy."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lowrank_core.spectra.spectrum import LayerSpectrum, effective_rank, rank_for_energy, retained_energy
from lowrank_core.studio.overview.calibration_quality import CalibrationFacts
from lowrank_core.studio.shared.module_choices import RunFacts
from lowrank_core.studio.shared.table import Column, Table

__all__ = ["expert_statement", "expert_table", "experts_spec"]


def expert_table(spectra: Sequence[LayerSpectrum], module: str, calibration: CalibrationFacts | None, facts: RunFacts) -> pd.DataFrame:
    """Return a row for each expert of the mixture that ``module`` belongs to, without one for a module outside a mixture.

    Columns expert, module, tokens (that calibration routed to it; missing where it was not recorded), share (of all that were routed),
    effective_rank and rank_95 (of its features), rank and energy (that it retains of the features) in the chosen trial; missing where
    it stays dense, or there is no trial.
    """
    mixture = next((spectrum.shape.mixture for spectrum in spectra if spectrum.shape.name == module), "")
    alike = [spectrum for spectrum in spectra if mixture and spectrum.shape.mixture == mixture]
    tokens = [_tokens(calibration, spectrum.shape.name) for spectrum in alike]
    total = sum(count for count in tokens if count is not None)
    ranks = [choice.rank if (choice := facts.choices.get(spectrum.shape.name)) else None for spectrum in alike]
    return pd.DataFrame(
        {
            "expert": [spectrum.shape.expert for spectrum in alike],
            "module": [spectrum.shape.name for spectrum in alike],
            "tokens": pd.Series(tokens, dtype="Int64"),
            "share": pd.Series([count / total if count is not None and total else None for count in tokens], dtype=float),
            "effective_rank": [effective_rank(spectrum.feature_eigenvalues) for spectrum in alike],
            "rank_95": [rank_for_energy(spectrum.feature_eigenvalues, 0.95) for spectrum in alike],
            "rank": pd.Series(ranks, dtype="Int64"),
            "energy": pd.Series([_energy(s, rank) for s, rank in zip(alike, ranks, strict=True)], dtype=float),
        }
    )


def _tokens(calibration: CalibrationFacts | None, module: str) -> int | None:
    entry = calibration.input_of(module) if calibration is not None else None
    return round(sum(entry.group_tokens)) if entry is not None and entry.group_tokens else None


def _energy(spectrum: LayerSpectrum, rank: int | None) -> float | None:
    values = spectrum.feature_eigenvalues
    return float(retained_energy(values)[rank - 1]) if rank and values.size and values.sum() > 0 else None


def experts_spec(table: pd.DataFrame) -> Table:
    """Return ``expert_table`` as it is shown."""
    columns = (
        Column.whole("expert", "Expert"),
        Column.whole(
            "tokens", "Tokens routed to it", "Of the calibration windows; moments of an expert with few are mixed with its mixture's."
        ),
        Column.share("share", "Share of all routed"),
        Column.number("effective_rank", "Effective rank, features", 1),
        Column.whole("rank_95", "Rank for 95 %, features"),
        Column.whole("rank", "Rank in the trial"),
        Column.share("energy", "Energy at that rank", digits=2),
    )
    filled = tuple(column for column in columns if not table[column.name].isna().all())
    return Table(table, filled, "Experts of the mixture", "experts")


def expert_statement(table: pd.DataFrame) -> str:
    """Return what the experts differ in, in a sentence."""
    ranks = table["effective_rank"]
    words = f"{len(table)} experts; effective ranks of their features from {ranks.min():.1f} to {ranks.max():.1f}"
    tokens = table["tokens"].dropna()
    if tokens.empty:
        return f"{words}."
    never = int((tokens == 0).sum())
    unseen = f", {never} of them none at all" if never else ""
    return f"{words}; calibration routed {tokens.min():,} to {tokens.max():,} tokens to each{unseen}."
