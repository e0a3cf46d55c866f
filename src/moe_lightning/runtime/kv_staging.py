"""KV of decode micro-batches on the GPU, for schedules that attend there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_lightning.memory.kv_cache import KVCache

Put = Callable[[npt.NDArray[np.generic], torch.dtype], Tensor]


@dataclass(frozen=True)
class StagedBlocks:
    """Where the blocks of a decode micro-batch lie once they are staged: one after the other, sequence by sequence.

    Attributes:
        host_blocks: [N] int64 (host), the cache's numbers of the blocks.
        blocks: the same on the device.
        tables: [B, max_blocks] int64, each sequence's blocks in the slot.
        context_lens: [B] int64, with the new token.
        slots: [B] int64, where in the slot the new token goes.
    """

    host_blocks: Tensor
    blocks: Tensor
    tables: Tensor
    context_lens: Tensor
    slots: Tensor

    @classmethod
    def of(
        cls, tables: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], block_size: int, put: Put
    ) -> StagedBlocks:
        """For sequences whose new tokens go in at positions [B]; `put` brings arrays to the device.

        Args:
            tables: [B, max_blocks], each sequence's blocks of the cache, filled up with anything.
            positions: [B].
            block_size: tokens of a block.
            put: makes a tensor of an array.
        """
        counts = positions // block_size + 1
        is_used = np.arange(tables.shape[1]) < counts[:, None]
        starts = np.cumsum(counts) - counts
        staged = np.where(is_used, starts[:, None] + np.arange(tables.shape[1]), 0)
        blocks = tables[is_used]
        slots = (starts + counts - 1) * block_size + positions % block_size
        return cls(
            host_blocks=torch.from_numpy(blocks),
            blocks=put(blocks, torch.int64),
            tables=put(staged, torch.int64),
            context_lens=put(positions + 1, torch.int64),
            slots=put(slots, torch.int64),
        )


def stage(kv: KVCache, layer: int, staged: StagedBlocks, slot: Tensor) -> None:
    """Bring a micro-batch's blocks of a layer into the beginning of a slot.

    Where the cache is page-locked a kernel gathers them through the link: as copies they would be thousands.

    Args:
        kv: the cache in host memory.
        layer: which.
        staged: the blocks.
        slot: [capacity, 2, num_kv_heads, block_size, D] on the device.

    Raises:
        torch.OutOfMemoryError: they are more than the slot holds; smaller micro-batches will do.
    """
    count = len(staged.host_blocks)
    if count > len(slot):
        raise torch.OutOfMemoryError(
            f"a micro-batch's KV fills {count} blocks, and a staging slot holds {len(slot)}"
        )
    part = slot[:count]
    if part.is_cuda and not kv.arena.is_pinned:  # then kernels cannot reach it, and the launcher waits
        part.copy_(kv.layer(layer)[staged.host_blocks])
        return
    source = kv.layer_on(part.device, layer)
    torch.index_select(_words(source), 0, staged.blocks, out=_words(part))


def _words(blocks: Tensor) -> Tensor:
    """[num_blocks, words]: eight bytes at a time, so that neighbouring threads ask the link for long runs."""
    return blocks.flatten(1).view(torch.int64)
