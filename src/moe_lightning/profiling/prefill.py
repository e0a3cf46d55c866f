"""Measures attention of prompts on the GPU, in chunks as passes have them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from statistics import median

import torch
from torch import Tensor

from moe_lightning.hardware.curve import RateCurve
from moe_lightning.hardware.kernel_times import ModelShape, PrefillProfile
from moe_lightning.kernels import ops
from moe_lightning.kernels.prefill_plan import PrefillPlan
from moe_lightning.kernels.reference import Segment
from moe_lightning.profiling.effort import Effort
from moe_lightning.profiling.host import name_of
from moe_lightning.profiling.kv_store import BLOCK_SIZE, CHUNK_TOKENS, KvStore
from moe_lightning.profiling.queued import recorded

_HOLD_CYCLES = 1_000_000  # some 0.6 ms, longer than launching both takes
_TURNS = 9


def prefill(shape: ModelShape, dtype: torch.dtype, effort: Effort, host: Tensor | None) -> PrefillProfile:
    """Causal attention of chunks of unequal prompts while their K and V are stored.

    Both come after the projections, so they always run at once, and a store's kernels hold processors while they
    wait for the link.

    Args:
        shape: of the model.
        dtype: of activations.
        effort: prompts.
        host: [bytes] uint8, page-locked memory as the GPU sees it, where K and V go; None to store nothing.
    """
    rates = tuple(_rate(shape, prompt_lens(length), dtype, host) for length in effort.prompts)
    return PrefillProfile(
        shape.num_heads, shape.num_kv_heads, shape.head_dim, name_of(dtype), RateCurve(effort.prompts, rates)
    )


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


def _rate(shape: ModelShape, lengths: Sequence[int], dtype: torch.dtype, host: Tensor | None) -> float:
    ends = list(accumulate(lengths, initial=0))
    rows = -(-ends[-1] // BLOCK_SIZE) * BLOCK_SIZE
    qkv = torch.randn(rows, shape.qkv_size, device="cuda", dtype=dtype)
    heads = qkv.view(rows, -1, shape.head_dim)
    q, k, v = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
    plan = PrefillPlan.of([Segment(start, start, end) for start, end in pairwise(ends)], _put)
    out = torch.empty(ends[-1], shape.q_size, device="cuda", dtype=dtype)
    kv = None if host is None else KvStore(host, qkv, shape.num_heads, shape.num_kv_heads)
    seconds = _beside(
        lambda: ops.prefill_attention(q, k, v, plan, None, out), kv.store if kv else lambda _: None
    )
    return 4.0 * causal_pairs(lengths) * shape.q_size / seconds


def _beside(work: Callable[[], object], store: Callable[[int], object]) -> float:
    """Seconds of the work from when both may begin."""
    stores = torch.cuda.Stream()
    found: list[float] = []
    for turn in range(_TURNS + 1):  # the first compiles
        torch.cuda.synchronize()
        torch.cuda._sleep(_HOLD_CYCLES)
        start = recorded()
        stores.wait_event(start)
        work()
        end = recorded()
        with torch.cuda.stream(stores):
            store(turn)
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    torch.cuda.synchronize()
    return median(found[1:])


def _put(values: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(values, dtype=dtype, device="cuda")
