"""Triton: attention of one query per sequence over KV blocks in GPU memory."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _attention_kernel(
    q_ptr, kv_ptr, tables_ptr, first_ptr, lens_ptr, out_ptr, q_stride, out_stride, window, scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The queries of one KV head of one sequence."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lens_ptr + sequence).to(tl.int32)
    table = tables_ptr + tl.load(first_ptr + sequence)
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    in_head = (dims < HEAD_DIM)[None, :]
    inside = (rows < GROUP)[:, None] & in_head
    heads = (head * GROUP + rows)[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + sequence * q_stride + heads, mask=inside, other=0.0)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIMS), tl.float32)
    for start in range(tl.maximum(0, length - window), length, BLOCK_K):
        positions = start + tl.arange(0, BLOCK_K)
        present = positions < length
        blocks = tl.load(table + positions // BLOCK_SIZE, mask=present, other=0)
        first = (
            (blocks.to(tl.int64) * 2 * NUM_KV_HEADS + head) * BLOCK_SIZE + positions % BLOCK_SIZE
        ) * HEAD_DIM
        place = first[:, None] + dims[None, :]
        # What is behind the last token may be no number: it is never read.
        wanted = present[:, None] & in_head
        k = tl.load(kv_ptr + place, mask=wanted, other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee") * scale
        scores = tl.where(present[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(largest - new)
        v = tl.load(kv_ptr + place + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM, mask=wanted, other=0.0)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        largest = new
    acc /= total[:, None]
    tl.store(out_ptr + sequence * out_stride + heads, acc.to(out_ptr.dtype.element_ty), mask=inside)


def paged_attention(
    q: Tensor,
    kv: Tensor,
    tables: Tensor,
    first: Tensor,
    context_lens: Tensor,
    sliding_window: int | None,
    out: Tensor,
) -> None:
    """Attention over each sequence's tokens, the new one's included.

    Args:
        q: [B, num_heads, D]; heads lie side by side, rows may lie apart.
        kv: [num_blocks, 2, num_kv_heads, block_size, D], contiguous.
        tables: [N] int64, the blocks of all sequences.
        first: [B] int64, where those of each begin.
        context_lens: [B] int64, at least 1.
        sliding_window: tokens that a query sees, itself included; None for all.
        out: [B, num_heads * D].
    """
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, block_size = kv.shape[2:4]
    assert kv.is_contiguous()
    assert q.stride(1) == head_dim
    if not len(q):
        return
    group, dims = num_heads // num_kv_heads, max(16, triton.next_power_of_2(head_dim))
    window = sliding_window if sliding_window is not None else 2**30
    scale = math.log2(math.e) / math.sqrt(head_dim)
    _attention_kernel[(len(q), num_kv_heads)](
        q, kv, tables, first, context_lens, out, q.stride(0), out.stride(0), window, scale,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), HEAD_DIM=head_dim,
        DIMS=dims, BLOCK_SIZE=block_size, BLOCK_K=32, num_warps=4,
    )  # fmt: skip
