"""Seconds of GPU tasks as passes have them: each waits for another stream, and is launched before it may begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import median

import torch

from moe_lightning.profiling.events import recorded, wait_for
from moe_lightning.profiling.load import Load, running

_TURNS = 15
_HOLD_CYCLES = 2_000_000  # some 1 ms, longer than launching a task takes if the launcher has a CPU
_MORE_TURNS = 2  # times as many, in all, where launching took longer

Launch = Callable[[], object]


def task_seconds(points: Sequence[Sequence[Launch]], load: Load | None, turns: int = _TURNS) -> list[float]:
    """Seconds of a task at each point: the median over some like ones, while the load goes on.

    Nothing runs before it that its commands and first kernels could hide behind: many tasks of a pass wait for the
    link or the CPU, and the GPU fetches commands over a link that is full of pages.

    All have been launched before the load begins. The first launch of a kernel compiles and loads it and allocates,
    for which the driver may wait until the GPU is idle; beside a load it never is.

    Args:
        points: at each, what launches a task without waiting for the GPU. Each touches other memory, so that none
            finds its data in the cache.
        load: what goes on meanwhile; None for nothing.
        turns: measurements of a point.
    """
    for works in points:
        for work in works:
            work()
    torch.cuda.synchronize()
    with running(load):
        return [_median(works, turns) for works in points]


def _median(works: Sequence[Launch], turns: int) -> float:
    """Seconds of a task, by turns that were launched in time; by all if none was."""
    in_time, late = list[float](), list[float]()
    for turn in range((1 + _MORE_TURNS) * turns):
        # The CPU attends with all its cores meanwhile, and may keep the launcher off them for a while.
        seconds, was_in_time = _held(works[turn % len(works)], _HOLD_CYCLES << min(len(late), 4))
        (in_time if was_in_time else late).append(seconds)
        if len(in_time) == turns:
            break
    return median(in_time or late)


def _held(work: Launch, hold_cycles: int) -> tuple[float, bool]:
    """Seconds of a task that another stream holds until it is launched; whether it held it for so long."""
    with torch.cuda.stream(stream_aside()):
        torch.cuda._sleep(hold_cycles)
        held = recorded()
    torch.cuda.current_stream().wait_event(held)
    start = recorded()
    work()
    end = recorded()
    was_in_time = not held.query()
    wait_for(end)
    return float(start.elapsed_time(end)) / 1e3, was_in_time


@lru_cache(maxsize=1)
def stream_aside() -> torch.cuda.Stream:
    """A stream beside the current one, always the same: torch has 32, and then gives the first ones once more."""
    return torch.cuda.Stream()
