"""Keys and values of all sequences, in blocks in host memory."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lightning.memory.arena import host_tensor
from moe_lightning.models.spec import AttentionSpec


class KVCache:
    """One arena; a block has the same number in every layer.

    A layer is [num_blocks, 2, num_kv_heads, block_size, head_dim]: a block's keys, then its values, each
    contiguous per head.
    """

    def __init__(
        self, num_layers: int, attention: AttentionSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> None:
        shape = (num_layers, num_blocks, 2, attention.num_kv_heads, block_size, attention.head_dim)
        self.block_size = block_size
        self._arena = host_tensor(shape, dtype)

    @property
    def num_bytes(self) -> int:
        """Size of the arena."""
        return self._arena.nbytes

    def layer(self, layer: int) -> Tensor:
        """Blocks of one layer: [num_blocks, 2, num_kv_heads, block_size, head_dim]."""
        return self._arena[layer]
