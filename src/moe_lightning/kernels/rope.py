"""Triton: rotary position embedding of queries and keys, in place in the rows of a fused QKV projection."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate_kernel(
    qkv_ptr, cos_ptr, sin_ptr, row_stride, num_heads, head_dim,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = head_dim // 2
    dims = tl.arange(0, HALF)
    dtype = qkv_ptr.dtype.element_ty
    # The two halves of a row of cosines are alike.
    cos = tl.load(cos_ptr + row * head_dim + dims, mask=dims < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + row * head_dim + dims, mask=dims < half, other=0.0).to(tl.float32)[None, :]
    inside = (heads < num_heads)[:, None] & (dims < half)[None, :]
    pointers = qkv_ptr + row * row_stride + heads[:, None] * head_dim + dims[None, :]
    first = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(pointers + half, mask=inside, other=0.0).to(tl.float32)
    # Rounded once; the reference rounds each product too.
    tl.store(pointers, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(pointers + half, (second * cos + first * sin).to(dtype), mask=inside)


def rotate_(qkv: Tensor, cos: Tensor, sin: Tensor, num_rotated_heads: int) -> None:
    """Turn the first heads of each row, queries and keys; values stay.

    Args:
        qkv: [T, heads * D]; rows may lie apart.
        cos: [T, 1, D] in qkv's dtype, from `reference.rotary`.
        sin: as cos.
        num_rotated_heads: query and key heads.
    """
    num_rows, head_dim = len(qkv), cos.shape[-1]
    if num_rows == 0:
        return
    half = triton.next_power_of_2(head_dim // 2)
    heads = min(triton.next_power_of_2(num_rotated_heads), max(1, 2048 // half))
    grid = (num_rows, triton.cdiv(num_rotated_heads, heads))
    _rotate_kernel[grid](qkv, cos, sin, qkv.stride(0), num_rotated_heads, head_dim, HEADS=heads, HALF=half)
