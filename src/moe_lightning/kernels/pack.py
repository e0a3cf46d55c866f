"""Triton: what `packing.pack` does, in two launches and not in hundreds: a model has thousands of segments."""

from __future__ import annotations

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_lightning.kernels import packing
from moe_lightning.perf.page_size import TILE, SegmentParts, segment_parts

_launching = threading.Lock()  # Triton compiles again for each thread that comes before the first one is done


@triton.jit
def _halves(values_ptr, tile, num_values, TILE: tl.constexpr):
    """A tile's values by their bits, the first half and the other; zeros beyond the last."""
    at = tile * TILE + tl.arange(0, TILE // 2)
    first = tl.load(values_ptr + at, mask=at < num_values, other=0).to(tl.int32)
    other = tl.load(values_ptr + at + TILE // 2, mask=at + TILE // 2 < num_values, other=0).to(tl.int32)
    return first, other


@triton.jit
def _low(bits):
    """Sign and mantissa."""
    return ((bits & 0x7F) | ((bits >> 8) & 0x80)).to(tl.uint8)


@triton.jit
def _without_code(exponents, base, CODES: tl.constexpr):
    """1 for those that are 0 or outside the window of a base, which is 240 at most."""
    return (((exponents - base - 1) & 0xFF) >= CODES).to(tl.int32)


@triton.jit(do_not_specialize=["num_values"])
def _tiles_kernel(
    values_ptr,
    low_ptr,
    codes_ptr,
    bases_ptr,
    counts_ptr,
    num_values,
    TILE: tl.constexpr,
    CODES: tl.constexpr,
    WINDOWS: tl.constexpr,
    MANY: tl.constexpr,
):
    """A tile's bytes but for its escapes, of which it is counted how many there are."""
    tile = tl.program_id(0)
    half = tl.arange(0, TILE // 2)
    first, other = _halves(values_ptr, tile, num_values, TILE)
    tl.store(low_ptr + tile * TILE + half, _low(first))
    tl.store(low_ptr + tile * TILE + TILE // 2 + half, _low(other))
    first, other = (first >> 7) & 0xFF, (other >> 7) & 0xFF
    top = tl.maximum(tl.max(first, 0), tl.max(other, 0))
    zeros = tl.sum((first == 0).to(tl.int32), 0) + tl.sum((other == 0).to(tl.int32), 0)

    base, least = top * 0, top * 0 + TILE + 1
    for window in tl.static_range(WINDOWS):
        here = tl.maximum(top - window - CODES, 0)
        missed = tl.sum(_without_code(first, here, CODES), 0) + tl.sum(_without_code(other, here, CODES), 0)
        base = tl.where(missed < least, here, base)  # of equally good ones the first
        least = tl.minimum(least, missed)
    if least - zeros > MANY:  # as when one weight is far larger than all others: the best of all
        for here in range(256 - CODES):
            missed = tl.sum(_without_code(first, here, CODES), 0) + tl.sum(
                _without_code(other, here, CODES), 0
            )
            base = tl.where(missed <= least, here, base)  # of equally good ones the highest
            least = tl.minimum(least, missed)

    no_code, other_no_code = _without_code(first, base, CODES), _without_code(other, base, CODES)
    codes = tl.where(no_code == 1, 0, first - base) | (tl.where(other_no_code == 1, 0, other - base) << 4)
    tl.store(codes_ptr + tile * (TILE // 2) + half, codes.to(tl.uint8))
    tl.store(bases_ptr + tile, base.to(tl.uint8))
    tl.store(counts_ptr + tile, least - zeros)


@triton.jit(do_not_specialize=["num_values", "capacity"])
def _escapes_kernel(
    values_ptr,
    bases_ptr,
    starts_ptr,
    escapes_ptr,
    num_values,
    capacity,
    TILE: tl.constexpr,
    CODES: tl.constexpr,
):
    """A tile's escapes in their order, to where they begin in the list."""
    tile = tl.program_id(0)
    start = tl.load(starts_ptr + tile)
    if tl.load(starts_ptr + tile + 1) > start:
        half = tl.arange(0, TILE // 2)
        first, other = _halves(values_ptr, tile, num_values, TILE)
        first, other = (first >> 7) & 0xFF, (other >> 7) & 0xFF
        base = tl.load(bases_ptr + tile).to(tl.int32)
        escapes = tl.where(first == 0, 0, _without_code(first, base, CODES))
        other_escapes = tl.where(other == 0, 0, _without_code(other, base, CODES))
        to = start + tl.cumsum(escapes, 0) - 1
        tl.store(escapes_ptr + to, half | (first << 12), mask=(escapes == 1) & (to < capacity))
        to = start + tl.sum(escapes, 0) + tl.cumsum(other_escapes, 0) - 1
        words = (half + TILE // 2) | (other << 12)
        tl.store(escapes_ptr + to, words, mask=(other_escapes == 1) & (to < capacity))


def pack(values: Tensor, out: Tensor) -> None:
    """As `packing.pack`, of values on the GPU."""
    num_values, parts = values.numel(), segment_parts(values.numel())
    assert values.dtype is torch.bfloat16
    packing.check(out, num_values)
    packed = out if out.device == values.device else torch.empty_like(out, device=values.device)
    bits = values.reshape(-1).view(torch.int16)
    with _launching:
        pack_tiles(bits, packed, parts)
        write_escapes(bits, packed, parts)
    num_escapes = int(packed[parts.starts : parts.escapes].view(torch.int32)[parts.num_tiles])
    packing.check_escapes(num_escapes, parts.capacity, num_values)
    if packed is not out:
        out.copy_(packed)


def pack_tiles(bits: Tensor, packed: Tensor, parts: SegmentParts) -> None:
    """All of a segment but the list of escapes, which is zeros then."""
    packed.zero_()
    counts = torch.empty(parts.num_tiles, dtype=torch.int32, device=packed.device)
    _tiles_kernel[(parts.num_tiles,)](
        bits, packed, packed[parts.codes :], packed[parts.bases :], counts, bits.numel(),
        TILE=TILE, CODES=packing.CODES, WINDOWS=packing.NUM_WINDOWS, MANY=packing.MANY, num_warps=8,
    )  # fmt: skip
    starts = packed[parts.starts : parts.escapes].view(torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1 : parts.num_tiles + 1])


def write_escapes(bits: Tensor, packed: Tensor, parts: SegmentParts) -> None:
    """The list, as far as it has room."""
    words = packed.view(torch.int32)
    _escapes_kernel[(parts.num_tiles,)](
        bits, packed[parts.bases :], words[parts.starts // 4 :], words[parts.escapes // 4 :],
        bits.numel(), parts.capacity, TILE=TILE, CODES=packing.CODES, num_warps=8,
    )  # fmt: skip
