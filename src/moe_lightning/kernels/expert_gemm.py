"""Triton: the products of the experts, with weights found page by page in frames.

A frame holds one page | gate [rows, H] | up [rows, H] | down [H, rows] |, so the whole pool of frames is one matrix
twice over, and one tensor descriptor each serves all experts, layers and passes:

    gate, up: [num_frames * 3 * rows, H]    gate row r of frame f is row (3 f) rows + r, up is `rows` further on
    down:     [num_frames * 3 * H, rows]    down row h of frame f is row (3 f + 2) H + h

Weights come by TMA (`USE_TMA`, Hopper and later) or by plain loads. A tile may reach over the end of a page into
its neighbour: those columns are masked when the result is stored. Along the summed dimension, what is
out of bounds is zero.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(pid, num_blocks, num_n, GROUP_M: tl.constexpr):
    """Row block and column tile of a program: groups of GROUP_M blocks share each weight tile in L2."""
    group = pid // (GROUP_M * num_n)
    first = group * GROUP_M
    size = tl.minimum(num_blocks - first, GROUP_M)
    inner = pid % (GROUP_M * num_n)
    return first + inner % size, inner // size


@triton.jit
def _rows(ptr, start, size: tl.constexpr, end, stride, cols, num_cols, EVEN: tl.constexpr):
    """Rows [start, start + size) at columns `cols` of a row-major matrix; zeros outside."""
    rows = start + tl.arange(0, size)
    pointers = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if EVEN:
        return tl.load(pointers, mask=(rows < end)[:, None], other=0.0)
    return tl.load(pointers, mask=(rows < end)[:, None] & (cols < num_cols)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_blocks"], do_not_specialize_on_alignment=["page_table_ptr"])
def gate_up_kernel(
    x,  # [T * K, H] descriptor of the sorted rows, or with GATHER a pointer to the tokens [T, H]
    frames,  # descriptor of [num_frames * 3 * rows, H], or a pointer to the pool
    inter_ptr,  # [T * K, pages * rows], sorted
    sorted_slots_ptr,
    blocks_ptr,
    page_table_ptr,
    num_blocks,
    hidden_size,
    page_rows,
    pages_per_expert,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    USE_TMA: tl.constexpr,
    GATHER: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Write inter = silu(gate x) * (up x) for one row block and BLOCK_N rows of one page."""
    tiles_per_page = tl.cdiv(page_rows, BLOCK_N)
    block, tile = _tile(tl.program_id(0), num_blocks, pages_per_expert * tiles_per_page, GROUP_M)
    expert = tl.load(blocks_ptr + block * 4)
    if expert < 0:
        return
    row = tl.load(blocks_ptr + block * 4 + 1)
    end = tl.load(blocks_ptr + block * 4 + 2)
    page, first = tile // tiles_per_page, (tile % tiles_per_page) * BLOCK_N
    frame = tl.load(page_table_ptr + expert * pages_per_expert + page)
    rows = row + tl.arange(0, BLOCK_M)
    if GATHER:
        slots = tl.load(sorted_slots_ptr + rows, mask=rows < end, other=0)
        tokens = x + (slots // TOP_K).to(tl.int64)[:, None] * hidden_size
    gate_row = frame * (3 * page_rows) + first
    up_row = gate_row + page_rows
    if not USE_TMA:
        gate_ptr = frames + frame.to(tl.int64) * 3 * page_rows * hidden_size
        up_ptr = gate_ptr + page_rows * hidden_size

    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, hidden_size, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        if GATHER:
            if EVEN_K:
                a = tl.load(tokens + cols[None, :])
            else:
                a = tl.load(tokens + cols[None, :], mask=(cols < hidden_size)[None, :], other=0.0)
        else:
            a = x.load([row, k])
        if USE_TMA:
            g = frames.load([gate_row, k])
            u = frames.load([up_row, k])
        else:
            g = _rows(gate_ptr, first, BLOCK_N, page_rows, hidden_size, cols, hidden_size, EVEN_K)
            u = _rows(up_ptr, first, BLOCK_N, page_rows, hidden_size, cols, hidden_size, EVEN_K)
        gate = tl.dot(a, g.T, gate, input_precision="ieee")
        up = tl.dot(a, u.T, up, input_precision="ieee")

    result = gate * tl.sigmoid(gate) * up
    columns = first + tl.arange(0, BLOCK_N)
    width = pages_per_expert * page_rows
    out = inter_ptr + rows.to(tl.int64)[:, None] * width + (page * page_rows + columns)[None, :]
    tl.store(
        out,
        result.to(inter_ptr.dtype.element_ty),
        mask=(rows < end)[:, None] & (columns < page_rows)[None, :],
    )


@triton.jit(
    do_not_specialize=["num_blocks", "num_slots"],
    do_not_specialize_on_alignment=["page_table_ptr", "weights_ptr"],
)
def down_kernel(
    inter,  # [T * K, pages * rows] descriptor or pointer, sorted
    frames,  # descriptor of [num_frames * 3 * H, rows], or a pointer to the pool
    out_ptr,  # [SPLIT_K, num_slots, H]
    weights_ptr,  # [num_slots] float32
    sorted_slots_ptr,
    blocks_ptr,
    page_table_ptr,
    num_blocks,
    num_slots,
    hidden_size,
    page_rows,
    pages_per_expert,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Write out[slot] = weight * down(inter[row]), over one share of the pages' rows."""
    block, tile = _tile(tl.program_id(0), num_blocks, tl.cdiv(hidden_size, BLOCK_N), GROUP_M)
    expert = tl.load(blocks_ptr + block * 4)
    if expert < 0:
        return
    row = tl.load(blocks_ptr + block * 4 + 1)
    end = tl.load(blocks_ptr + block * 4 + 2)
    first = tile * BLOCK_N
    steps_per_page = tl.cdiv(page_rows, BLOCK_K)
    num_steps = steps_per_page * pages_per_expert
    share = tl.cdiv(num_steps, SPLIT_K)
    step_from = tl.program_id(1) * share
    table = page_table_ptr + expert * pages_per_expert
    width = pages_per_expert * page_rows

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # One loop over all pages, so that the pipeline of loads is not drained at the end of each. The frame is looked
    # up a step ahead: the compiler would else keep fewer tiles in flight, to hide the look-up as well.
    frame = tl.load(table + tl.minimum(step_from, num_steps - 1) // steps_per_page)
    for step in range(step_from, tl.minimum(step_from + share, num_steps)):
        page = step // steps_per_page
        k = (step % steps_per_page) * BLOCK_K
        if USE_TMA:
            a = inter.load([row, page * page_rows + k])
            w = frames.load([frame * (3 * hidden_size) + 2 * hidden_size + first, k])
        else:
            cols = k + tl.arange(0, BLOCK_K)
            a = _rows(inter + page * page_rows, row, BLOCK_M, end, width, cols, page_rows, EVEN_K)
            down = frames + (frame.to(tl.int64) * 3 + 2) * page_rows * hidden_size
            w = _rows(down, first, BLOCK_N, hidden_size, page_rows, cols, page_rows, EVEN_K)
        acc = tl.dot(a, w.T, acc, input_precision="ieee")
        frame = tl.load(table + tl.minimum(step + 1, num_steps - 1) // steps_per_page)

    rows = row + tl.arange(0, BLOCK_M)
    slots = tl.load(sorted_slots_ptr + rows, mask=rows < end, other=0)
    acc *= tl.load(weights_ptr + slots, mask=rows < end, other=0.0)[:, None]
    columns = first + tl.arange(0, BLOCK_N)
    place = (tl.program_id(1) * num_slots + slots).to(tl.int64)[:, None] * hidden_size + columns[None, :]
    tl.store(
        out_ptr + place,
        acc.to(out_ptr.dtype.element_ty),
        mask=(rows < end)[:, None] & (columns < hidden_size)[None, :],
    )


@triton.jit
def gather_kernel(
    x_ptr, sorted_slots_ptr, blocks_ptr, out_ptr, hidden_size, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    """Each row's token, so that the rows of an expert lie side by side."""
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(blocks_ptr + 3):
        return
    token = (tl.load(sorted_slots_ptr + row) // TOP_K).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x_ptr + token * hidden_size + cols, mask=cols < hidden_size)
    tl.store(out_ptr + row * hidden_size + cols, values, mask=cols < hidden_size)


@triton.jit(
    do_not_specialize=["num_slots", "first_expert", "num_experts"], do_not_specialize_on_alignment=["ids_ptr"]
)
def combine_kernel(
    out_ptr,
    ids_ptr,
    hidden_ptr,
    num_slots,
    first_expert,
    num_experts,
    hidden_size,
    TOP_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """hidden[t] += the outputs of the token's slots with these experts, in float32 and always in the same order."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < hidden_size
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        expert = tl.load(ids_ptr + token * TOP_K + k).to(tl.int32) - first_expert
        mine = (expert >= 0) & (expert < num_experts)
        for split in tl.static_range(SPLIT_K):
            place = (split * num_slots + token * TOP_K + k) * hidden_size + cols
            total += tl.load(out_ptr + place, mask=inside & mine, other=0.0).to(tl.float32)
    hidden = hidden_ptr + token * hidden_size + cols
    total += tl.load(hidden, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden, total.to(hidden_ptr.dtype.element_ty), mask=inside)
