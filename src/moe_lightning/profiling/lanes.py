"""Measures what the executor adds to work: launching tasks, and handing over from lane to lane."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from moe_lightning.hardware.curve import TimeCurve
from moe_lightning.hardware.profile import LaneProfile
from moe_lightning.memory.arena import HostArena
from moe_lightning.pipeline.task import Lane, PassShape, Schedule, Task, TaskKind
from moe_lightning.profiling.effort import Effort
from moe_lightning.runtime.cuda_executor import CudaExecutor

_KINDS = {
    Lane.GPU: TaskKind.PRE_ATTENTION,
    Lane.H2D: TaskKind.LOAD_HIDDEN,
    Lane.D2H: TaskKind.OFFLOAD_QKV,
    Lane.CPU: TaskKind.ATTENTION,
}
_SHAPE = PassShape(1, 0, 1, 1, 0, (0,), 0)
_TINY = 4096  # bytes of a copy that takes no time of its own
_HOLD_CYCLES = 150_000  # for each task: some 0.1 ms, longer than launching it takes
_REPEATS = 9


class _Tiny:
    """A runner whose tasks do next to nothing; the first one may hold the GPU until all are launched."""

    def __init__(self, copy_bytes: int, num_kernels: int, num_held: int) -> None:
        arena = HostArena((2, copy_bytes), torch.uint8)
        arena.prepare(pin=True)
        self._host, self._arena = arena.tensor, arena
        self._on_gpu = torch.zeros((2, copy_bytes), dtype=torch.uint8, device="cuda")
        self._numbers = torch.zeros(64, device="cuda")
        self._num_kernels, self._num_held = num_kernels, num_held
        self._marks: list[torch.cuda.Event] = []

    def run(self, task: Task) -> None:
        """Do the task; one with `page` 0 or 1 notes when it begins."""
        if task.lane is Lane.GPU and task.layer == 0:
            torch.cuda._sleep(self._num_held * _HOLD_CYCLES + 1)
        if task.page >= 0:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        if task.lane is Lane.GPU:
            for _ in range(self._num_kernels):
                self._numbers.add_(1.0)
        elif task.lane is Lane.H2D:
            self._on_gpu[0].copy_(self._host[0], non_blocking=True)
        elif task.lane is Lane.D2H:
            self._host[1].copy_(self._on_gpu[1], non_blocking=True)

    def seconds_between_marks(self) -> float:
        """From the first to the last one; forgets them."""
        self._marks[-1].synchronize()
        seconds = float(self._marks[0].elapsed_time(self._marks[-1])) / 1e3
        self._marks.clear()
        return seconds


class LanesBench:
    """Chains of tiny tasks through the executor.

    Args:
        effort: how long the chains are.
    """

    def __init__(self, effort: Effort) -> None:
        self._num = effort.chain
        self._hop_sizes = effort.hop_sizes
        self._executor = CudaExecutor(torch.device("cuda", 0))

    def measure(self) -> LaneProfile:
        """All of the lanes' times."""
        handover = self._handover()
        cycle = self._held((Lane.GPU, Lane.D2H, Lane.CPU, Lane.H2D))
        gpu = self._launched(Lane.GPU)
        return LaneProfile(
            gpu_launch_s=gpu,
            gpu_kernel_launch_s=_positive((self._launched(Lane.GPU, num_kernels=5) - gpu) / 4),
            h2d_launch_s=self._launched(Lane.H2D),
            d2h_launch_s=self._launched(Lane.D2H),
            cpu_launch_s=self._launched(Lane.CPU),
            gpu_gap_s=self._held((Lane.GPU,)),
            h2d_gap_s=self._held((Lane.H2D,)),
            d2h_gap_s=self._held((Lane.D2H,)),
            stream_handover_s=handover,
            cpu_round_trip_s=_positive(cycle - 2 * handover),
            h2d_hop=self._hops(Lane.H2D, handover),
            d2h_hop=self._hops(Lane.D2H, handover),
        )

    def _handover(self) -> float:
        """Seconds of a hop between the GPU lane and one that copies, either way."""
        return (self._held((Lane.GPU, Lane.H2D)) + self._held((Lane.GPU, Lane.D2H))) / 4

    def _hops(self, lane: Lane, handover: float) -> TimeCurve:
        seconds = [_positive(self._held((Lane.GPU, lane), size) - handover) for size in self._hop_sizes]
        return TimeCurve(self._hop_sizes, tuple(seconds))

    def _held(self, cycle: Sequence[Lane], copy_bytes: int = _TINY) -> float:
        """Seconds of a cycle of tasks, each waiting for the one before, all launched before the first begins."""
        num_cycles = max(1, min(self._num, 160 // len(cycle)))
        lanes = [lane for _ in range(num_cycles) for lane in cycle] + [cycle[0]]
        schedule = _chain(lanes, cycle[0])
        runner = _Tiny(copy_bytes, 1, len(lanes))
        found = []
        for _ in range(_REPEATS):
            self._executor.run(schedule, runner, record=False)
            found.append(runner.seconds_between_marks() / num_cycles)
        return _positive(median(found[1:]))

    def _launched(self, lane: Lane, num_kernels: int = 1) -> float:
        """Seconds of a task when its launches are all that takes time: how much longer more tasks take."""
        runner = _Tiny(_TINY, num_kernels, 0)
        few, many = (_independent(lane, count * self._num) for count in (2, 10))

        def run(schedule: Schedule) -> Callable[[], object]:
            return lambda: self._executor.run(schedule, runner, record=False)

        few_s, many_s = _wall(run(few)), _wall(run(many))
        return _positive((many_s - few_s) / (8 * self._num))


def _chain(lanes: Sequence[Lane], measured: Lane) -> Schedule:
    """A GPU task that holds all others, then tasks that wait for one another; first and last have a mark."""
    tasks = [Task(_KINDS[Lane.GPU], Lane.GPU, 0, (0,), (), ())]
    last = len(lanes) - 1
    for number, lane in enumerate(lanes):
        mark = 0 if number == 0 else 1 if number == last else -1
        tasks.append(Task(_KINDS[lane], lane, 1, (0,), (), (), page=mark))
    # Tasks of one lane are in order anyway; all of them wait for the one that holds.
    before = [Lane.GPU, *lanes]
    deps = ((), *((n,) if lane is not before[n] else () for n, lane in enumerate(lanes)))
    return Schedule(f"chain {measured}", _SHAPE, tuple(tasks), deps)


def _independent(lane: Lane, count: int) -> Schedule:
    tasks = tuple(Task(_KINDS[lane], lane, 1, (0,), (), ()) for _ in range(count))
    return Schedule(f"{count} {lane}", _SHAPE, tasks, ((),) * count)


def _wall(run: Callable[[], object]) -> float:
    found = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return median(found[1:])


def _positive(seconds: float) -> float:
    """Differences of two measurements may fall below nothing."""
    return max(seconds, 1e-9)
