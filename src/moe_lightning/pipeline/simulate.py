"""What a schedule would take, from what each of its tasks takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from moe_lightning.errors import ScheduleError
from moe_lightning.pipeline.task import Buffer, Lane, Schedule, Task
from moe_lightning.pipeline.timeline import Timeline


def simulate(schedule: Schedule, seconds: Callable[[Task], float]) -> Timeline:
    """The timeline in which every task starts as soon as it can: its lane is free, its dependencies are done.

    Lanes run in launch order and dependencies point backward, so one sweep in launch order meets the events
    in an order that never has to look back.

    Args:
        schedule: what to run.
        seconds: how long a task takes; asked once for each task, in launch order.

    Raises:
        ScheduleError: a duration is negative or not a finite number, or a dependency does not point backward.
    """
    return Timeline.of(schedule, *times(schedule, seconds))


def times(schedule: Schedule, seconds: Callable[[Task], float]) -> tuple[list[float], list[float]]:
    """When each task of `simulate`'s timeline starts and ends: for those who look at many and draw none."""
    free = dict.fromkeys(Lane, 0.0)
    starts: list[float] = []
    ends: list[float] = []
    for index, (task, deps) in enumerate(zip(schedule.tasks, schedule.deps, strict=True)):
        duration = _duration(task, seconds)
        start = free[task.lane]
        for dep in deps:
            if not 0 <= dep < index:
                raise ScheduleError(
                    f"task {index}, {task}, waits for task {dep}; it can wait for earlier ones only"
                )
            start = max(start, ends[dep])
        starts.append(start)
        ends.append(start + duration)
        free[task.lane] = ends[-1]
    return starts, ends


def until_tokens(tasks: Iterable[Task], seconds: Callable[[Task], float]) -> tuple[float, dict[Lane, float]]:
    """Seconds until all but copies of pages have ended, and those that each lane works.

    What `times` finds for the schedule of derived dependencies, from the buffers that tasks touch alone: to derive
    what need not be waited for takes longer than all else.

    Raises:
        ScheduleError: a duration is negative or not a finite number.
    """
    free, busy = dict.fromkeys(Lane, 0.0), dict.fromkeys(Lane, 0.0)
    written: dict[Buffer, float] = {}  # when the last writer has ended
    touched: dict[Buffer, float] = {}  # when it and all readers since have
    for task in tasks:
        lane, duration = task.lane, seconds(task)
        if not 0 <= duration < math.inf:
            raise _no_duration(task, duration)
        start = free[lane]
        for buffer in task.reads:
            if (since := written.get(buffer, 0.0)) > start:
                start = since
        for buffer in task.writes:
            if (since := touched.get(buffer, 0.0)) > start:
                start = since
        free[lane] = end = start + duration
        busy[lane] += duration
        for buffer in task.reads:
            if touched.get(buffer, 0.0) < end:
                touched[buffer] = end
        for buffer in task.writes:
            written[buffer] = touched[buffer] = end
    last = max(end for lane, end in free.items() if lane is not Lane.H2D)
    return last or max(free.values()), busy


def _duration(task: Task, seconds: Callable[[Task], float]) -> float:
    duration = seconds(task)
    if not 0 <= duration < math.inf:
        raise _no_duration(task, duration)
    return duration


def _no_duration(task: Task, duration: float) -> ScheduleError:
    return ScheduleError(f"{task} would take {duration} s; give a finite duration of 0 or more")
