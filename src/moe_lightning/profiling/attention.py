"""Measures decode attention on the CPU, alone and beside copies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lightning.bench.timing import seconds_in_turn
from moe_lightning.hardware.curve import RateCurve, TimeCurve
from moe_lightning.hardware.profile import AttentionProfile
from moe_lightning.kernels.cpu_kernels import CpuKernels
from moe_lightning.profiling.arena import fill
from moe_lightning.profiling.effort import Effort
from moe_lightning.profiling.link import Copies
from moe_lightning.profiling.load import again_and_again

_BLOCK_SIZE = 16
_CALLS = 6  # micro-batches of a layer, each of other blocks
_LEAST_LAYERS = 4  # so that no cache holds what was read when its turn comes again
_LEAST_SHARE = 0.25  # of a call's time that reading takes: less is noise in the cost of calls


class _Layer(NamedTuple):
    """What runs a layer's calls."""

    lengths: Tensor  # [sequences], of each call
    run: Callable[[], None]
    num_bytes: int  # of their queries, keys and values


class AttentionBench:
    """One geometry over memory that is filled with its dtype, called as passes do.

    That is slower than one call behind the other over blocks in a row: lengths are unequal, and the blocks of a
    layer lie anywhere in its memory. The calls of a layer come at once, and the next layer's, over other memory,
    after a pause in which threads fall asleep.

    Args:
        kernel: with its threads.
        memory: [bytes] uint8.
        geometry: query heads, KV heads, head dimension.
        dtype: of K and V.
        effort: sizes and durations.
    """

    def __init__(
        self,
        kernel: CpuKernels,
        memory: Tensor,
        geometry: tuple[int, int, int],
        dtype: torch.dtype,
        effort: Effort,
    ) -> None:
        self._kernel, self._dtype, self._effort = kernel, dtype, effort
        self._num_heads, self._num_kv_heads, self._head_dim = geometry
        self._token_bytes = 2 * self._num_kv_heads * self._head_dim * dtype.itemsize
        self._call_bytes = min(effort.call_bytes, memory.nbytes // (_LEAST_LAYERS * _CALLS))
        num_layers = memory.nbytes // (_CALLS * self._call_bytes)
        num_blocks = memory.nbytes // num_layers // (_BLOCK_SIZE * self._token_bytes)
        block = (2, self._num_kv_heads, _BLOCK_SIZE, self._head_dim)
        size = num_layers * num_blocks * _BLOCK_SIZE * self._token_bytes
        self._layers = memory[:size].view(dtype).view(num_layers, num_blocks, *block)
        self._num_runs = 0

    def measure(self, copies: Copies | None) -> AttentionProfile:
        """All of the geometry's curves; beside copies, and one who waits for them, only where there are some."""
        effort = self._effort
        counts = [count for count in effort.num_seqs if count <= self._layers.shape[1]] or [1]
        ones = [torch.ones(n, dtype=torch.int64) for n in counts]
        call = TimeCurve(tuple(counts), tuple(self._seconds(self._layers_of(ones), effort.point_s)))
        # Made before copies begin: their queue would be empty before all are there.
        contexts = self._contexts()
        alone, beside = self._rates(contexts, call), None
        if copies is not None:
            with copies, again_and_again(copies.wait):
                beside = self._rates(contexts, call, copies)
        dtype = str(self._dtype).removeprefix("torch.")
        return AttentionProfile(
            self._num_heads, self._num_kv_heads, self._head_dim, dtype, alone, beside, call
        )

    def lengths(self, context: int) -> Tensor:
        """[sequences] int64, of a call that reads as much as the effort says."""
        seq_bytes = -(-context // _BLOCK_SIZE) * _BLOCK_SIZE * self._token_bytes
        return spread_lengths(max(1, self._call_bytes // seq_bytes), context)

    def layer(self, lengths: Tensor) -> tuple[Callable[[], None], int]:
        """What runs a layer's calls, each time of the next layer; and the bytes of their queries, keys, values."""
        row_size = (self._num_heads + 2 * self._num_kv_heads) * self._head_dim
        rows = torch.empty(len(lengths), row_size, dtype=self._dtype)
        fill(rows.flatten())
        num_blocks = self._layers.shape[1]
        order = torch.randperm(num_blocks)
        calls = [
            self._call(rows.clone(), lengths, order.roll(n * num_blocks // _CALLS)) for n in range(_CALLS)
        ]

        def run() -> None:
            kv = self._layers[self._num_runs % len(self._layers)]
            self._num_runs += 1
            for call in calls:
                call(kv)

        return run, _CALLS * rows.nbytes

    def _contexts(self) -> list[_Layer]:
        """A layer's calls at each context."""
        return self._layers_of([self.lengths(context) for context in self._effort.contexts])

    def _layers_of(self, lengths: Sequence[Tensor]) -> list[_Layer]:
        return [_Layer(each, *self.layer(each)) for each in lengths]

    def _rates(self, layers: Sequence[_Layer], call: TimeCurve, copies: Copies | None = None) -> RateCurve:
        """Bytes of K and V a second by context, without what the call itself takes.

        Args:
            layers: a layer's calls at each context.
            call: what a call takes.
            copies: beside them. What is measured then is what plans go by, and gets three times the time.
        """
        found = self._seconds(layers, self._effort.point_s * (3 if copies else 1), copies)
        rates = []
        for layer, seconds in zip(layers, found, strict=True):
            reading = max(seconds - call.seconds_at(len(layer.lengths)), _LEAST_SHARE * seconds)
            rates.append(int(layer.lengths.sum()) * self._token_bytes / reading)
        return RateCurve(self._effort.contexts, tuple(rates))

    def _seconds(
        self, layers: Sequence[_Layer], budget_s: float, copies: Copies | None = None
    ) -> list[float]:
        """Of a call of each of the layers, on average."""

        def begin(number: int) -> None:
            if number == 0 and len(layers) > 1:
                self._num_runs += 1  # else each of the works would always read the same layers
            time.sleep(self._effort.pause_s)
            if copies:
                copies.keep_up(layers[number].num_bytes)
                copies.watch()

        def end() -> None:
            if copies:
                copies.watched()

        runs = [layer.run for layer in layers]
        return [seconds / _CALLS for seconds in seconds_in_turn(runs, budget_s, begin, end)]

    def _call(self, qkv: Tensor, lengths: Tensor, order: Tensor) -> Callable[[Tensor], None]:
        """Attention of a micro-batch's rows [sequences, q, k and v], its blocks the first ones of an order."""
        num_seqs, tables = len(lengths), block_tables(lengths, order)
        heads = (self._num_heads, self._num_kv_heads, self._num_kv_heads)
        q, k, v = qkv.view(num_seqs, -1, self._head_dim).split(heads, dim=1)
        out = torch.empty(num_seqs, self._num_heads * self._head_dim, dtype=self._dtype)
        return lambda kv: self._kernel.attend(out, q, k, v, kv, tables, lengths)


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
