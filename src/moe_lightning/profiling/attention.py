"""Measures decode attention on the CPU, alone and beside copies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_lightning.hardware.curve import RateCurve, TimeCurve
from moe_lightning.hardware.profile import AttentionProfile
from moe_lightning.kernels.cpu_attention import CpuAttention
from moe_lightning.profiling.effort import Effort
from moe_lightning.profiling.link import Copies
from moe_lightning.profiling.timing import median_seconds

_BLOCK_SIZE = 16
_LEAST_SHARE = 0.25  # of a call's time that reading takes: less is noise in the cost of calls


class AttentionBench:
    """One geometry over memory that is filled with its dtype.

    Args:
        kernel: with its threads.
        memory: [bytes] uint8.
        geometry: query heads, KV heads, head dimension.
        dtype: of K and V.
        effort: sizes and durations.
    """

    def __init__(
        self,
        kernel: CpuAttention,
        memory: Tensor,
        geometry: tuple[int, int, int],
        dtype: torch.dtype,
        effort: Effort,
    ) -> None:
        self._kernel, self._memory, self._dtype, self._effort = kernel, memory, dtype, effort
        self._num_heads, self._num_kv_heads, self._head_dim = geometry
        self._token_bytes = 2 * self._num_kv_heads * self._head_dim * dtype.itemsize

    def measure(self, copies: Copies | None) -> AttentionProfile:
        """All of the geometry's curves; beside copies only where there are some."""
        effort = self._effort
        most = self._memory.nbytes // (_BLOCK_SIZE * self._token_bytes)
        counts = [count for count in effort.num_seqs if count <= most] or [1]
        call = TimeCurve(tuple(counts), tuple(self._seconds(count, 1) for count in counts))
        alone = RateCurve(effort.contexts, tuple(self._rate(c, call) for c in effort.contexts))
        beside = None
        if copies is not None:
            rates = []
            for context in effort.contexts:
                with copies:
                    rates.append(self._rate(context, call, copies.keep_up))
            beside = RateCurve(effort.contexts, tuple(rates))
        dtype = str(self._dtype).removeprefix("torch.")
        return AttentionProfile(
            self._num_heads, self._num_kv_heads, self._head_dim, dtype, alone, beside, call
        )

    def _rate(self, context: int, call: TimeCurve, before: Callable[[], object] = lambda: None) -> float:
        """Bytes of K and V a second, without what the call itself takes."""
        seq_bytes = -(-context // _BLOCK_SIZE) * _BLOCK_SIZE * self._token_bytes
        num_seqs = max(1, min(self._effort.call_bytes, self._memory.nbytes // 3) // seq_bytes)
        seconds = self._seconds(num_seqs, context, before)
        reading = max(seconds - call.seconds_at(num_seqs), _LEAST_SHARE * seconds)
        return num_seqs * context * self._token_bytes / reading

    def _seconds(self, num_seqs: int, context: int, before: Callable[[], object] = lambda: None) -> float:
        """Of a call, each in another part of the memory than the one before."""
        blocks = -(-context // _BLOCK_SIZE)
        shape = (num_seqs * blocks, 2, self._num_kv_heads, _BLOCK_SIZE, self._head_dim)
        layer_bytes = num_seqs * blocks * _BLOCK_SIZE * self._token_bytes
        num_layers = self._memory.nbytes // layer_bytes
        layers = self._memory[: num_layers * layer_bytes].view(self._dtype).view(num_layers, *shape)
        heads = (self._num_heads, self._num_kv_heads, self._num_kv_heads)
        qkv = torch.randn(num_seqs, sum(heads) * self._head_dim).to(self._dtype)
        q, k, v = qkv.view(num_seqs, -1, self._head_dim).split(heads, dim=1)
        out = torch.empty(num_seqs, self._num_heads * self._head_dim, dtype=self._dtype)
        tables = torch.randperm(num_seqs * blocks).view(num_seqs, -1)
        lengths = torch.full((num_seqs,), context)

        def attend(turn: int) -> None:
            self._kernel.attend(out, q, k, v, layers[turn % num_layers], tables, lengths)

        return median_seconds(attend, self._effort.point_s, before)
