"""Bfloat16 weights in three quarters of their bytes, without loss: what packs them, and the reference that unpacks.

Exponents of weights lie close together. So each of a tile's 4096 values has a code of 4 bits:

    code 0       the exponent is 0, or it is in the list of escapes
    code 1..15   the exponent is the tile's base + code

An escape is one int32: position in the tile | exponent << 12. A value's other bits are a byte: bit 7 the sign, bits
0..6 the mantissa. Byte i of a tile's codes has value i's code in its low half, and in its high half that of value
i + 2048. `perf.page_size` says where all this lies. Every pattern of bits comes back as it was.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moe_lightning.errors import NotPackableError
from moe_lightning.perf.page_size import TILE, segment_bytes, segment_parts

_TILES_AT_ONCE = 64  # what is made of them meanwhile stays in a core's cache
CODES = 15  # that stand for exponents
NUM_WINDOWS = 8  # that are tried: the first ends with the tile's largest exponent, each other one lower
MANY = 16  # exponents of a tile without a code: twice its share of the list of escapes
_WORDS_AT_ONCE = 128  # that are added up, byte by byte: a byte holds no more than 255
_SIGN_AND_MANTISSA = -0x7F81  # 0x807F as int16


class _Segment(NamedTuple):
    """A packed segment's parts as tensors."""

    low: Tensor  # [tiles, TILE] uint8
    codes: Tensor  # [tiles, TILE / 2] uint8
    bases: Tensor  # [tiles] uint8
    starts: Tensor  # [tiles + 1] int32
    escapes: Tensor  # [capacity] int32

    @classmethod
    def of(cls, packed: Tensor, num_values: int) -> _Segment:
        parts = segment_parts(num_values)
        tiles, words = parts.num_tiles, packed.view(torch.int32)
        starts, escapes = parts.starts // 4, parts.escapes // 4
        return cls(
            packed[: parts.codes].view(tiles, TILE),
            packed[parts.codes : parts.bases].view(tiles, TILE // 2),
            packed[parts.bases : parts.bases + tiles],
            words[starts : starts + tiles + 1],
            words[escapes : escapes + parts.capacity],
        )


def pack(values: Tensor, out: Tensor) -> None:
    """Pack values into `out`; all of its bytes are written, the same ones every time.

    Args:
        values: bfloat16 of any shape, n of them; packed on their device.
        out: [segment_bytes(n)] uint8, contiguous, beginning at a multiple of 4 bytes; on any device.

    Raises:
        NotPackableError: the values have too many exponents far apart; what `out` holds then is not to be used.
    """
    num_values = values.numel()
    assert values.dtype is torch.bfloat16
    check(out, num_values)
    packed = out if out.device == values.device else torch.empty_like(out, device=values.device)
    segment, bits = _Segment.of(packed.zero_(), num_values), values.reshape(-1).view(torch.int16)
    num_escapes, capacity = 0, len(segment.escapes)
    for first in range(0, len(segment.bases), _TILES_AT_ONCE):
        tiles = slice(first, min(first + _TILES_AT_ONCE, len(segment.bases)))
        num_escapes += _pack_tiles(bits, segment, tiles, num_escapes)
    check_escapes(num_escapes, capacity, num_values)
    if packed is not out:
        out.copy_(packed)


def _pack_tiles(bits: Tensor, segment: _Segment, tiles: slice, before: int) -> int:
    """Pack some tiles; returns how many escapes they have, which come after `before` others."""
    num_tiles = tiles.stop - tiles.start
    bits = bits[tiles.start * TILE : tiles.stop * TILE]
    bits = F.pad(bits, (0, num_tiles * TILE - len(bits))).view(num_tiles, TILE)
    segment.low[tiles].copy_((bits & 0x7F) | ((bits >> 8) & 0x80))
    exponents = ((bits >> 7) & 0xFF).to(torch.uint8)
    bases = segment.bases[tiles].copy_(_bases(exponents))
    without_code = _without_code(exponents, bases)
    codes = (exponents - bases[:, None]).mul_(1 - without_code)
    torch.bitwise_or(codes[:, : TILE // 2], codes[:, TILE // 2 :] << 4, out=segment.codes[tiles])
    escapes = without_code.mul_(exponents.clamp(max=1))  # a zero needs no code but 0
    ends = _count(escapes).cumsum(0) + before
    segment.starts[tiles.start + 1 : tiles.stop + 1].copy_(ends)
    after = int(ends[-1])
    if before < after <= len(segment.escapes):
        at = _positions(escapes)
        words = exponents.view(-1)[at].int() << 12
        segment.escapes[before:after].copy_(words | at % TILE)
    return after - before


def _bases(exponents: Tensor) -> Tensor:
    """Where a window of each tile begins that covers most of its exponents [tiles, TILE] uint8: [tiles] uint8.

    Of weights it ends at the largest exponent or little below, and only such windows are tried. Where these miss
    many, as when one weight is far larger than all others or not a number, it is the best of all.
    """
    top = exponents.amax(1).int()
    bases = [(top - k - CODES).clamp_(min=0).to(torch.uint8) for k in range(NUM_WINDOWS)]
    missed = torch.stack([_count(_without_code(exponents, base)) for base in bases])
    best = torch.stack(bases).gather(0, missed.argmin(0, keepdim=True))[0]  # of equally good ones the first
    many = (
        missed.amin(0) - _count(1 - exponents.clamp(max=1)) > MANY
    )  # zeros, which need no window, are among them
    bad = many.nonzero().flatten()
    if len(bad):
        best[bad] = _best_of_all(exponents[bad])
    return best


def _best_of_all(exponents: Tensor) -> Tensor:
    """As `_bases`, from a histogram of each tile."""
    rows = torch.arange(len(exponents), device=exponents.device)[:, None] * 256
    counts = (rows + exponents).flatten().bincount(minlength=256 * len(exponents)).view(-1, 256)
    up_to = counts.cumsum(1)
    covered = up_to[:, CODES:] - up_to[:, :-CODES]  # of each base, 0 to 240
    return (covered.shape[1] - 1 - covered.flip(1).argmax(1)).to(
        torch.uint8
    )  # of equally good ones the highest


def _without_code(exponents: Tensor, bases: Tensor) -> Tensor:
    """1 for exponents that are 0 or outside their tile's window, else 0.

    In arithmetic of bytes, which torch does with a CPU's wide instructions, as it does not compare. Bytes wrap
    around: what is not above its base comes out above the window, since no base is over 240.
    """
    return (exponents - (bases + 1)[:, None]).clamp_(min=CODES - 1).sub_(CODES - 1).clamp_(max=1)


def _count(ones: Tensor) -> Tensor:
    """Sums of rows [tiles, TILE] of bytes that are 0 or 1: eight columns at a time, as words of 8 bytes."""
    return ones.view(torch.int64).view(len(ones), -1, _WORDS_AT_ONCE).sum(2).view(torch.uint8).sum(1)


def _positions(ones: Tensor) -> Tensor:
    """Where contiguous bytes are 1, in order; int64. Most words of 8 bytes have none."""
    words = ones.view(-1, 8)
    at = words.view(torch.int64).view(-1).nonzero()  # [words with a 1, 1]
    inside = words[at[:, 0]].nonzero()
    return at[inside[:, 0], 0] * 8 + inside[:, 1]


def unpack(packed: Tensor, num_values: int) -> Tensor:
    """The values that a segment was packed from: [num_values] bfloat16.

    Args:
        packed: [segment_bytes(num_values)] uint8, contiguous, beginning at a multiple of 4 bytes.
        num_values: n.
    """
    check(packed, num_values)
    low, codes, bases, starts, escapes = _Segment.of(packed, num_values)
    codes = torch.cat((codes & 15, codes >> 4), dim=1)
    exponents = (codes + bases[:, None]).mul_(codes.clamp(max=1)).view(-1)
    words = escapes[: int(starts[-1])]
    tiles = torch.arange(len(bases), device=packed.device).repeat_interleave(starts.diff())
    exponents[tiles * TILE + words % TILE] = (words >> 12).to(torch.uint8)
    # A byte that is made wider as a signed one brings its sign to bit 15.
    bits = (low.view(-1).view(torch.int8).short() & _SIGN_AND_MANTISSA) | (exponents.short() << 7)
    return bits[:num_values].view(torch.bfloat16)


def unpack_pages(packed: Tensor, table: Tensor, first: int, count: int, out: Tensor, num_values: int) -> None:
    """As `ops.unpack_pages`."""
    size = segment_bytes(num_values)
    for page, frame in enumerate(table[first : first + count].tolist(), start=first):
        row = page % len(out)
        for segment in range(3):
            values = unpack(packed[frame, segment * size : (segment + 1) * size], num_values)
            out[row, segment * num_values : (segment + 1) * num_values].copy_(values)


def check(packed: Tensor, num_values: int) -> None:
    """That a tensor can hold the segment of so many values."""
    assert packed.dtype is torch.uint8
    assert packed.shape == (segment_bytes(num_values),), f"{packed.shape} for {num_values} values"
    assert packed.is_contiguous()


def check_escapes(num_escapes: int, capacity: int, num_values: int) -> None:
    """That the list of escapes has room for all.

    Raises:
        NotPackableError: it has not.
    """
    if num_escapes > capacity:
        raise NotPackableError(
            f"{num_escapes} of {num_values} weights have exponents outside their windows, and a packed segment has "
            f"room for {capacity}; load them as they are, with packing=off"
        )
