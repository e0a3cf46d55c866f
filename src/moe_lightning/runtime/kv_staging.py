"""KV of decode micro-batches on the GPU, for attention there."""

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
class PlacedBlocks:
    """Where sequences' KV lies on the device; all tensors are there.

    Attributes:
        tables: [N] int64, each sequence's blocks, one sequence after the other.
        first: [B] int64, where each sequence's begin.
        context_lens: [B] int64, with the new token.
        slots: [B] int64, where the new token goes.
    """

    tables: Tensor
    first: Tensor
    context_lens: Tensor
    slots: Tensor

    @classmethod
    def in_cache(cls, tables: Ints, positions: Ints, block_size: int, put: Put) -> PlacedBlocks:
        """Where the cache has them; arguments as in `in_turns`."""
        return cls._of(tables[_used(tables, positions, block_size)], positions, block_size, put)

    @classmethod
    def in_a_row(cls, positions: Ints, block_size: int, put: Put) -> PlacedBlocks:
        """Where all of them have been brought together, from block 0 on."""
        return cls._of(np.arange((positions // block_size + 1).sum()), positions, block_size, put)

    @classmethod
    def _of(cls, blocks: Ints, positions: Ints, block_size: int, put: Put) -> PlacedBlocks:
        counts = positions // block_size + 1
        ends = np.cumsum(counts)
        slots = blocks[ends - 1] * block_size + positions % block_size
        arrays = (blocks, ends - counts, positions + 1, slots)
        return cls(*(put(array, torch.int64) for array in arrays))


def _used(tables: Ints, positions: Ints, block_size: int) -> npt.NDArray[np.bool_]:
    """Which entries of tables are a sequence's blocks."""
    return np.arange(tables.shape[1]) <= (positions // block_size)[:, None]


@dataclass(frozen=True)
class StagedBlocks:
    """The blocks of some sequences that are staged together: one after the other, sequence by sequence.

    Attributes:
        rows: of the sequences in their micro-batch.
        host_blocks: [N] int64 (host), the cache's numbers of the blocks.
        blocks: the same on the device.
        placed: where they lie then, in the slot.
    """

    rows: slice
    host_blocks: Tensor
    blocks: Tensor
    placed: PlacedBlocks

    @classmethod
    def of(cls, rows: slice, tables: Ints, positions: Ints, block_size: int, put: Put) -> StagedBlocks:
        """For sequences whose new tokens go in at positions [B]; arguments as in `in_turns`."""
        blocks = tables[_used(tables, positions, block_size)]
        placed = PlacedBlocks.in_a_row(positions, block_size, put)
        return cls(rows, torch.from_numpy(blocks), put(blocks, torch.int64), placed)


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
