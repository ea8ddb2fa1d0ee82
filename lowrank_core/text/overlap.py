"""Overlap of a held-out text with calibration text: splits are cut apart by position, and a text may say the same thing twice.

Notation::

    run      16 consecutive tokens of one window, BOS left out
    share    runs of a set of windows that another set holds, too, over all of its runs
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from lowrank_core.text.windows import WindowSet

__all__ = ["overlap_warnings", "repeated_share"]

_RUN = 16
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses nothing modulo 2^64
_NOTABLE = 0.1
"""Of a split: what licences, imports and set phrases repeat stays below."""


def repeated_share(held_out: WindowSet, seen: Iterable[WindowSet]) -> float:
    """Return the share of the runs of ``held_out`` that are in ``seen``, too; 0 where windows hold no run."""
    ours = _runs(held_out)
    theirs = np.concatenate([_runs(windows) for windows in seen])
    return float(np.isin(ours, theirs).mean()) if ours.size else 0.0


def overlap_warnings(calibration: WindowSet, *held_out: WindowSet) -> tuple[str, ...]:
    """Return which of the held-out sets are no new text; each is held against the calibration windows and the sets before it."""
    result, seen = [], [calibration]
    for windows in held_out:
        share = repeated_share(windows, seen)
        if share > _NOTABLE:
            names = " or ".join(each.split for each in seen)
            result.append(
                f"{share:.0%} of the {windows.split} text is in the {names} windows, too (runs of {_RUN} tokens): what is measured on it "
                "looks better than on new text. Take out what the text repeats."
            )
        seen.append(windows)
    return tuple(result)


def _runs(windows: WindowSet) -> npt.NDArray[np.uint64]:
    """Return a hash of every run: Σ id · base^place modulo 2^64."""
    ids = windows.ids[:, int(windows.bos) :].numpy().astype(np.uint64) + np.uint64(1)
    places = ids.shape[1] - _RUN + 1
    if places < 1:
        return np.empty(0, np.uint64)
    result = np.zeros((len(ids), places), np.uint64)
    for offset in range(_RUN):
        result = result * _BASE + ids[:, offset : offset + places]
    return result.ravel()
