"""Texts: where they come from, and how they are split and cut into windows."""

from lowrank_core.text.overlap import overlap_warnings
from lowrank_core.text.sources import SPLITS, TextDocuments, open_text
from lowrank_core.text.windows import TokenWindows, WindowSet, load_text, load_windows

__all__ = ["SPLITS", "TextDocuments", "TokenWindows", "WindowSet", "load_text", "load_windows", "open_text", "overlap_warnings"]
