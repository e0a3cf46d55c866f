"""The dependencies of a list of tasks, derived from the buffers they touch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_lightning.pipeline.task import Buffer, Lane, Task

_LANES = {lane: index for index, lane in enumerate(Lane)}


def derive(tasks: Sequence[Task]) -> tuple[tuple[int, ...], ...]:
    """For each task the earlier tasks it must wait for, beyond those that its lane's order already implies.

    A task waits for the last writer of whatever it touches, and for the readers since of what it writes. Of
    these, only those are kept that no other kept dependency and no lane order implies: taking any one away is
    a race.
    """
    order = LaneOrder(tasks)
    users: dict[Buffer, list[int]] = {}  # the last writer of each, -1 for none, and its readers since
    deps = []
    for index, task in enumerate(tasks):
        needed: list[int] = []
        for buffer in task.reads:
            if known := users.get(buffer):
                needed.append(known[0])
                known.append(index)
            else:
                users[buffer] = [-1, index]
        for buffer in task.writes:
            if known := users.get(buffer):
                needed += known
            users[buffer] = [index]
        deps.append(order.reduce(index, needed))
    return tuple(deps)


class LaneOrder:
    """What is known to be done when a task is, as the last such task of each lane (a vector clock)."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._lanes = [_LANES[task.lane] for task in tasks]
        self._clocks: list[list[int]] = []  # by task
        self._lane_clocks = [[-1] * len(_LANES) for _ in _LANES]  # of the last task of each lane

    def reduce(self, index: int, needed: Iterable[int]) -> tuple[int, ...]:
        """The members of `needed` that nothing else implies; call it for every task, in launch order.

        A dependency that implies another one comes later in launch order, so the latest are looked at first. The
        task itself, and -1, are implied.
        """
        lanes = self._lanes
        lane = lanes[index]
        clock = self._lane_clocks[lane].copy()
        clock[lane] = index
        kept: tuple[int, ...] = ()
        rest = [other for other in needed if other > clock[lanes[other]]]  # nearly all are done since long
        while rest:
            latest = max(rest)
            kept = (latest, *kept)
            clock = list(map(max, clock, self._clocks[latest]))
            rest = [other for other in rest if other > clock[lanes[other]]]
        self._clocks.append(clock)
        self._lane_clocks[lane] = clock
        return kept

    def is_before(self, earlier: int, later: int) -> bool:
        """Whether `earlier` is done whenever `later` starts; both have been through `reduce`."""
        return earlier != later and self._clocks[later][self._lanes[earlier]] >= earlier
