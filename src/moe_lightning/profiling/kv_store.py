"""Measures how fast kernels write K and V of a chunk to blocks in host memory."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from moe_lightning.hardware.kernel_times import ModelShape
from moe_lightning.kernels import reference
from moe_lightning.profiling.queued import recorded
from moe_lightning.units import GIB

CHUNK_TOKENS = 2048  # of prompts that a pass computes together
BLOCK_SIZE = 16
_LAYER_BYTES = 2 * GIB  # that a layer's blocks take at most
_TURNS = 8


class KvStore:
    """Stores of one chunk after another, each to other blocks, in any order.

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
        num_blocks = memory.nbytes // (elements * qkv.dtype.itemsize)
        whole = memory[: num_blocks * elements * qkv.dtype.itemsize]
        self.kv = whole.view(qkv.dtype).view(num_blocks, *block)
        per_chunk = len(qkv) // BLOCK_SIZE
        # Of less memory than a chunk fills, blocks are used twice.
        order = torch.randperm(max(num_blocks, per_chunk)) % num_blocks
        order = order[: len(order) // per_chunk * per_chunk].view(-1, per_chunk, 1)
        slots = (order * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten(1)[:_TURNS]
        self.slots = slots.to(qkv.device)
        self.num_bytes = self._k.nbytes + self._v.nbytes

    def store(self, turn: int) -> None:
        """Launch one chunk's store, as `TaskRunner` does."""
        reference.store_kv(self.kv, self._k, self._v, self.slots[turn % len(self.slots)])


def store_rate(memory: Tensor, shape: ModelShape, dtype: torch.dtype, keep_up: Callable[[], object]) -> float:
    """Bytes/s of K and V that reach page-locked memory [bytes], seen by the GPU; `keep_up` lets copies go on."""
    qkv = torch.randn(CHUNK_TOKENS, shape.qkv_size, device="cuda", dtype=dtype)
    kv = KvStore(memory[:_LAYER_BYTES], qkv, shape.num_heads, shape.num_kv_heads)
    kv.store(0)
    found: list[float] = []
    for _ in range(3):
        keep_up()
        start = recorded()
        for turn in range(_TURNS):
            kv.store(turn)
        end = recorded()
        end.synchronize()
        found.append(_TURNS * kv.num_bytes / (start.elapsed_time(end) / 1e3))
    return median(found)
