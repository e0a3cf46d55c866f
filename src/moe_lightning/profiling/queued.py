"""Seconds of GPU tasks as passes have them: each waits for another stream, and is launched before it may begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import median

import torch

_TURNS = 15
_HOLD_CYCLES = 2_000_000  # some 1 ms, longer than launching a task takes


def task_seconds(works: Sequence[Callable[[], object]], turns: int = _TURNS) -> float:
    """Seconds of one of some like tasks: the median.

    Nothing runs before it that its commands and first kernels could hide behind: many tasks of a pass wait for the
    link or the CPU, and the GPU fetches commands over a link that is full of pages.

    Args:
        works: launch a task each, without waiting for the GPU. Each touches other memory, so that none finds its
            data in the cache.
        turns: measurements.
    """
    waited_for = stream_aside()
    for work in works:  # compiles
        work()
    torch.cuda.synchronize()
    found: list[float] = []
    for turn in range(turns):
        with torch.cuda.stream(waited_for):
            torch.cuda._sleep(_HOLD_CYCLES)
            held = recorded()
        torch.cuda.current_stream().wait_event(held)
        start = recorded()
        works[turn % len(works)]()
        end = recorded()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return median(found)


@lru_cache(maxsize=1)
def stream_aside() -> torch.cuda.Stream:
    """A stream beside the current one, always the same: torch has 32, and then gives the first ones once more."""
    return torch.cuda.Stream()


def recorded() -> torch.cuda.Event:
    """An event of the current stream that knows its time."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
