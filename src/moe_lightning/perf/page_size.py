"""Bytes of a page of expert weights, as they are or packed, and where the parts of a packed segment lie.

A page is three segments of rows * hidden_size values each: gate, up, down. A packed segment is

    | low [tiles, 4096] | codes [tiles, 2048] | bases [tiles] | starts [tiles + 1] | escapes [capacity] |
      uint8               uint8                 uint8           int32                int32

as `kernels.packing` says in detail.
"""

from __future__ import annotations

from typing import NamedTuple

TILE = 4096  # values that share a window of exponents; a position in it takes 12 bits
_ALIGNMENT = 16  # bytes: the widest load of a thread
_SYSTEM_PAGE = 4096  # bytes: rows of host memory end with one, so that slices of them can be locked apart
_VALUES_PER_ESCAPE = 512  # an escape takes 4 bytes, so all of them a 128th of a byte per value
_LEAST_ESCAPES = 16
_WORD = 4  # bytes of int32


class SegmentParts(NamedTuple):
    """Byte offsets of a packed segment's parts; each is a multiple of 16.

    Attributes:
        num_tiles: tiles, the last one filled up with zeros.
        capacity: escapes there is room for.
        low: signs and mantissas.
        codes: two exponents' codes a byte.
        bases: first exponent of each tile's window, less 1.
        starts: where each tile's escapes begin in the list, and where the last ones end.
        escapes: exponents outside their tile's window.
        end: bytes of the segment.
    """

    num_tiles: int
    capacity: int
    low: int
    codes: int
    bases: int
    starts: int
    escapes: int
    end: int


def segment_parts(num_values: int) -> SegmentParts:
    """Where the parts of a segment of that many values lie."""
    num_tiles = -(-num_values // TILE)
    capacity = max(_LEAST_ESCAPES, num_tiles * TILE // _VALUES_PER_ESCAPE)
    codes = num_tiles * TILE
    bases = codes + num_tiles * TILE // 2
    starts = _round_up(bases + num_tiles, _ALIGNMENT)
    escapes = _round_up(starts + (num_tiles + 1) * _WORD, _ALIGNMENT)
    end = _round_up(escapes + capacity * _WORD, _ALIGNMENT)
    return SegmentParts(num_tiles, capacity, 0, codes, bases, starts, escapes, end)


def segment_bytes(num_values: int) -> int:
    """Bytes of a packed segment: a multiple of 16."""
    return segment_parts(num_values).end


def page_bytes(hidden_size: int, rows: int, dtype_bytes: int, *, packed: bool) -> int:
    """Bytes of a page.

    Args:
        hidden_size: of the model.
        rows: of the expert's intermediate dimension that are in the page.
        dtype_bytes: of a value that is not packed.
        packed: the page is packed, which only bfloat16 can be, and ends with a page of the system.
    """
    if not packed:
        return 3 * rows * hidden_size * dtype_bytes
    assert dtype_bytes == 2, f"only bfloat16 is packed, not values of {dtype_bytes} bytes"
    return _round_up(3 * segment_bytes(rows * hidden_size), _SYSTEM_PAGE)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
