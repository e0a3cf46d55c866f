"""Whose the cores were while something was measured."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_IDLE = {3, 4}  # idle and waiting for the disk, in /proc/stat


@dataclass
class Taken:
    """Seconds: on the clock, of cores for this process, for its children, and on its cores for everybody else."""

    seconds: float = 0.0
    own: float = 0.0
    children: float = 0.0
    others: float = 0.0


@contextmanager
def taken() -> Iterator[Taken]:
    """What a block took, known when it has ended; children count once they have ended."""
    found, start = Taken(), (time.perf_counter(), _busy(), _cpu(resource.RUSAGE_SELF))
    before = _cpu(resource.RUSAGE_CHILDREN)
    try:
        yield found
    finally:
        found.seconds = time.perf_counter() - start[0]
        found.own = _cpu(resource.RUSAGE_SELF) - start[2]
        found.children = _cpu(resource.RUSAGE_CHILDREN) - before
        found.others = _busy() - start[1] - found.own - found.children


def _cpu(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def _busy() -> float:
    """Seconds that the cores of this process have worked or were taken away by the host, since the start."""
    names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        name, *fields = line.split()
        if name in names:
            ticks += sum(int(value) for i, value in enumerate(fields[:8]) if i not in _IDLE)
    return ticks / os.sysconf("SC_CLK_TCK")
