"""Warnings on evaluations: too few windows, a model that predicts nothing."""

from __future__ import annotations

import math

from lowrank_core.evaluation.intervals import Sample

__all__ = ["FEW_WINDOWS", "uniform_warning", "window_warning"]

FEW_WINDOWS = 8
"""Below so many, a bootstrap over windows is markedly too narrow: it shrinks the spread by (n - 1) / n, and draws few different samples."""
_STANDARD_ERRORS = 2.0
_ROUNDING = 1e-3  # nats: logits of bfloat16 that are all equal are no better than uniform either


def window_warning(sample: Sample) -> tuple[str, ...]:
    """Return what is to be said of a mean over few windows (of a stride: runs of windows); nothing of eight or more."""
    n = len(sample.means)
    if n >= FEW_WINDOWS:
        return ()
    if n == 1:
        return (
            "one window of text alone: there is no interval, and another window may give quite another figure. Measure on more windows.",
        )
    return (f"{n} windows of text alone: intervals from fewer than {FEW_WINDOWS} are too narrow to go by. Measure on more windows.",)


def uniform_warning(nll: Sample, vocabulary: int, *, name: str, compared: bool) -> tuple[str, ...]:
    """Return what is to be said of a model whose mean NLL is not below ln(vocabulary), that of a uniform guess; else nothing.

    Not below: within two standard errors over windows. ``compared``: KL and agreement with this model are shown.
    """
    uniform = math.log(vocabulary)
    if nll.mean + _STANDARD_ERRORS * (nll.stderr or 0.0) < uniform - _ROUNDING:
        return ()
    rest = ": KL and agreement say nothing" if compared else ""
    return (
        f"{name} is no better than a uniform guess on this text (NLL {nll.mean:.2f} nats, ln {vocabulary:,} = {uniform:.2f}){rest}. "
        "Check its weights, its dtype, and that tokenizer and text are its own.",
    )
