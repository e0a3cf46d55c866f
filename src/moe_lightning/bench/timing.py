"""Seconds of work of the host and of the GPU, here without launches' own time; the two rates that bound a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch

Work = Callable[[], object]
_MIN_TURNS = 3
_MAX_TURNS = 200
_PATIENCE = 4  # budgets that three turns may take


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


def median_seconds(
    work: Callable[[int], object], budget_s: float, before: Callable[[], object] = lambda: None
) -> float:
    """The median of some turns, after one that does not count.

    Args:
        work: gets the turn's number, so that it can touch other memory than the last one.
        budget_s: of all turns; three are made in any case, or one that takes several times as long alone.
        before: called before each turn, outside of its time.
    """
    found: list[float] = []
    begin = time.perf_counter()
    for turn in range(_MAX_TURNS + 1):
        before()
        start = time.perf_counter()
        work(turn)
        end = time.perf_counter()
        if turn:
            found.append(end - start)
        enough = _MIN_TURNS if end - begin < _PATIENCE * budget_s else 1
        if len(found) >= enough and end - begin > budget_s:
            break
    return median(found)


def seconds_in_turn(
    works: Sequence[Callable[[], object]],
    budget_s: float,
    before: Callable[[int], object],
    after: Callable[[], object] = lambda: None,
) -> list[float]:
    """Seconds of each work, after a round that does not count: the median, times what slow turns add for all.

    All works have a turn before the first has its next, and what their turns take beyond medians counts for all
    alike: so none alone has a slow time of the machine, which in few turns would be most of its mean.

    Args:
        works: to be measured.
        budget_s: of each; three rounds are made in any case, or one that takes several times as long alone.
        before: called before each turn, outside of its time, with the number of its work.
        after: called after each, outside of its time too.
    """
    found: list[list[float]] = [[] for _ in works]
    begin, budget_s = time.perf_counter(), budget_s * len(works)
    for turn in range(_MAX_TURNS + 1):
        for number, work in enumerate(works):
            before(number)
            start = time.perf_counter()
            work()
            end = time.perf_counter()
            after()
            if turn:
                found[number].append(end - start)
        took = time.perf_counter() - begin
        if turn >= (_MIN_TURNS if took < _PATIENCE * budget_s else 1) and took > budget_s:
            break
    medians = [median(seconds) for seconds in found]
    slower = sum(map(fmean, found)) / sum(medians)  # as many turns of each
    return [slower * seconds for seconds in medians]
