"""Triton: causal attention over the segments of a chunk, for GPUs and shapes that no library serves."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from moe_lightning.kernels.prefill_plan import BLOCK_Q


@triton.jit(do_not_specialize=["first_out"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, blocks_ptr, row_stride, out_stride, first_out, window, scale, group,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head; rows of q, k and v are rows of the pass."""
    query = tl.load(blocks_ptr + tl.program_id(0) * 4)
    end = tl.load(blocks_ptr + tl.program_id(0) * 4 + 1)
    first = tl.load(blocks_ptr + tl.program_id(0) * 4 + 2)
    head = tl.program_id(1)
    rows = query + tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, DIMS)
    in_head = (dims < HEAD_DIM)[None, :]
    inside = (rows < end)[:, None] & in_head
    q = tl.load(
        q_ptr + rows.to(tl.int64)[:, None] * row_stride + head * HEAD_DIM + dims[None, :],
        mask=inside,
        other=0.0,
    )
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, DIMS), tl.float32)
    start = tl.maximum(first, query - window + 1)
    for key in range(start, tl.minimum(query + BLOCK_Q, end), BLOCK_K):
        keys = key + tl.arange(0, BLOCK_K)
        place = keys.to(tl.int64)[:, None] * row_stride + (head // group) * HEAD_DIM + dims[None, :]
        present = (keys < end)[:, None] & in_head
        k = tl.load(k_ptr + place, mask=present, other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee") * scale
        seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] > rows[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, axis=1))
        # A row that has seen no key yet has no largest score; any finite number keeps -inf - -inf out.
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(largest - base)
        v = tl.load(v_ptr + place, mask=present, other=0.0)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        largest = new
    acc /= tl.where(total == 0.0, 1.0, total)[:, None]
    out = out_ptr + (rows - first_out).to(tl.int64)[:, None] * out_stride + head * HEAD_DIM + dims[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, first_row: int, sliding_window: int | None, out: Tensor
) -> None:
    """Causal attention of each segment over its own prompt.

    Args:
        q: [rows, num_heads, D], indexed by the plan's rows; heads lie side by side, rows may lie apart.
        k: [rows, num_kv_heads, D], with q's stride between rows.
        v: as k.
        blocks: of the plan.
        first_row: the chunk's first row.
        sliding_window: tokens that a query sees, itself included; None for all.
        out: [T, num_heads * D], row 0 is the chunk's first.
    """
    num_heads, head_dim = q.shape[1:]
    if not len(blocks):
        return
    dims = max(16, triton.next_power_of_2(head_dim))
    window = sliding_window if sliding_window is not None else 2**30
    scale = math.log2(math.e) / math.sqrt(head_dim)
    _attention_kernel[(len(blocks), num_heads)](
        q, k, v, out, blocks, q.stride(0), out.stride(0), first_row, window, scale, num_heads // k.shape[1],
        HEAD_DIM=head_dim, DIMS=dims, BLOCK_Q=BLOCK_Q, **_tile(dims, q.dtype.itemsize),
    )  # fmt: skip


def _tile(dims: int, itemsize: int) -> dict[str, int]:
    """Keys at once, warps and loads in flight: as much as registers and the 99 KiB of an L4 hold."""
    if itemsize == 4:  # no tensor cores: operands are in registers
        return {"BLOCK_K": 16, "num_warps": 8, "num_stages": 1}
    if dims > 128:
        return {"BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
