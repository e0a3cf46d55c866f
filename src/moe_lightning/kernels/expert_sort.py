"""Triton: slots sorted by expert, and the row blocks that the expert products work on.

A *slot* is one (token, k) pair, numbered token * top_k + k. Sorting is a stable counting sort: each chunk of slots
counts its experts, then each chunk places its slots after those of the chunks before it. No atomics, so the order
is always the same. Where the experts are some of a layer's, they are counted from the first of them, and slots of
others are in no block and have no place.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024  # slots that one program places
_STEP = 64  # slots looked at together: a [64, experts] table of who goes where


@triton.jit
def _expert_of(ids_ptr, slots, num_slots, first_expert, num_experts):
    """Expert of each slot, counted from `first_expert`; -1 for those of others."""
    ids = tl.load(ids_ptr + slots, mask=slots < num_slots, other=-1).to(tl.int32) - first_expert
    return tl.where((ids >= 0) & (ids < num_experts) & (slots < num_slots), ids, -1)


@triton.jit
def _count(
    ids_ptr,
    slots_from,
    num_slots,
    first_expert,
    num_experts,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Slots of each expert [EXPERTS] in the chunk that begins at `slots_from`."""
    experts = tl.arange(0, EXPERTS)
    counts = tl.zeros((EXPERTS,), tl.int32)
    for start in range(slots_from, tl.minimum(slots_from + CHUNK, num_slots), STEP):
        slots = start + tl.arange(0, STEP)
        ids = _expert_of(ids_ptr, slots, num_slots, first_expert, num_experts)
        counts += tl.sum((ids[:, None] == experts[None, :]).to(tl.int32), axis=0)
    return counts


@triton.jit(
    do_not_specialize=["num_slots", "first_expert", "num_experts"], do_not_specialize_on_alignment=["ids_ptr"]
)
def _count_kernel(
    ids_ptr,
    counts_ptr,
    num_slots,
    first_expert,
    num_experts,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    chunk = tl.program_id(0)
    counts = _count(ids_ptr, chunk * CHUNK, num_slots, first_expert, num_experts, EXPERTS, CHUNK, STEP)
    tl.store(counts_ptr + chunk * EXPERTS + tl.arange(0, EXPERTS), counts)


# Numbers that change from pass to pass are nowhere specialized, nor is where rows begin: jobs would stop to compile
# as one of them is 1 or a multiple of 16 for the first time.
@triton.jit(
    do_not_specialize=["num_slots", "num_chunks", "num_blocks", "first_expert", "num_experts"],
    do_not_specialize_on_alignment=["ids_ptr"],
)
def _place_kernel(
    ids_ptr,
    counts_ptr,
    sorted_slots_ptr,
    blocks_ptr,
    num_slots,
    num_chunks,
    num_blocks,
    first_expert,
    num_experts,
    BLOCK_M: tl.constexpr,
    EXPERTS: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    chunk = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    before = tl.zeros((EXPERTS,), tl.int32)
    if ONE_CHUNK:  # a launch less where only the launches cost time
        total = _count(ids_ptr, 0, num_slots, first_expert, num_experts, EXPERTS, CHUNK, STEP)
    else:
        for first in range(0, num_chunks, 16):
            chunks = first + tl.arange(0, 16)
            table = tl.load(
                counts_ptr + chunks[:, None] * EXPERTS + experts[None, :],
                mask=(chunks < num_chunks)[:, None],
                other=0,
            )
            total += tl.sum(table, axis=0)
            before += tl.sum(tl.where((chunks < chunk)[:, None], table, 0), axis=0)
    starts = tl.cumsum(total, 0) - total

    # Row blocks: an expert's rows in steps of BLOCK_M, experts one after the other; the programs share the work.
    of_expert = (total + BLOCK_M - 1) // BLOCK_M
    last_block = tl.cumsum(of_expert, 0)
    first_row = starts - (last_block - of_expert) * BLOCK_M
    for first in range(chunk * STEP, num_blocks, num_chunks * STEP):
        blocks = first + tl.arange(0, STEP)
        expert = tl.sum((last_block[None, :] <= blocks[:, None]).to(tl.int32), axis=1)
        mine = expert[:, None] == experts[None, :]
        row = tl.sum(tl.where(mine, first_row[None, :], 0), axis=1) + blocks * BLOCK_M
        end = tl.sum(tl.where(mine, (starts + total)[None, :], 0), axis=1)
        inside = blocks < num_blocks
        tl.store(blocks_ptr + blocks * 4, tl.where(expert < num_experts, expert, -1), mask=inside)
        tl.store(blocks_ptr + blocks * 4 + 1, row, mask=inside)
        tl.store(blocks_ptr + blocks * 4 + 2, end, mask=inside)
        tl.store(blocks_ptr + blocks * 4 + 3, tl.zeros_like(row) + tl.sum(total), mask=inside)

    place = starts + before
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, num_slots), STEP):
        slots = start + tl.arange(0, STEP)
        ids = _expert_of(ids_ptr, slots, num_slots, first_expert, num_experts)
        mine = (ids[:, None] == experts[None, :]).to(tl.int32)
        rank = tl.cumsum(mine, 0) - mine
        position = tl.sum(mine * (place[None, :] + rank), axis=1)
        tl.store(sorted_slots_ptr + position, slots, mask=ids >= 0)
        place += tl.sum(mine, axis=0)


def max_blocks(num_slots: int, num_experts: int, block_m: int) -> int:
    """Row blocks that suffice however the slots fall on the experts: each expert may have one that is not full."""
    partial = min(num_experts, num_slots)
    return partial + (num_slots - partial) // block_m


def sort_slots(
    topk_ids: Tensor, experts: range, block_m: int, counts: Tensor, sorted_slots: Tensor, blocks: Tensor
) -> int:
    """Fill `sorted_slots` and `blocks`; returns how many blocks to launch.

    Args:
        topk_ids: [T, K], any integer type, contiguous.
        experts: those whose slots are sorted.
        block_m: rows of a block.
        counts: workspace, [chunks, experts rounded up to a power of two] int32 at least.
        sorted_slots: [T * K] int32 at least: slot of each row, expert by expert.
        blocks: [max_blocks, 4] int32: expert, from 0 for the first of them (-1 for none), first row, end of the
            expert's rows, rows of all.
    """
    num_slots, num_experts = topk_ids.numel(), len(experts)
    num_chunks = triton.cdiv(num_slots, CHUNK)
    num_blocks = max_blocks(num_slots, num_experts, block_m)
    shape = {"EXPERTS": max(16, triton.next_power_of_2(num_experts)), "CHUNK": CHUNK, "STEP": _STEP}
    if num_chunks > 1:
        _count_kernel[(num_chunks,)](topk_ids, counts, num_slots, experts.start, num_experts, **shape)
    _place_kernel[(num_chunks,)](
        topk_ids, counts, sorted_slots, blocks, num_slots, num_chunks, num_blocks,
        experts.start, num_experts, BLOCK_M=block_m, ONE_CHUNK=num_chunks == 1, **shape,
    )  # fmt: skip
    return num_blocks
