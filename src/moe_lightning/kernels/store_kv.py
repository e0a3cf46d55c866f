"""Triton: keys and values of a chunk of prompts into blocks of the KV cache, written by the kernel itself.

One launch, by few programs: they wait for the link, and the GPU computes meanwhile. By indexing, PyTorch needs four
kernels for it that want all of the GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 128


@triton.jit(do_not_specialize=["num_tokens"])
def _store_kernel(
    k_ptr, v_ptr, slots_ptr, kv_ptr, num_tokens, row_stride, num_heads,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    heads, dims = tl.arange(0, HEADS)[:, None], tl.arange(0, DIMS)[None, :]
    inside = (heads < num_heads) & (dims < HEAD_DIM)
    half = num_heads * BLOCK_SIZE * HEAD_DIM  # a block's keys, then its values
    for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        slot = tl.load(slots_ptr + token)
        row = tl.cast(token, tl.int64) * row_stride + heads * HEAD_DIM + dims
        to = (
            slot // BLOCK_SIZE * (2 * half)
            + slot % BLOCK_SIZE * HEAD_DIM
            + heads * (BLOCK_SIZE * HEAD_DIM)
            + dims
        )
        tl.store(kv_ptr + to, tl.load(k_ptr + row, mask=inside), mask=inside)
        tl.store(kv_ptr + to + half, tl.load(v_ptr + row, mask=inside), mask=inside)


def store_kv(kv: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """As `reference.store_kv`; the blocks may be page-locked memory as `memory.mapped.device_view` shows it.

    Args:
        kv: [num_blocks, 2, num_kv_heads, block_size, D], contiguous.
        k: [T, num_kv_heads, D], whose rows may lie apart.
        v: as k.
        slots: [T] int64.
    """
    (num_tokens, num_heads, head_dim), block_size = k.shape, kv.shape[3]
    assert kv.is_contiguous()
    assert kv.dtype == k.dtype == v.dtype
    assert k.stride() == v.stride()
    assert k.stride()[1:] == (head_dim, 1)
    if num_tokens == 0:
        return
    _store_kernel[(min(_PROGRAMS, num_tokens),)](
        k, v, slots, kv, num_tokens, k.stride(0), num_heads,
        BLOCK_SIZE=block_size, HEAD_DIM=head_dim, HEADS=triton.next_power_of_2(num_heads),
        DIMS=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip
