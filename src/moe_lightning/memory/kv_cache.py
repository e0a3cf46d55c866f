"""Keys and values of all sequences, in blocks in host memory."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lightning.memory.arena import HostArena, MakeArena
from moe_lightning.memory.mapped import device_view
from moe_lightning.models.spec import AttentionSpec


class KVCache:
    """One arena; a block has the same number in every layer.

    A layer is [num_blocks, 2, num_kv_heads, block_size, head_dim]: a block's keys, then its values, each
    contiguous per head.
    """

    def __init__(
        self,
        num_layers: int,
        attention: AttentionSpec,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        make_arena: MakeArena = HostArena,
    ) -> None:
        block = (2, attention.num_kv_heads, block_size, attention.head_dim)
        self.block_size = block_size
        self.arena = make_arena((num_layers * num_blocks, *block), dtype)
        self._layers = self.arena.tensor.view(num_layers, num_blocks, *block)
        self._device_layers: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the arena."""
        return self.arena.num_bytes

    def layer(self, layer: int) -> Tensor:
        """Blocks of one layer: [num_blocks, 2, num_kv_heads, block_size, head_dim]."""
        return self._layers[layer]

    def layer_on(self, device: torch.device, layer: int) -> Tensor:
        """The same blocks as kernels on a device see them; on a GPU the arena has to be page-locked."""
        if device.type == "cpu":
            return self.layer(layer)
        if self._device_layers is None:
            self._device_layers = device_view(self._layers, device)
        return self._device_layers[layer]
