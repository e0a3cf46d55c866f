"""Seconds of work on the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

_MIN_TURNS = 3
_MAX_TURNS = 200
_PATIENCE = 4  # budgets that three turns may take


def turn_seconds(
    work: Callable[[int], object], budget_s: float, before: Callable[[], object] = lambda: None
) -> list[float]:
    """Seconds of each turn, after one that does not count.

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
    return found


def median_seconds(
    work: Callable[[int], object], budget_s: float, before: Callable[[], object] = lambda: None
) -> float:
    """The median of `turn_seconds`."""
    return median(turn_seconds(work, budget_s, before))
