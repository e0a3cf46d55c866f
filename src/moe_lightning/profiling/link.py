"""Measures copies between host and GPU memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from moe_lightning.hardware.curve import TimeCurve
from moe_lightning.profiling.effort import Effort
from moe_lightning.profiling.events import recorded, wait_for
from moe_lightning.units import MIB

_MOST_COPIES = 256  # a driver queues about a thousand operations of a stream
_BATCH_BYTES = 256 * MIB
_HOLD_CYCLES = 40_000  # for each launch: some 20 us, longer than Python takes for one
_AHEAD_S = 0.3  # of copies in the queue: longer than a layer's calls of attention
_GPU_ROWS = 4


class Link:
    """Copies between page-locked rows and as large buffers on the GPU.

    Args:
        host: [rows, bytes] uint8.
        effort: sizes and durations.
    """

    def __init__(self, host: Tensor, effort: Effort) -> None:
        self._host, self._effort = host, effort
        rows = min(_GPU_ROWS, len(host))
        self._on_gpu = torch.empty((rows, host.shape[1]), dtype=torch.uint8, device="cuda").random_()
        self._streams = (torch.cuda.Stream(), torch.cuda.Stream())

    def to_gpu(self) -> TimeCurve:
        """Seconds of a copy to the GPU by bytes."""
        return self._curve(self.copy_to_gpu)

    def from_gpu(self) -> TimeCurve:
        """Seconds of a copy to the host by bytes."""
        return self._curve(self.copy_from_gpu)

    def copy_to_gpu(self, number: int, size: int) -> None:
        """Launch one copy; each number takes other memory."""
        source, target = self._places(number, size)
        target.copy_(source, non_blocking=True)

    def copy_from_gpu(self, number: int, size: int) -> None:
        """Launch one copy the other way."""
        target, source = self._places(number, size)
        target.copy_(source, non_blocking=True)

    def both_ways(self) -> tuple[float, float]:
        """Bytes/s to and from the GPU while copies of the largest size run both ways."""
        size = self._host.shape[1]
        count = max(4, min(_MOST_COPIES, int(20 * _BATCH_BYTES / size)))
        found = [self._both_ways_once(size, count) for _ in range(3)]
        return median(up for up, _ in found), median(down for _, down in found)

    def _both_ways_once(self, size: int, count: int) -> tuple[float, float]:
        up, down = self._streams
        torch.cuda.synchronize()
        with torch.cuda.stream(up):
            torch.cuda._sleep(2 * count * _HOLD_CYCLES)
            start = recorded()
            down.wait_event(start)
            for number in range(count):
                self.copy_to_gpu(2 * number, size)
            up_end = recorded()
        with torch.cuda.stream(down):
            for number in range(count):
                self.copy_from_gpu(2 * number + 1, size)
            down_end = recorded()
        torch.cuda.synchronize()
        return (
            size * count / start.elapsed_time(up_end) * 1e3,
            size * count / start.elapsed_time(down_end) * 1e3,
        )

    def _curve(self, copy: Callable[[int, int], None]) -> TimeCurve:
        sizes = self._effort.copy_sizes
        return TimeCurve(sizes, tuple(self._seconds(copy, size) for size in sizes))

    def _seconds(self, copy: Callable[[int, int], None], size: int) -> float:
        """Of one copy among many that are queued before the first begins."""
        count = max(2, min(_MOST_COPIES, _BATCH_BYTES // size))
        found: list[float] = []
        # Not seconds of copies: small ones are held much longer than they take.
        end_s = time.perf_counter() + self._effort.gpu_point_s
        while len(found) < 4 or time.perf_counter() < end_s:
            with torch.cuda.stream(self._streams[0]):
                torch.cuda._sleep(count * _HOLD_CYCLES)
                start = recorded()
                for number in range(count):
                    copy(number + len(found) * count, size)
                end = recorded()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3 / count)
        return median(found[1:])

    def _places(self, number: int, size: int) -> tuple[Tensor, Tensor]:
        """A piece of host memory and one of GPU memory."""
        per_row = self._host.shape[1] // size
        start = number % per_row * size
        row = number // per_row
        piece = slice(start, start + size)
        return self._host[row % len(self._host), piece], self._on_gpu[row % len(self._on_gpu), piece]


class Copies:
    """Copies to the GPU that go on while something else is measured.

    No thread of their own: `keep_up` queues enough of them to outlast what is called until the next `keep_up`,
    unless the CPU is very slow; then their rate is that of the time before they run out. As in a pass, now and then
    queries leave the GPU beside them and results come.

    Args:
        link: that copies.
        size: bytes of each.
        bandwidth: bytes/s that they reach alone.
    """

    def __init__(self, link: Link, size: int, bandwidth: float) -> None:
        self._link, self._size = link, size
        self._depth = max(4, min(_MOST_COPIES, int(_AHEAD_S * bandwidth / size) + 1))
        self._stream, self._back = torch.cuda.Stream(), torch.cuda.Stream()
        self._pending: deque[torch.cuda.Event] = deque()
        self._both_ways: torch.cuda.Event | None = None  # the end of what went beside them
        self._number = 0
        self._done: list[torch.cuda.Event] = []  # since they are watched
        self._watched = (0, 0.0)  # copies, and seconds from the first to the last one's end

    def __enter__(self) -> Self:
        self.keep_up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let them end."""
        for event in (*self._pending, *filter(None, [self._both_ways])):
            wait_for(event)
        self._pending.clear()

    def keep_up(self, num_bytes: int = 0) -> None:
        """Queue more, and beside them copies of about so many bytes each way, if the last such ones are done.

        So the queues stay short: a launch into a full one blocks in the driver.
        """
        self._collect()
        with torch.cuda.stream(self._stream):
            while len(self._pending) < self._depth:
                self._link.copy_to_gpu(self._number, self._size)
                self._number += 1
                self._pending.append(recorded())
        count = round(num_bytes / self._size)
        if count and (self._both_ways is None or self._both_ways.query()):
            with torch.cuda.stream(self._back):
                for number in range(count):
                    self._link.copy_from_gpu(number, self._size)
                    self._link.copy_to_gpu(number, self._size)
                self._both_ways = recorded()

    def wait(self) -> None:
        """Wait for those that are queued, as a pass's launcher waits for room: that keeps a core busy."""
        with torch.cuda.stream(self._stream):
            last = recorded()
        last.synchronize()

    def watch(self) -> None:
        """From now on they count, until `watched`: what is to run beside them begins."""
        self._collect()
        self._done.clear()

    def watched(self) -> None:
        """What ran beside them has ended."""
        self._collect()
        if self._done:  # when the queue runs dry, the time after the last one does not count
            count, seconds = self._watched
            seconds += self._done[0].elapsed_time(self._done[-1]) / 1e3
            self._watched = count + len(self._done) - 1, seconds

    def rate_watched(self) -> float | None:
        """Bytes/s while they were watched since this was asked last, slow times too; None if too few ended."""
        (count, seconds), self._watched = self._watched, (0, 0.0)
        return self._size * count / seconds if count else None

    def _collect(self) -> None:
        while self._pending and self._pending[0].query():
            self._done.append(self._pending.popleft())
