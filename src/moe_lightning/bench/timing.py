"""Seconds of GPU work, without the launches' own time, and the two rates that bound it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

Work = Callable[[], object]


def seconds_of(works: Sequence[Work], budget_s: float = 0.15, max_replays: int = 50) -> float:
    """Seconds of one of the works on the GPU: the median over replays of a graph that holds them all.

    Give several that touch different memory, so that none finds its data in the cache. Each must launch without
    waiting for the GPU.
    """
    for work in works:  # compiles, creates handles
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    graph.replay()
    first = _replay(graph)
    replays = max(3, min(max_replays, int(budget_s / max(first, 1e-6))))
    seconds = median(_replay(graph) for _ in range(replays)) / len(works)
    graph.reset()
    return seconds


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


@dataclass(frozen=True)
class Roofs:
    """What the GPU reaches: FLOP/s of a large bf16 (or fp16) product, bytes/s of a copy, read plus written."""

    flops: float
    bandwidth: float


def measure_roofs(dtype: torch.dtype) -> Roofs:
    """Roofs of the current GPU, on random data: zeros run faster than anything real."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = seconds_of([lambda: torch.mm(a, b, out=out)])
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = seconds_of([lambda: target.copy_(source)])
    return Roofs(2 * size**3 / product, 2 * source.numel() / copy)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Distance over the reference's length: not a number if any element is not one."""
    difference = (out.double() - reference.double()).norm()
    return float(difference / reference.double().norm())
