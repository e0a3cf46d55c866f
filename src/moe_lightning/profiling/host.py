"""Measures the CPU: its memory, its products, and the experts that it computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moe_lightning.bench.timing import median_seconds
from moe_lightning.hardware.curve import TimeCurve
from moe_lightning.hardware.kernel_times import ExpertsProfile, ModelShape
from moe_lightning.kernels import cpu_experts
from moe_lightning.kernels.cpu_kernels import CpuKernels
from moe_lightning.memory.arena import host_tensor
from moe_lightning.profiling.arena import fill
from moe_lightning.profiling.effort import Effort


def name_of(dtype: torch.dtype) -> str:
    """Such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def describe(geometry: tuple[int, int, int]) -> str:
    """A geometry of attention in words."""
    num_heads, num_kv_heads, head_dim = geometry
    return f"{num_heads} heads on {num_kv_heads} of {head_dim}"


def product_flops(dtype: torch.dtype, effort: Effort) -> float:
    """FLOP/s of the fastest of some square products."""
    best = 0.0
    for size in effort.cpu_products:
        seconds = _product_seconds(size, dtype)
        best = max(best, 2.0 * size**3 / seconds)
        if 8 * 4 * seconds > effort.cpu_experts_s:  # what the next one would take
            break
    return best


def _product_seconds(size: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return median_seconds(lambda _: torch.mm(a, b, out=out), 0.0)


@torch.inference_mode()
def experts(
    shape: ModelShape,
    dtype: torch.dtype,
    effort: Effort,
    before: Callable[[], object] = lambda: None,
    kernel: CpuKernels | None = None,
) -> ExpertsProfile:
    """Sweeps over a layer's experts, until larger batches would take too long.

    Some experts are measured, with as many rows as they have on average, and count as often as the tokens are
    expected to meet as many: one by itself where a library computes them one after the other; beside a GPU, where
    `kernel` shares all of them out, as many as there is memory for. `before` is called before each turn.
    """
    elements = 3 * shape.hidden_size * shape.intermediate_size
    pool = host_tensor((max(1, effort.pool_bytes // (elements * dtype.itemsize)), elements), dtype)
    fill(pool.flatten(), shape.hidden_size**-0.5)
    points: dict[int, float] = {}
    begin = time.perf_counter()
    for num_tokens in effort.cpu_tokens:
        met = shape.experts_met(num_tokens)
        rows = max(1, round(num_tokens * shape.top_k / met))
        if kernel is None:
            count, work = 1, _one_by_the_library(rows, shape, pool)
        else:
            count = min(len(pool), round(met))
            work = _some_by_the_kernel(rows, count, shape, pool, kernel)
        turn_s = median_seconds(work, effort.point_s, before)
        points[num_tokens] = met / count * turn_s
        if time.perf_counter() - begin + 4 * turn_s > effort.cpu_experts_s:
            break
    times = TimeCurve(tuple(points), tuple(points.values()))
    return ExpertsProfile(replace(shape, pages_per_expert=1), name_of(dtype), times)


def _one_by_the_library(rows: int, shape: ModelShape, pool: Tensor) -> Callable[[int], object]:
    """A turn with another expert of the pool."""
    x = torch.randn(rows, shape.hidden_size).to(pool.dtype)
    ids, weights = torch.zeros(rows, 1, dtype=torch.int64), torch.ones(rows, 1)
    return lambda turn: cpu_experts.experts(x, ids, weights, [pool[turn % len(pool)]], 1)


def _some_by_the_kernel(
    rows: int, count: int, shape: ModelShape, pool: Tensor, kernel: CpuKernels
) -> Callable[[int], object]:
    """A turn with the next experts of the pool, in pages as the model has them."""
    x = torch.randn(rows * count, shape.hidden_size).to(pool.dtype)
    out, weights = torch.empty_like(x), torch.ones(len(x), 1)
    ids = torch.arange(len(x))[:, None] % count

    def work(turn: int) -> None:
        some = (pool[(turn * count + i) % len(pool)] for i in range(count))
        pages = [page for expert in some for page in expert.chunk(shape.pages_per_expert)]
        kernel.experts(out, x, ids, weights, pages, shape.pages_per_expert)

    return work
