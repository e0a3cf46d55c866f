"""Measures attention of decoding sequences over KV that stays on the GPU."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_lightning.bench.timing import seconds_of
from moe_lightning.hardware.curve import RateCurve
from moe_lightning.hardware.kernel_times import DecodeProfile, ModelShape
from moe_lightning.kernels import ops
from moe_lightning.profiling.effort import Effort
from moe_lightning.profiling.host import name_of
from moe_lightning.profiling.kv_store import BLOCK_SIZE
from moe_lightning.runtime.kv_staging import PlacedBlocks

_TURNS = 4  # with other sequences' blocks each, so that none finds its own in the cache


def decode(shape: ModelShape, dtype: torch.dtype, effort: Effort) -> DecodeProfile:
    """One new token each of some sequences, appended and attended to, by context.

    K and V of several calls fill `effort.call_bytes`.
    """
    token_bytes = 2 * shape.num_kv_heads * shape.head_dim * dtype.itemsize
    rates = []
    for context in effort.contexts:
        num_seqs = max(1, effort.call_bytes // (_TURNS * context * token_bytes))
        seconds = _seconds(shape, dtype, num_seqs, context, effort.gpu_point_s)
        rates.append(num_seqs * context * token_bytes / seconds)
    return DecodeProfile(*shape.attention, name_of(dtype), RateCurve(effort.contexts, tuple(rates)))


def _seconds(shape: ModelShape, dtype: torch.dtype, num_seqs: int, context: int, budget_s: float) -> float:
    per_seq = -(-context // BLOCK_SIZE)
    num_blocks = _TURNS * num_seqs * per_seq
    kv = torch.randn(
        num_blocks, 2, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim, device="cuda", dtype=dtype
    )
    order = np.random.default_rng(0).permutation(num_blocks).reshape(_TURNS, num_seqs, per_seq)
    positions = np.full(num_seqs, context - 1)
    qkv = torch.randn(num_seqs, shape.qkv_size, device="cuda", dtype=dtype).view(num_seqs, -1, shape.head_dim)
    q, k, v = qkv.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
    out = torch.empty(num_seqs, shape.q_size, device="cuda", dtype=dtype)

    def attend(placed: PlacedBlocks) -> None:
        ops.store_kv(kv, k, v, placed.slots)
        ops.decode_attention(q, kv, placed.tables, placed.first, placed.context_lens, None, out)

    some = [PlacedBlocks.in_cache(tables, positions, BLOCK_SIZE, _put) for tables in order]
    return seconds_of([partial(attend, placed) for placed in some], budget_s)


def _put(values: npt.NDArray[np.generic], dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(values, dtype=dtype, device="cuda")
