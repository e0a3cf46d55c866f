"""When each task of a pass ran, predicted or recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from moe_lightning.errors import ScheduleError
from moe_lightning.pipeline.task import Lane, Schedule, TaskKind


@dataclass(frozen=True, slots=True)
class Record:
    """One task's run; `start` and `end` are seconds on the timeline's clock."""

    task_name: str
    kind: TaskKind
    lane: Lane
    layer: int
    micro_batches: tuple[int, ...]
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it ran."""
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """The runs of a schedule's tasks, in launch order.

    The clock may start anywhere; nothing but differences counts.
    """

    name: str
    records: tuple[Record, ...]

    @classmethod
    def of(cls, schedule: Schedule, starts: Sequence[float], ends: Sequence[float]) -> Timeline:
        """The timeline of a schedule whose task t ran from `starts[t]` to `ends[t]`, in seconds.

        Raises:
            ScheduleError: the lengths differ, or a task ends before it starts.
        """
        tasks = schedule.tasks
        if not len(tasks) == len(starts) == len(ends):
            raise ScheduleError(
                f"{len(starts)} starts and {len(ends)} ends for the {len(tasks)} tasks of {schedule.name}; "
                "give one of each per task"
            )
        for task, start, end in zip(tasks, starts, ends, strict=True):
            if not start <= end:
                raise ScheduleError(
                    f"{task} starts at {start} s and ends at {end} s; is the clock monotonic?"
                )
        return cls(
            schedule.name,
            tuple(
                Record(str(task), task.kind, task.lane, task.layer, task.micro_batches, start, end)
                for task, start, end in zip(tasks, starts, ends, strict=True)
            ),
        )

    @cached_property
    def start(self) -> float:
        """When the first task starts; 0 without tasks."""
        return min((r.start for r in self.records), default=0.0)

    @cached_property
    def end(self) -> float:
        """When the last task ends; 0 without tasks."""
        return max((r.end for r in self.records), default=0.0)

    @property
    def span(self) -> float:
        """Seconds from the first start to the last end."""
        return self.end - self.start

    @property
    def until_tokens(self) -> float:
        """Seconds until the tokens are there: pages of the next pass may come later."""
        return max((r.end for r in self.records if r.lane is not Lane.H2D), default=self.end) - self.start

    def busy(self, *lanes: Lane) -> list[tuple[float, float]]:
        """The intervals in which one of the lanes runs something, in order, apart from each other."""
        # Recorded runs of one lane can overlap a little, so that adding them up would count time twice.
        intervals: list[tuple[float, float]] = []
        for start, end in sorted(
            (r.start, r.end) for r in self.records if r.lane in lanes and r.end > r.start
        ):
            if intervals and start <= intervals[-1][1]:
                intervals[-1] = (intervals[-1][0], max(end, intervals[-1][1]))
            else:
                intervals.append((start, end))
        return intervals

    def bubbles(self, lane: Lane) -> list[tuple[float, float]]:
        """The intervals of the span in which the lane waits, in order."""
        edges = [self.start, *(edge for interval in self.busy(lane) for edge in interval), self.end]
        gaps = zip(edges[::2], edges[1::2], strict=True)
        return [(start, end) for start, end in gaps if end > start]

    def busy_seconds(self) -> dict[Lane, float]:
        """Seconds that each lane runs something."""
        return {lane: sum(end - start for start, end in self.busy(lane)) for lane in Lane}

    def utilization(self) -> dict[Lane, float]:
        """The share of the span, 0 to 1, that each lane runs something."""
        if self.span <= 0:
            return dict.fromkeys(Lane, 0.0)
        return {lane: seconds / self.span for lane, seconds in self.busy_seconds().items()}

    def window(self, start: float, end: float) -> Timeline:
        """What ran between two times, cut off at both."""
        inside = (r for r in self.records if r.start < end and r.end > start)
        cut = (replace(r, start=max(r.start, start), end=min(r.end, end)) for r in inside)
        return Timeline(self.name, tuple(cut))
