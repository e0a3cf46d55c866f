"""Running a schedule on a GPU: a CUDA stream for each of its lanes, a thread for the CPU lane."""

from __future__ import annotations

import queue
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache

import torch

from moe_lightning.pipeline.task import BufferKind, Lane, Schedule, Task, TaskKind
from moe_lightning.pipeline.timeline import Timeline
from moe_lightning.runtime.executor import Runner
from moe_lightning.runtime.stream_counter import StreamCounter

# Tasks launched but not done on a lane. Drivers queue about a thousand operations of a stream; a launch beyond that
# blocks inside the driver, where it may hold what the CPU lane needs to go on. A GPU task is some ten operations.
_IN_FLIGHT = {Lane.GPU: 48, Lane.H2D: 256, Lane.D2H: 256, Lane.BACK: 256}
_CHECK_EVERY = 16
_SWITCH_S = 1e-4


class CudaExecutor:
    """Runs the CPU lane on a thread and each other lane on a stream, all at once.

    The caller's thread launches every task in launch order, in which a task comes after all that it waits for: so
    each event is recorded before anything waits for it. Streams wait for each other by events and for the CPU lane
    by a count; the CPU lane waits for events on its thread. So the launcher runs ahead of all lanes and no lane
    waits for Python.

    What a pass loads for the next one is not waited for: the next pass's first reader of a frame does that.

    Executors of a device share its streams: one of them runs at a time.
    """

    def __init__(self, device: torch.device, *, waits_in_stream: bool | None = None) -> None:
        self._device = device
        self._streams = _streams(device)
        self._cpu = _CpuLane(StreamCounter(waits_in_stream))
        self._preloads: torch.cuda.Event | None = None

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What is launched inside is in the order of the GPU lane."""
        with torch.cuda.stream(self._streams[Lane.GPU]):
            yield

    @torch.inference_mode()
    def run(self, schedule: Schedule, runner: Runner, *, record: bool = True) -> Callable[[], Timeline]:
        """Run the whole schedule; a function that says when each task ran.

        An error in one lane stops the launches; it is raised here when all that was launched is done.

        Args:
            schedule: what to run.
            runner: does its tasks.
            record: without it nothing is known of when tasks ran, and launching them takes a third less.
        """
        launch = _Launch(schedule, runner, self._streams, self._cpu, self._preloads, record=record)
        with self.scope(), _prompt_switches():
            try:
                launch.all()
                self._preloads = torch.cuda.Event()
                self._preloads.record(self._streams[Lane.H2D])
                self._cpu.wait()
                self._streams[Lane.GPU].synchronize()
                self._streams[Lane.D2H].synchronize()
            except BaseException as error:  # an interrupt too: nothing may still run when it leaves
                launch.fail(error)
                self._cpu.wait()
        launch.forget_runner()
        if launch.error is not None:
            with suppress(RuntimeError):  # a GPU that has failed says so again
                for stream in self._streams.values():
                    stream.synchronize()
            # The error's traceback holds this frame. If this frame held the error, what a task that ran out of
            # memory had allocated would stay until the next collection of cycles.
            failure, launch.error = launch.error, None
            try:
                raise failure
            finally:
                del failure
        return launch.timeline


@lru_cache
def _streams(device: torch.device) -> dict[Lane, torch.cuda.Stream]:
    """One for each lane, for all executors of a device: cuBLAS keeps 32 MiB for every stream that it has seen."""
    # What waits for attention is short, and much waits for it: it goes before what else the GPU computes.
    return {lane: torch.cuda.Stream(device, priority=-1 if lane is Lane.BACK else 0) for lane in _IN_FLIGHT}


@contextmanager
def _prompt_switches() -> Iterator[None]:
    """Python's threads take turns quickly: the CPU lane must not wait milliseconds for the launcher to yield."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class _Launch:
    """One run's state."""

    def __init__(
        self,
        schedule: Schedule,
        runner: Runner,
        streams: dict[Lane, torch.cuda.Stream],
        cpu: _CpuLane,
        preloads: torch.cuda.Event | None,
        *,
        record: bool,
    ) -> None:
        self._schedule = schedule
        self._runner: Runner | None = runner
        self._streams = streams
        self._cpu = cpu
        self._preloads = preloads
        self._record = record
        self._waited_for = {dep for deps in schedule.deps for dep in deps}
        self._current = Lane.GPU
        self._cpu_counts: dict[int, int] = {}
        self._in_flight: dict[Lane, deque[torch.cuda.Event]] = {lane: deque() for lane in streams}
        self._num_launched = dict.fromkeys(streams, 0)
        self._starts: dict[int, torch.cuda.Event] = {}
        self._ends: dict[int, torch.cuda.Event] = {}
        self._times: dict[int, tuple[float, float]] = {}  # of CPU tasks
        self._base_time = 0.0
        self._arrays, self._has_arrays = torch.cuda.Event(), False
        self.error: BaseException | None = None

    def all(self) -> None:
        """Launch everything, in launch order."""
        if self._record:
            self._base = _timed_event(self._streams[Lane.GPU])
            self._base.synchronize()
            self._base_time = time.perf_counter()
        self._arrays.record(self._streams[Lane.GPU])
        for index, task in enumerate(self._schedule.tasks):
            if self.error is not None:
                return
            if task.lane is Lane.CPU:
                self._hand_over(index, task)
            else:
                self._launch(index, task)

    def forget_runner(self) -> None:
        """Let go of the pass's tensors: the timeline may be kept for long."""
        self._runner = None

    def fail(self, error: BaseException) -> None:
        """Launch nothing more; the first error counts."""
        self.error = self.error or error

    def _hand_over(self, index: int, task: Task) -> None:
        deps = self._schedule.deps[index]
        events = [self._ends[dep] for dep in deps if dep not in self._cpu_counts]

        def run() -> None:
            try:
                for event in events:
                    event.synchronize()
                if self.error is None and self._runner is not None:
                    start = time.perf_counter()
                    self._runner.run(task)
                    self._times[index] = (start, time.perf_counter())
            except BaseException as error:  # whatever it is, the caller's thread must raise it
                self.fail(error)

        self._cpu_counts[index] = self._cpu.put(run)

    def _launch(self, index: int, task: Task) -> None:
        assert self._runner is not None
        lane = task.lane
        stream = self._streams[lane]
        self._keep_short(lane)
        if task.kind is TaskKind.SAMPLE:
            # Random draws are many operations, more than a queue holds: none of them may wait for the CPU lane.
            self._cpu.wait()
        for dep in self._schedule.deps[index]:
            count = self._cpu_counts.get(dep)
            if count is None:
                stream.wait_event(self._ends[dep])
            else:
                self._cpu.counter.wait(stream, count)
        if task.kind is TaskKind.LOAD_KV and not self._has_arrays:
            # The only copy to the GPU that reads the pass's small arrays without waiting for GPU work.
            stream.wait_event(self._arrays)
            self._has_arrays = True
        if self._preloads is not None and lane is Lane.GPU and _reads_frames(task):
            stream.wait_event(self._preloads)
            self._preloads = None
        if lane is not self._current:
            torch.cuda.set_stream(stream)
            self._current = lane
        if self._record:
            self._starts[index] = _timed_event(stream)
        self._runner.run(task)
        self._mark_end(index, lane, stream)

    def _mark_end(self, index: int, lane: Lane, stream: torch.cuda.Stream) -> None:
        self._num_launched[lane] += 1
        is_check = self._num_launched[lane] % _CHECK_EVERY == 0
        if self._record:
            self._ends[index] = _timed_event(stream)
        elif is_check or index in self._waited_for:
            self._ends[index] = torch.cuda.Event()
            self._ends[index].record(stream)
        if is_check:
            self._in_flight[lane].append(self._ends[index])

    def _keep_short(self, lane: Lane) -> None:
        """Wait until the lane's queue has room."""
        checks = self._in_flight[lane]
        while len(checks) * _CHECK_EVERY >= _IN_FLIGHT[lane]:
            checks.popleft().synchronize()

    def timeline(self) -> Timeline:
        """When each task ran; waits for those that still do."""
        assert self._record, "this run was not recorded"
        starts, ends = [], []
        for index in range(len(self._schedule.tasks)):
            if index in self._times:
                start, end = self._times[index]
            else:
                self._ends[index].synchronize()
                start = self._base_time + self._base.elapsed_time(self._starts[index]) * 1e-3
                end = self._base_time + self._base.elapsed_time(self._ends[index]) * 1e-3
            starts.append(start)
            ends.append(max(start, end))
        return Timeline.of(self._schedule, starts, ends)


