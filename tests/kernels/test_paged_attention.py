"""Decode attention over blocks on the GPU against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_lightning.kernels import reference
from moe_lightning.memory.kv_cache import KVCache
from moe_lightning.models.spec import AttentionSpec
from moe_lightning.runtime.kv_staging import PlacedBlocks, in_turns, stage

pytest.importorskip("triton")
from moe_lightning.kernels.paged_attention import paged_attention

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize(
    ("lengths", "num_heads", "num_kv_heads", "head_dim", "block_size", "window"),
    [
        ((1,), 4, 2, 16, 16, None),
        ((16, 17, 40, 1), 8, 2, 64, 16, None),
        ((33, 5, 100), 3, 1, 80, 4, None),
        ((33, 5, 100), 4, 4, 32, 16, 20),
    ],
)
def test_each_query_sees_its_own_tokens_and_no_others(
    device, dot_dtype, lengths, num_heads, num_kv_heads, head_dim, block_size, window, assert_close
):
    generator = torch.Generator().manual_seed(0)
    need = [-(-n // block_size) for n in lengths]
    order = torch.randperm(sum(need) + 2, generator=generator)
    tables, used = torch.zeros(len(lengths), max(need) + 1, dtype=torch.int64), 0
    for row, count in enumerate(need):
        tables[row, :count] = order[used : used + count]
        used += count
    # Free slots hold what is no number: reading one shows.
    kv = torch.full((len(order), 2, num_kv_heads, block_size, head_dim), float("nan"), dtype=dot_dtype)
    for row, length in enumerate(lengths):
        p = torch.arange(length)
        kv[tables[row, p // block_size], :, :, p % block_size] = torch.randn(
            length, 2, num_kv_heads, head_dim, generator=generator
        ).to(dot_dtype)
    heads = num_heads + 2 * num_kv_heads
    qkv = torch.randn(len(lengths), heads, head_dim, generator=generator).to(dot_dtype)
    lens = torch.tensor(lengths)
    expected = reference.decode_attention(qkv[:, :num_heads], kv, tables, lens, window)
    placed = PlacedBlocks.in_cache(tables.numpy(), lens.numpy() - 1, block_size, _put)
    out = torch.full((len(lengths), num_heads * head_dim), 7.0, dtype=dot_dtype, device=device)
    q = qkv.to(device)[:, :num_heads]
    tables, first, lens = (t.to(device) for t in (placed.tables, placed.first, placed.context_lens))
    paged_attention(q, kv.to(device), tables, first, lens, window, out)
    assert_close(out, expected.flatten(1), dot_dtype)


def test_staged_blocks_are_those_of_each_sequence_in_order():
    kv = KVCache(2, AttentionSpec(4, 2, 8), 12, 4, torch.float32)
    kv.layer(1).copy_(torch.randn(kv.layer(1).shape))
    tables, positions = np.array([[7, 3, 9], [2, 0, 0], [5, 11, 0]]), np.array([8, 3, 4])
    (staged,) = in_turns(tables, positions, 4, 7, _put)
    slot = torch.full((7, *kv.layer(1).shape[1:]), -1.0)
    stage(kv, 1, staged, slot)
    assert staged.rows == slice(0, 3)
    assert torch.equal(slot[:6], kv.layer(1)[[7, 3, 9, 2, 5, 11]])
    assert slot[6].eq(-1).all()
    placed = staged.placed
    assert placed.tables.tolist() == [0, 1, 2, 3, 4, 5]
    assert placed.first.tolist() == [0, 3, 4]
    assert placed.context_lens.tolist() == [9, 4, 5]
    assert placed.slots.tolist() == [2 * 4 + 0, 3 * 4 + 3, 5 * 4 + 0]


def test_blocks_of_the_cache_are_those_of_each_sequence_that_hold_its_tokens():
    tables, positions = np.array([[7, 3, 9, 4], [2, 8, 0, 0], [5, 11, 0, 0]]), np.array([8, 3, 4])
    placed = PlacedBlocks.in_cache(tables, positions, 4, _put)
    assert placed.tables.tolist() == [7, 3, 9, 2, 5, 11]  # 4 and 8 are for tokens to come
    assert placed.first.tolist() == [0, 3, 4]
    assert placed.context_lens.tolist() == [9, 4, 5]
    assert placed.slots.tolist() == [9 * 4 + 0, 2 * 4 + 3, 11 * 4 + 0]
    padded = reference.padded_tables(placed.tables, placed.first, placed.context_lens, 4)
    assert [padded[row, :count].tolist() for row, count in enumerate((3, 1, 2))] == [[7, 3, 9], [2], [5, 11]]


@pytest.mark.parametrize("capacity", range(3, 8))
def test_pieces_are_all_sequences_in_order_and_none_is_more_than_a_slot_holds(capacity):
    tables, positions = np.arange(20).reshape(5, 4), np.array([8, 3, 4, 11, 0])  # 3, 1, 2, 3, 1 blocks
    pieces = in_turns(tables, positions, 4, capacity, _put)
    rows = [row for piece in pieces for row in range(piece.rows.start, piece.rows.stop)]
    assert rows == list(range(5))
    assert all(len(piece.host_blocks) <= capacity for piece in pieces)
    assert torch.cat([piece.blocks for piece in pieces]).tolist() == [0, 1, 2, 4, 8, 9, 12, 13, 14, 16]
    assert all(int(piece.placed.slots.max()) < 4 * len(piece.blocks) for piece in pieces)


def _put(values, dtype):
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
