"""Seconds of GPU work as the executor runs it: launch behind launch, all queued before the first begins."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch

_IN_A_ROW = 8
_HOLD_CYCLES = 250_000  # for each: some 0.15 ms, longer than launching a few kernels takes
_LEAST, _MOST = 5, 50  # rows


def queued_seconds(work: Callable[[], object], budget_s: float) -> float:
    """Seconds of one of many in a row, each after the one before, with the gaps between their kernels.

    A graph, as `bench.timing` has it, launches kernels closer to each other than streams do.
    """
    for _ in range(2):  # compiles
        work()
    found: list[float] = []
    while len(found) < _LEAST or (len(found) < _MOST and sum(found) * _IN_A_ROW < budget_s):
        torch.cuda.synchronize()
        torch.cuda._sleep(_IN_A_ROW * _HOLD_CYCLES)
        start = recorded()
        for _ in range(_IN_A_ROW):
            work()
        end = recorded()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / _IN_A_ROW)
    return median(found)


def recorded() -> torch.cuda.Event:
    """An event of the current stream that knows its time."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