def _timed_event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def _reads_frames(task: Task) -> bool:
    return any(buffer.kind is BufferKind.FRAME for buffer in task.reads)


_Work = queue.SimpleQueue[tuple[int, Callable[[], None]] | None]  # numbered; None ends the thread


class _CpuLane:
    """A thread that runs what it is given, in order, and counts; it ends with the lane."""

    def __init__(self, counter: StreamCounter) -> None:
        self.counter = counter
        self._num_put = 0
        self._queue: _Work = queue.SimpleQueue()
        # The thread knows nothing of this object, which would else never be let go.
        threading.Thread(target=_serve, args=(self._queue, counter), name="lane-cpu", daemon=True).start()
        weakref.finalize(self, self._queue.put, None)

    def put(self, run: Callable[[], None]) -> int:
        """Run it after all that was put before; the count that says it is done."""
        # Counted first and carried along: an interrupt in between skips a number and shifts none.
        self._num_put += 1
        number = self._num_put
        self._queue.put((number, run))
        return number

    def wait(self) -> None:
        """Wait for all that was put."""
        self.counter.wait_here(self.put(lambda: None))


@torch.inference_mode()
def _serve(work: _Work, counter: StreamCounter) -> None:
    while (item := work.get()) is not None:
        number, run = item
        run()
        del item, run  # they hold the pass's tensors
        counter.raise_to(number)
