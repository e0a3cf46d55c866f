"""Stores of K and V of a chunk to blocks in host memory, as passes have them."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lightning.kernels import ops
from moe_lightning.units import GIB

CHUNK_TOKENS = 2048  # of prompts that a pass computes together
BLOCK_SIZE = 16
_TURNS = 64  # more than are measured in a row: blocks that were just written are written faster
_LAYER_BYTES = 2 * GIB


class KvStore:
    """Stores of one chunk after another, each to other blocks of another layer, in any order.

    Args:
        memory: [bytes] uint8, where the blocks are, as the device of `qkv` sees it.
        qkv: [T, q_size + 2 kv_size], the chunk's rows; T is a multiple of the block size.
        num_heads: of queries.
        num_kv_heads: of keys and of values.
    """

    def __init__(self, memory: Tensor, qkv: Tensor, num_heads: int, num_kv_heads: int) -> None:
        heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, -1)
        self._k, self._v = (
            heads[:, num_heads : num_heads + num_kv_heads],
            heads[:, num_heads + num_kv_heads :],
        )
        block = (2, num_kv_heads, BLOCK_SIZE, heads.shape[2])
        elements = 2 * num_kv_heads * BLOCK_SIZE * heads.shape[2]
        num_layers = -(-memory.nbytes // _LAYER_BYTES)
        num_blocks = memory.nbytes // num_layers // (elements * qkv.dtype.itemsize)
        whole = memory[: num_layers * num_blocks * elements * qkv.dtype.itemsize]
        self.layers = whole.view(qkv.dtype).view(num_layers, num_blocks, *block)
        per_chunk = len(qkv) // BLOCK_SIZE
        # Of less memory than a chunk fills, blocks are used twice.
        order = torch.randperm(max(num_blocks, per_chunk)) % num_blocks
        order = order[: len(order) // per_chunk * per_chunk].view(-1, per_chunk, 1)
        slots = (order * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten(1)[:_TURNS]
        self.slots = slots.to(qkv.device)
        self.num_bytes = self._k.nbytes + self._v.nbytes

    def store(self, turn: int) -> None:
        """Launch one chunk's store, as `TaskRunner` does."""
        layer = self.layers[turn % len(self.layers)]
        ops.store_kv(layer, self._k, self._v, self.slots[turn % len(self.slots)])
