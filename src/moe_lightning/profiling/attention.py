"""Measures decode attention on the CPU, alone and beside copies."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from moe_lightning.hardware.curve import RateCurve, TimeCurve
from moe_lightning.hardware.profile import AttentionProfile
from moe_lightning.kernels.cpu_attention import CpuAttention
from moe_lightning.profiling.arena import fill
from moe_lightning.profiling.effort import Effort
from moe_lightning.profiling.link import Copies
from moe_lightning.profiling.timing import median_seconds

_BLOCK_SIZE = 16
_CALLS = 6  # micro-batches, each of other blocks
_LEAST_SHARE = 0.25  # of a call's time that reading takes: less is noise in the cost of calls


class AttentionBench:
    """One geometry over memory that is filled with its dtype, called as passes do.

    That is slower than one call behind the other over blocks in a row: lengths are unequal, blocks lie anywhere in
    memory of which no cache knows the pages, and threads have to be woken.

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
        call = TimeCurve(
            tuple(counts), tuple(self._seconds(torch.ones(n, dtype=torch.int64)) for n in counts)
        )
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
        num_seqs = max(1, min(self._effort.call_bytes, self._memory.nbytes // 4) // seq_bytes)
        lengths = spread_lengths(num_seqs, context)
        seconds = self._seconds(lengths, before)
        reading = max(seconds - call.seconds_at(num_seqs), _LEAST_SHARE * seconds)
        return int(lengths.sum()) * self._token_bytes / reading

    def _seconds(self, lengths: Tensor, before: Callable[[], object] = lambda: None) -> float:
        """Of a call, one of several micro-batches in turn, after a pause in which the threads fall asleep."""
        shape = (2, self._num_kv_heads, _BLOCK_SIZE, self._head_dim)
        block_bytes = _BLOCK_SIZE * self._token_bytes
        num_blocks = self._memory.nbytes // block_bytes
        kv = self._memory[: num_blocks * block_bytes].view(self._dtype).view(num_blocks, *shape)
        order = torch.randperm(num_blocks)
        rows = torch.empty(
            len(lengths), (self._num_heads + 2 * self._num_kv_heads) * self._head_dim, dtype=self._dtype
        )
        fill(rows.flatten())
        calls = [
            self._call(kv, rows.clone(), lengths, order.roll(n * num_blocks // _CALLS)) for n in range(_CALLS)
        ]

        def pause() -> None:
            before()
            time.sleep(self._effort.pause_s)

        return median_seconds(lambda turn: calls[turn % _CALLS](), self._effort.point_s, pause)

    def _call(self, kv: Tensor, qkv: Tensor, lengths: Tensor, order: Tensor) -> Callable[[], None]:
        """Attention of a micro-batch's rows [sequences, q, k and v], its blocks the first ones of an order."""
        num_seqs, tables = len(lengths), block_tables(lengths, order)
        heads = (self._num_heads, self._num_kv_heads, self._num_kv_heads)
        q, k, v = qkv.view(num_seqs, -1, self._head_dim).split(heads, dim=1)
        out = torch.empty(num_seqs, self._num_heads * self._head_dim, dtype=self._dtype)
        return lambda: self._kernel.attend(out, q, k, v, kv, tables, lengths)


def spread_lengths(num_seqs: int, mean: int) -> Tensor:
    """[num_seqs] int64, what sequences hold: prompts spread as an exponential distribution, answers of all ages.

    A call of equal lengths ends on all threads at once, and one of whole blocks reads nothing in vain.
    """
    at = (torch.arange(num_seqs, dtype=torch.float64) + 0.5) / num_seqs
    prompts, answers = -torch.log1p(-at) * mean / 2, at[torch.randperm(num_seqs)] * mean
    return (prompts + answers).round().long().clamp(min=1)[torch.randperm(num_seqs)]


def block_tables(lengths: Tensor, order: Tensor) -> Tensor:
    """[sequences, blocks] int64: the next blocks of an order [blocks] for each; 0 where it has none."""
    counts = -(-lengths // _BLOCK_SIZE)
    has = torch.arange(int(counts.max())) < counts[:, None]
    tables = torch.zeros(has.shape, dtype=torch.int64)
    tables[has] = order[: int(counts.sum())]
    return tables
