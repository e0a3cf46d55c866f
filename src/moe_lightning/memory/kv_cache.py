"""Keys and values of all sequences, in blocks: in host memory, or on the GPU for layers that keep theirs there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lightning.memory.arena import HostArena, MakeArena, device_tensor
from moe_lightning.memory.mapped import device_view
from moe_lightning.models.spec import AttentionSpec


class KVCache:
    """An arena of the layers in host memory and a tensor of those on the device; a block has one number in all.

    A layer is [num_blocks, 2, num_kv_heads, block_size, head_dim]: a block's keys, then its values, each
    contiguous per head.

    Attributes:
        arena: of the layers in host memory, one after the other.
        on_device: [layers kept there, num_blocks, 2, num_kv_heads, block_size, head_dim].
    """

    def __init__(
        self,
        num_layers: int,
        attention: AttentionSpec,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        make_arena: MakeArena = HostArena,
        *,
        kept: Sequence[int] = (),
        device: torch.device | None = None,
    ) -> None:
        block = (2, attention.num_kv_heads, block_size, attention.head_dim)
        on_host = [layer for layer in range(num_layers) if layer not in kept]
        self.block_size = block_size
        self.arena = make_arena((len(on_host) * num_blocks, *block), dtype)
        self.on_device = device_tensor((len(kept), num_blocks, *block), dtype, device or torch.device("cpu"))
        self._layers = self.arena.tensor.view(len(on_host), num_blocks, *block)
        self._place = {layer: place for layers in (on_host, kept) for place, layer in enumerate(layers)}
        self._kept = frozenset(kept)
        self._device_layers: Tensor | None = None

    def layer(self, layer: int) -> Tensor:
        """Blocks of a layer in host memory: [num_blocks, 2, num_kv_heads, block_size, head_dim]."""
        assert layer not in self._kept, f"layer {layer} has its KV on the device"
        return self._layers[self._place[layer]]

    def kept(self, layer: int) -> Tensor:
        """Blocks of a layer that keeps them on the device; the same shape."""
        assert layer in self._kept, f"layer {layer} has its KV in host memory"
        return self.on_device[self._place[layer]]

    def layer_on(self, device: torch.device, layer: int) -> Tensor:
        """A layer in host memory as kernels on a device see it; on a GPU the arena has to be page-locked."""
        if device.type == "cpu":
            return self.layer(layer)
        if self._device_layers is None:
            self._device_layers = device_view(self._layers, device)
        assert layer not in self._kept, f"layer {layer} has its KV on the device"
        return self._device_layers[self._place[layer]]
