"""Seconds of work on the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean, median

_MIN_TURNS = 3
_MAX_TURNS = 200
_PATIENCE = 4  # budgets that three turns may take


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
