"""Measures attention of prompts on the GPU, in chunks as passes have them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from statistics import fmean, median
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lightning.hardware.curve import RateCurve, TimeCurve
from moe_lightning.hardware.kernel_times import ModelShape, PrefillProfile
from moe_lightning.kernels import ops
from moe_lightning.kernels.prefill_plan import PrefillPlan
from moe_lightning.kernels.reference import Segment
from moe_lightning.profiling.effort import Effort
from moe_lightning.profiling.events import recorded, wait_for
from moe_lightning.profiling.host import name_of
from moe_lightning.profiling.kv_store import BLOCK_SIZE, CHUNK_TOKENS, KvStore
from moe_lightning.profiling.load import Load, running
from moe_lightning.profiling.queued import stream_aside
from moe_lightning.profiling.small_kernels import tasks, weights

_HOLD_CYCLES = 4_000_000  # some 2 ms, longer than launching a turn takes
_TURNS, _CHUNKS = 15, 2
# Tokens of the prompt that a token is in, in chunks whose stores are timed by size: as among MTBench's questions.
_STORED_PROMPT = 172


def prefill(shape: ModelShape, dtype: torch.dtype, effort: Effort, load: Load | None) -> PrefillProfile:
    """Causal attention of chunks of unequal prompts while their K and V are stored.

    Both come after the projections, so they always run at once: a store's kernels hold processors while they wait
    for the link, and wait for those that attention holds, and after it the products of this chunk and the next.
    Pages come meanwhile, and the CPU attends.

    Args:
        shape: of the model.
        dtype: of activations.
        effort: prompts.
        load: what goes on meanwhile, and where K and V go; None to store nothing.
    """
    flops = []
    for length in effort.prompts:
        lengths = prompt_lens(length)
        seconds, _ = _seconds(shape, lengths, dtype, load)
        flops.append(4.0 * causal_pairs(lengths) * shape.q_size / seconds)
    rate, name = RateCurve(effort.prompts, tuple(flops)), name_of(dtype)
    return PrefillProfile(*shape.attention, name, rate, _stores(shape, dtype, effort, load) if load else None)


def _stores(shape: ModelShape, dtype: torch.dtype, effort: Effort, load: Load) -> TimeCurve:
    """Seconds by bytes of K and V."""
    points: dict[float, float] = {}
    for num_tokens in effort.chunk_tokens:
        lengths = prompt_lens(min(_STORED_PROMPT, num_tokens // 2), num_tokens)
        size = 2 * sum(lengths) * shape.num_kv_heads * shape.head_dim * dtype.itemsize
        _, points[size] = _seconds(shape, lengths, dtype, load)
    return TimeCurve(tuple(points), tuple(points.values()))


def prompt_lens(mean: int, total: int = CHUNK_TOKENS) -> list[int]:
    """Prompts of a chunk as unequal as they come, in an order that is not theirs.

    Lengths of questions and documents spread about as an exponential distribution does: with many short ones, and a
    token is on average in a prompt of twice the mean length.

    Args:
        mean: tokens of the prompt that a token is in, on average.
        total: tokens of the chunk, about; one prompt may be longer.
    """
    if 2 * mean > total:  # no two of that mean would fit
        return [mean]
    count = round(2 * total / mean)
    spread = [-math.log(1 - (n + 0.5) / count) for n in range(count)]
    scale = mean * sum(spread) / sum(x * x for x in spread)
    lengths = [max(1, round(scale * x)) for x in spread]
    return lengths[::2] + lengths[1::2][::-1]


def causal_pairs(lengths: Sequence[int]) -> int:
    """Pairs of query and key."""
    return sum(n * (n + 1) // 2 for n in lengths)


def _seconds(
    shape: ModelShape, lengths: Sequence[int], dtype: torch.dtype, load: Load | None
) -> tuple[float, float]:
    """Of a chunk's attention, and of the store of its K and V beside it."""
    ends = list(accumulate(lengths, initial=0))
    rows = -(-ends[-1] // BLOCK_SIZE) * BLOCK_SIZE
    qkv = torch.randn(rows, shape.qkv_size, device="cuda", dtype=dtype)
    heads = qkv.view(rows, -1, shape.head_dim)
    q, k, v = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
    plan = PrefillPlan.of([Segment(start, start, end) for start, end in pairwise(ends)], _put)
    out = torch.empty(ends[-1], shape.q_size, device="cuda", dtype=dtype)
    chunk = _Chunk(
        lambda: ops.prefill_attention(q, k, v, plan, None, out),
        KvStore(load.kv, qkv, shape.num_heads, shape.num_kv_heads).store if load else lambda _: None,
        tasks(shape, weights(shape, dtype, 1), ends[-1])[0],
    )
    return _beside(chunk, load)


class _Chunk(NamedTuple):
    """What is launched for one."""

    attend: Callable[[], object]
    store: Callable[[int], object]
    others: tuple[Callable[[], object], Callable[[], object]]  # before attention and after it


def _beside(chunk: _Chunk, load: Load | None) -> tuple[float, float]:
    """Seconds of a chunk's attention and of its store, of each from when it may begin: means over some chunks."""
    stores = stream_aside()
    _launch(chunk, stores, 0)  # compiles, loads and allocates before the load begins, as in `task_seconds`
    torch.cuda.synchronize()
    found: list[tuple[float, float]] = []
    with running(load):
        for turn in range(_TURNS):
            torch.cuda._sleep(_HOLD_CYCLES)
            marks = [_launch(chunk, stores, _CHUNKS * turn + n) for n in range(_CHUNKS)]
            wait_for(recorded())
            wait_for(marks[-1][-1])
            attended = fmean(began.elapsed_time(end) for began, end, _, _ in marks)
            stored = fmean(free.elapsed_time(end) for _, _, free, end in marks)
            found.append((attended / 1e3, stored / 1e3))
    return median(one for one, _ in found), median(other for _, other in found)


def _launch(
    chunk: _Chunk, stores: torch.cuda.Stream, number: int
) -> tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event, torch.cuda.Event]:
    """All of a chunk's tasks but the experts; starts and ends of its attention and its store."""
    before, after = chunk.others
    before()
    began = recorded()
    with torch.cuda.stream(stores):
        stores.wait_event(began)
        free = recorded()
        chunk.store(number)
        stored = recorded()
    chunk.attend()
    attended = recorded()
    after()
    return began, attended, free, stored


def _put(values: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(values, dtype=dtype, device="cuda")
