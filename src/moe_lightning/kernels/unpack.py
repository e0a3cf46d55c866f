"""Triton: packed pages of expert weights as they were before `packing.pack`, one launch for all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_lightning.perf.page_size import TILE, segment_parts


@triton.jit
def _with_exponents(low, exponents):
    """Bits of values: sign and mantissa from bytes, exponents at their place, in bits 7 to 14 of int32."""
    # A byte that is made wider as a signed one brings its sign to bit 15.
    signed = low.to(tl.int8, bitcast=True).to(tl.int32)
    return ((signed & 0x807F) | exponents).to(tl.int16)


# Where in a layer pages begin changes from call to call.
@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["table_ptr"])
def _unpack_kernel(
    bytes_ptr,
    words_ptr,
    table_ptr,
    out_ptr,
    first,
    num_tiles,
    num_values,
    page_bytes,
    segment_bytes,
    codes_at,
    bases_at,
    starts_at,
    escapes_at,
    out_stride,
    num_rows,
    TILE: tl.constexpr,
):
    HALF: tl.constexpr = TILE // 2
    tile = tl.program_id(0) % num_tiles
    part = tl.program_id(0) // num_tiles
    page, segment = part // 3, part % 3
    frame = tl.load(table_ptr + first + page).to(tl.int64)
    at = frame * page_bytes + segment * segment_bytes
    half = tl.arange(0, HALF)
    codes = tl.load(bytes_ptr + at + codes_at + tile * HALF + half).to(tl.int32)
    low = tl.load(bytes_ptr + at + tile * TILE + half)
    high_low = tl.load(bytes_ptr + at + tile * TILE + HALF + half)
    base = tl.load(bytes_ptr + at + bases_at + tile).to(tl.int32)
    code, high_code = codes & 15, codes >> 4
    exponents = tl.where(code == 0, 0, (base + code) << 7)
    high_exponents = tl.where(high_code == 0, 0, (base + high_code) << 7)

    starts_ptr = words_ptr + (at + starts_at) // 4 + tile
    escapes_ptr = words_ptr + (at + escapes_at) // 4
    for escape in range(tl.load(starts_ptr), tl.load(starts_ptr + 1)):  # hardly ever more than a few
        word = tl.load(escapes_ptr + escape)
        position, exponent = word % TILE, word // TILE << 7
        exponents = tl.where(half == position, exponent, exponents)
        high_exponents = tl.where(half + HALF == position, exponent, high_exponents)

    values = tile * TILE + half
    row = ((first + page) % num_rows).to(tl.int64)
    row = out_ptr + row * out_stride + segment * num_values
    tl.store(row + values, _with_exponents(low, exponents), mask=values < num_values)
    tl.store(row + HALF + values, _with_exponents(high_low, high_exponents), mask=values + HALF < num_values)


def unpack_pages(packed: Tensor, table: Tensor, first: int, count: int, out: Tensor, num_values: int) -> None:
    """As `ops.unpack_pages`."""
    parts = segment_parts(num_values)
    assert packed.dtype is torch.uint8
    assert packed.is_contiguous()
    assert packed.shape[1] >= 3 * parts.end
    assert packed.shape[1] % 16 == 0
    assert out.dtype is torch.bfloat16
    assert out.shape[1] == 3 * num_values
    assert out.stride(1) == 1
    assert first + count <= len(table)
    assert count <= len(out)
    if count == 0:
        return
    # Eight warps: a thread has eight bytes of each load, and stores eight values at once.
    _unpack_kernel[(count * 3 * parts.num_tiles,)](
        packed, packed.view(torch.int32), table, out.view(torch.int16), first, parts.num_tiles, num_values,
        packed.shape[1], parts.end, parts.codes, parts.bases, parts.starts, parts.escapes, out.stride(0), len(out),
        TILE=TILE, num_warps=8,
    )  # fmt: skip
