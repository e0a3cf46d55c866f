"""KV of decode micro-batches on the GPU, for schedules that attend there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_lightning.kernels import ops
from moe_lightning.memory.kv_cache import KVCache

Ints = npt.NDArray[np.int64]
Put = Callable[[npt.NDArray[np.generic], torch.dtype], Tensor]


@dataclass(frozen=True)
class StagedBlocks:
    """Where the blocks of some sequences lie once they are staged: one after the other, sequence by sequence.

    Attributes:
        rows: of the sequences in their micro-batch.
        host_blocks: [N] int64 (host), the cache's numbers of the blocks.
        blocks: the same on the device.
        tables: [B, max_blocks] int64, each sequence's blocks in the slot.
        context_lens: [B] int64, with the new token.
        slots: [B] int64, where in the slot the new token goes.
    """

    rows: slice
    host_blocks: Tensor
    blocks: Tensor
    tables: Tensor
    context_lens: Tensor
    slots: Tensor

    @classmethod
    def of(cls, rows: slice, tables: Ints, positions: Ints, block_size: int, put: Put) -> StagedBlocks:
        """For sequences whose new tokens go in at positions [B]; arguments as in `in_turns`."""
        counts = positions // block_size + 1
        is_used = np.arange(tables.shape[1]) < counts[:, None]
        starts = np.cumsum(counts) - counts
        staged = np.where(is_used, starts[:, None] + np.arange(tables.shape[1]), 0)
        blocks = tables[is_used]
        slots = (starts + counts - 1) * block_size + positions % block_size
        return cls(
            rows=rows,
            host_blocks=torch.from_numpy(blocks),
            blocks=put(blocks, torch.int64),
            tables=put(staged, torch.int64),
            context_lens=put(positions + 1, torch.int64),
            slots=put(slots, torch.int64),
        )


def in_turns(
    tables: Ints, positions: Ints, block_size: int, capacity: int, put: Put
) -> tuple[StagedBlocks, ...]:
    """A micro-batch whose new tokens go in at positions [B], all at once where a slot holds its blocks.

    Args:
        tables: [B, max_blocks], each sequence's blocks of the cache, filled up with anything.
        positions: [B].
        block_size: tokens of a block.
        capacity: blocks of a slot, no fewer than any one sequence has.
        put: brings an array to the device as a tensor.
    """
    turns = _turns(positions // block_size + 1, capacity)
    return tuple(StagedBlocks.of(rows, tables[rows], positions[rows], block_size, put) for rows in turns)


def _turns(counts: Ints, capacity: int) -> list[slice]:
    """Consecutive sequences that fill a slot together."""
    turns, start, total = [], 0, 0
    for row, count in enumerate(counts.tolist()):
        assert count <= capacity, f"a sequence of {count} blocks, and a staging slot holds {capacity}"
        if total + count > capacity:
            turns.append(slice(start, row))
            start, total = row, 0
        total += count
    return [*turns, slice(start, len(counts))]


def stage(kv: KVCache, layer: int, staged: StagedBlocks, slot: Tensor) -> None:
    """Bring sequences' blocks of a layer into the beginning of a slot.

    Where the cache is page-locked a kernel gathers them through the link: as copies they would be thousands.

    Args:
        kv: the cache in host memory.
        layer: which.
        staged: the blocks.
        slot: [capacity, 2, num_kv_heads, block_size, D] on the device.
    """
    part = slot[: len(staged.host_blocks)]
    if part.is_cuda and not kv.arena.is_pinned:  # then kernels cannot reach it, and the launcher waits
        part.copy_(kv.layer(layer)[staged.host_blocks])
        return
    ops.load_host_blocks(kv.layer_on(part.device, layer), staged.blocks, part)
