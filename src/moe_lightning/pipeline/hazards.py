"""The dependencies of a list of tasks, derived from the buffers they touch."""

from __future__ import annotations

from collections.abc import Sequence

from moe_lightning.pipeline.task import Buffer, Lane, Task

_LANES = {lane: index for index, lane in enumerate(Lane)}


def derive(tasks: Sequence[Task]) -> tuple[tuple[int, ...], ...]:
    """For each task the earlier tasks it must wait for, beyond those that its lane's order already implies.

    A task waits for the last writer of whatever it touches, and for the readers since of what it writes. Of
    these, only those are kept that no other kept dependency and no lane order implies: taking any one away is
    a race.
    """
    last_writer: dict[Buffer, int] = {}
    readers: dict[Buffer, list[int]] = {}
    order = LaneOrder(tasks)
    deps = []
    for index, task in enumerate(tasks):
        needed = _conflicts(task, last_writer, readers)
        deps.append(order.reduce(index, needed))
        for buffer in task.reads:
            readers.setdefault(buffer, []).append(index)
        for buffer in task.writes:
            last_writer[buffer] = index
            readers[buffer] = []
    return tuple(deps)


def _conflicts(task: Task, last_writer: dict[Buffer, int], readers: dict[Buffer, list[int]]) -> set[int]:
    needed: set[int] = set()
    for buffer in task.reads:
        if buffer in last_writer:
            needed.add(last_writer[buffer])
    for buffer in task.writes:
        if readers.get(buffer):
            needed.update(readers[buffer])
        elif buffer in last_writer:
            needed.add(last_writer[buffer])
    return needed


class LaneOrder:
    """What is known to be done when a task starts, as one position per lane (a vector clock)."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        counts = [0] * len(_LANES)
        self._place: list[tuple[int, int]] = []  # (lane, 1-based position in it)
        for task in tasks:
            lane = _LANES[task.lane]
            counts[lane] += 1
            self._place.append((lane, counts[lane]))
        self._done: list[list[int]] = []  # clock once task t is done
        self._lane_clock = [[0] * len(_LANES) for _ in _LANES]

    def reduce(self, index: int, needed: set[int]) -> tuple[int, ...]:
        """The members of `needed` that nothing else implies; call it for every task, in launch order.

        A dependency that implies another one comes later in launch order, so the latest are looked at first.
        """
        lane, position = self._place[index]
        clock = list(self._lane_clock[lane])
        kept = []
        for other in sorted(needed, reverse=True):
            other_lane, other_position = self._place[other]
            if clock[other_lane] >= other_position:
                continue
            kept.append(other)
            clock = [max(a, b) for a, b in zip(clock, self._done[other], strict=True)]
        clock[lane] = position
        self._done.append(clock)
        self._lane_clock[lane] = clock
        return tuple(reversed(kept))

    def is_before(self, earlier: int, later: int) -> bool:
        """Whether `earlier` is done whenever `later` starts; both have been through `reduce`."""
        lane, position = self._place[earlier]
        return earlier != later and self._done[later][lane] >= position
