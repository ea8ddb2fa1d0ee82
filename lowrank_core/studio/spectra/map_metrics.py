"""Metrics of the map of modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from lowrank_core.spectra.heavy_tails import outliers
from lowrank_core.spectra.spectrum import LayerSpectrum, effective_rank, participation_ratio, rank_for_energy, stable_rank
from lowrank_core.studio.sensitivity.sensitivity_table import FLOOR
from lowrank_core.studio.shared.formatting import number, percent
from lowrank_core.studio.shared.module_choices import RunFacts
from lowrank_core.types import Vector

__all__ = ["METRICS", "SOURCES", "Metric", "Reading", "energies_of", "offered", "sources_of", "tail_words"]

SOURCES: Mapping[str, str] = MappingProxyType({"features": "Features (outputs)", "weights": "Weights"})


@dataclass(frozen=True)
class Reading:
    """A metric of one module, as value and text."""

    value: float
    words: str


Reader = Callable[[LayerSpectrum, str, RunFacts], Reading | None]


@dataclass(frozen=True)
class Metric:
    """A metric of a module.

    Attributes:
        measure: what is shown, with its unit, for an axis.
        read: (spectrum, source, facts) -> the figure; None where it is not defined, for the reason ``missing``.
        sources: names in SOURCES that it can be of; none where it is the module's own.
        ranks: whether it counts ranks, and can be shown as a share of full rank.
        share: whether it is a fraction in [0, 1], to be shown as percent.
        from_zero: whether the colour scale begins at 0, or at the minimum.
        log: whether colours follow the logarithm.
        known: whether a run has it.
    """

    name: str
    label: str
    meaning: str
    read: Reader
    measure: str = "Ranks"
    sources: tuple[str, ...] = tuple(SOURCES)
    ranks: bool = True
    share: bool = False
    from_zero: bool = True
    missing: str = "not defined"
    log: bool = False
    known: Callable[[RunFacts], bool] = field(default=lambda facts: True)


def energies_of(spectrum: LayerSpectrum, source: str) -> Vector:
    """Return σ² or λ, descending."""
    return np.maximum(spectrum.feature_eigenvalues, 0.0) if source == "features" else spectrum.weight_energy


def _in_ranks(figure: Callable[[Vector], float]) -> Reader:
    def read(spectrum: LayerSpectrum, source: str, facts: RunFacts) -> Reading | None:
        value, full = figure(energies_of(spectrum, source)), spectrum.shape.max_rank
        return Reading(value, f"{number(value)} of {full} ranks ({percent(value / full, 0)})") if value > 0 else None

    return read


def _rank_for(share: float) -> Metric:
    return Metric(
        f"rank_{round(100 * share)}",
        f"Rank for {share:.0%} energy".replace("%", " %"),
        f"the smallest rank that retains {share:.0%}".replace("%", " %"),
        _in_ranks(lambda energies: float(rank_for_energy(energies, share))),
        missing="a matrix of zeros",
    )


def tail_words(spectrum: LayerSpectrum, source: str) -> str:
    """Return the fitted power law and its range in words; empty without one."""
    fit = spectrum.feature_tail if source == "features" else spectrum.weight_tail
    if fit is None:
        return ""
    largest = float(energies_of(spectrum, source)[0])
    return (
        f"α = {fit.alpha:.2f} ± {fit.error:.2f}, fitted to the largest {fit.count} of {fit.total} eigenvalues "
        f"(from {number(fit.minimum / largest)} of the largest up; Kolmogorov-Smirnov distance {fit.distance:.2f})"
    )


def _alpha(spectrum: LayerSpectrum, source: str, facts: RunFacts) -> Reading | None:
    fit = spectrum.feature_tail if source == "features" else spectrum.weight_tail
    return Reading(fit.alpha, tail_words(spectrum, source)) if fit is not None else None


def _outliers(spectrum: LayerSpectrum, source: str, facts: RunFacts) -> Reading | None:
    shape = spectrum.shape
    if not spectrum.weight_energy.any():
        return None
    result = outliers(spectrum.weight_energy, shape.d_out, shape.d_in)
    return Reading(float(result), f"{result} of {shape.max_rank} singular values beyond the bulk")


def _kept(spectrum: LayerSpectrum, source: str, facts: RunFacts) -> Reading | None:
    choice = facts.choices.get(spectrum.shape.name)
    return Reading(choice.kept, f"{facts.trial}: {choice.words}") if choice is not None else None


def _cost(spectrum: LayerSpectrum, source: str, facts: RunFacts) -> Reading | None:
    kl = None if facts.kept is None else facts.costs[facts.kept].get(spectrum.shape.name)
    if kl is None or kl <= FLOOR:
        return None
    return Reading(kl, f"{number(kl)} nats per token where it alone keeps {percent(facts.kept, 0)}")


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric(
                "effective_rank", "Effective rank", "exp of the entropy of the energies", _in_ranks(effective_rank), missing="no energy"
            ),
            Metric("stable_rank", "Stable rank", "all energy over the largest", _in_ranks(stable_rank), missing="no energy"),
            Metric(
                "participation_ratio",
                "Participation ratio",
                "squared sum of the energies over the sum of their squares",
                _in_ranks(participation_ratio),
                missing="no energy",
            ),
            _rank_for(0.90),
            _rank_for(0.95),
            _rank_for(0.99),
            Metric(
                "alpha",
                "Power-law exponent α",
                "exponent of the eigenvalues' density in its tail, p(λ) ∝ λ^-α, by maximum likelihood from the λ that fits best "
                "(Clauset et al. 2009, as WeightWatcher does); the smaller, the heavier the tail",
                _alpha,
                measure="α",
                ranks=False,
                from_zero=False,
                missing="too few eigenvalues for a tail",
            ),
            Metric(
                "outliers",
                "Outliers of the Marchenko-Pastur bulk",
                "singular values beyond what a random matrix with the same variance of entries has in 99 of 100 cases",
                _outliers,
                measure="Singular values",
                sources=("weights",),
                missing="a matrix of zeros",
            ),
            Metric(
                "kept",
                "Kept by the chosen trial",
                "fraction of the module's parameters that the chosen (else the best) trial keeps; 100 % is dense",
                _kept,
                measure="Parameters kept",
                sources=(),
                ranks=False,
                share=True,
                missing="not in the trial",
                known=lambda facts: bool(facts.choices),
            ),
            Metric(
                "cost",
                "Measured loss",
                "KL to the dense model on validation text when this module alone is compressed, from the Sensitivity page",
                _cost,
                measure="KL, nats per token",
                sources=(),
                ranks=False,
                from_zero=False,
                missing="not measured, or below rounding",
                log=True,
                known=lambda facts: bool(facts.costs),
            ),
        )
    }
)


def sources_of(spectra: Sequence[LayerSpectrum]) -> dict[str, str]:
    """Return name -> label of the sources that ``spectra`` have: before a calibration, weights alone."""
    return {name: label for name, label in SOURCES.items() if name == "weights" or spectra[0].calibrated}


def offered(facts: RunFacts) -> list[str]:
    """Return the names of the metrics available in a run."""
    return [name for name, metric in METRICS.items() if metric.known(facts)]
