"""Running a schedule: one task after the other, or every lane on a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from moe_lightning.pipeline.task import Lane, Schedule, Task
from moe_lightning.pipeline.timeline import Timeline


class Runner(Protocol):
    """Does tasks."""

    def run(self, task: Task) -> None:
        """Do one task, whose dependencies are done."""


class Executor(Protocol):
    """Runs the tasks of a schedule."""

    def scope(self) -> AbstractContextManager[None]:
        """What is launched inside comes before the tasks of the next run and after those of the last."""

    def run(self, schedule: Schedule, runner: Runner, *, record: bool = True) -> Callable[[], Timeline]:
        """Run the whole schedule; a function that says when each task ran, if that was to be recorded."""


class SerialExecutor:
    """Runs the tasks in launch order on the caller's thread.

    Args:
        wait: called after each task, where what it launched may still run.
    """

    def __init__(self, wait: Callable[[], None] = lambda: None) -> None:
        self._wait = wait

    def scope(self) -> AbstractContextManager[None]:
        """Nothing to do: everything is in the caller's order."""
        return nullcontext()

    @torch.inference_mode()
    def run(self, schedule: Schedule, runner: Runner, *, record: bool = True) -> Callable[[], Timeline]:
        """Run the whole schedule; a function that says when each task ran, which is always recorded."""
        starts, ends = [], []
        for task in schedule.tasks:
            starts.append(time.perf_counter())
            runner.run(task)
            self._wait()
            ends.append(time.perf_counter())
        return lambda: Timeline.of(schedule, starts, ends)


class ThreadedExecutor:
    """Runs the four lanes at once on the CPU; a task starts when its lane is free and its dependencies are done."""

    def scope(self) -> AbstractContextManager[None]:
        """Nothing to do: everything outside of a run is in the caller's order."""
        return nullcontext()

    def run(self, schedule: Schedule, runner: Runner, *, record: bool = True) -> Callable[[], Timeline]:
        """Run the whole schedule; a function that says when each task ran, which is always recorded.

        An error in one lane, or an interrupt, stops the others at their next task and is raised here.
        """
        run = _LaneRun(schedule, runner)
        threads = [threading.Thread(target=run.serve, args=(lane,), name=f"lane-{lane}") for lane in Lane]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:
            run.fail(error)
            for thread in threads:
                thread.join()
        if run.error is not None:
            raise run.error
        return lambda: Timeline.of(schedule, run.starts, run.ends)


class _LaneRun:
    """One run's state: as lanes keep launch order, the number of tasks a lane has done says which."""

    def __init__(self, schedule: Schedule, runner: Runner) -> None:
        tasks = schedule.tasks
        self._schedule = schedule
        self._runner = runner
        self._changed = threading.Condition()
        self._num_done = dict.fromkeys(Lane, 0)
        self._lanes: dict[Lane, list[int]] = {lane: [] for lane in Lane}
        self._place: list[tuple[Lane, int]] = []
        for index, task in enumerate(tasks):
            self._lanes[task.lane].append(index)
            self._place.append((task.lane, len(self._lanes[task.lane])))
        self.starts = [0.0] * len(tasks)
        self.ends = [0.0] * len(tasks)
        self.error: BaseException | None = None

    @torch.inference_mode()
    def serve(self, lane: Lane) -> None:
        """Run the lane's tasks; on the lane's thread."""
        try:
            for index in self._lanes[lane]:
                if not self._wait(index):
                    return
                self.starts[index] = time.perf_counter()
                self._runner.run(self._schedule.tasks[index])
                self.ends[index] = time.perf_counter()
                with self._changed:
                    self._num_done[lane] += 1
                    self._changed.notify_all()
        except BaseException as error:  # whatever it is, the caller's thread must raise it
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Stop all lanes; the first error counts."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()

    def _wait(self, index: int) -> bool:
        """Wait for the task's dependencies; False if the run has failed."""
        places = [self._place[dep] for dep in self._schedule.deps[index]]
        with self._changed:
            self._changed.wait_for(
                lambda: self.error is not None or all(self._num_done[lane] >= n for lane, n in places)
            )
            return self.error is None
