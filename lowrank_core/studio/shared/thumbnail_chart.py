"""Thumbnail of a layer x module map for tooltips."""

from __future__ import annotations

import base64
import struct
import zlib
from functools import lru_cache

import numpy as np
from plotly.colors import sample_colorscale, unlabel_rgb

from lowrank_core.studio.shared.chart_style import SEQUENTIAL
from lowrank_core.studio.shared.layer_map import LayerMap

__all__ = ["BLANK", "thumbnail"]

_COLOURS = 64
_EMPTY = _COLOURS  # index of the transparent colour
_ROW, _CELL, _WIDTH, _GAP = 12, 18, 260, 1  # pixels: height of a row, largest width of a cell, width of the picture, between cells


def thumbnail(view: LayerMap) -> str:
    """Return ``view`` as a PNG data URL: a row per module type, a column per block, in the map's colours."""
    values = view.frame.pivot_table(index="kind", columns="depth", values="value", dropna=False)
    grid = values.reindex(index=view.kinds, columns=view.depths).to_numpy(dtype=float)
    span = (view.high - view.low) or 1.0
    shades = np.clip(np.nan_to_num((grid - view.low) / span), 0, 1) * (_COLOURS - 1)
    indices = np.where(np.isfinite(grid), shades.round(), _EMPTY).astype(np.uint8)
    cell = max(2, min(_CELL, _WIDTH // max(1, indices.shape[1])))
    return _png(np.kron(indices, np.ones((_ROW, cell), np.uint8)), cell)


def _png(pixels: np.ndarray, cell: int) -> str:
    pixels = pixels.copy()
    pixels[::_ROW, :] = _EMPTY
    if cell > 2 * _GAP:
        pixels[:, ::cell] = _EMPTY
    height, width = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = [
        _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        _chunk(b"PLTE", _palette()),
        _chunk(b"tRNS", b"\xff" * _COLOURS + b"\0"),
        _chunk(b"IDAT", zlib.compress(rows, 9)),
        _chunk(b"IEND", b""),
    ]
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


@lru_cache(maxsize=1)
def _palette() -> bytes:
    colours = [unlabel_rgb(colour) for colour in sample_colorscale(SEQUENTIAL, _COLOURS)]
    return bytes(round(part) for colour in colours for part in colour) + b"\0\0\0"


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


BLANK = ""
"""No picture, for a trial without ranks or one whose picture was left out: vega-tooltip then draws none."""
