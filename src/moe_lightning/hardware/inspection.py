"""What this machine has and lacks for streaming a model, each with what it costs."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from moe_lightning.hardware.host import available_memory, cpu_name
from moe_lightning.units import GIB, MIB, format_bytes

_DISK_BYTES = 512 * MIB
_CHUNK = 16 * MIB


class Verdict(StrEnum):
    """How a finding bears on speed."""

    GOOD = "ok"
    SLOW = "slow"
    BAD = "missing"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `advice` says what a shortage costs and what helps."""

    name: str
    value: str
    verdict: Verdict = Verdict.GOOD
    advice: str = ""


def host_findings(root: Path = Path("/")) -> Iterator[Finding]:
    """CPU, memory, huge pages, locking limit and NUMA nodes, as the files under `root` say."""
    yield Finding("cpu", f"{cpu_name(root)}, {len(os.sched_getaffinity(0))} cores for this process")
    yield _memory()
    yield _huge_pages(root)
    yield _lock_limit()
    yield _numa(root)


def disk_finding(directory: Path, measure: Callable[[Path], float] | None = None) -> Finding:
    """How fast a checkpoint in a directory would load: bytes/s of a file just written, read past the page cache."""
    try:
        rate = (measure or disk_read_rate)(directory)
    except OSError as error:
        advice = "the read rate is unknown; give a directory that can be written with --disk"
        return Finding("disk", f"{directory}: {error.strerror}", Verdict.SLOW, advice)
    minutes = 90e9 / rate / 60
    value = f"{directory} reads {rate / 1e9:.2f} GB/s"
    if rate >= 1e9:
        return Finding("disk", value)
    advice = f"a checkpoint of 90 GB takes {minutes:.0f} minutes to load; an NVMe disk takes one"
    return Finding("disk", value, Verdict.SLOW, advice)


def disk_read_rate(directory: Path) -> float:
    """Bytes/s of reading a fresh file of 512 MiB that is no longer in the page cache.

    Raises:
        OSError: the directory cannot be written, or its disk is full.
    """
    chunk = os.urandom(_CHUNK)  # what compresses would read faster
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(_DISK_BYTES // _CHUNK):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        for offset in range(0, _DISK_BYTES, _CHUNK):
            os.pread(file.fileno(), _CHUNK, offset)
        return _DISK_BYTES / (time.perf_counter() - start)


def _memory() -> Finding:
    free = available_memory()
    value = f"{format_bytes(free)} free"
    if free >= 64 * GIB:
        return Finding("host memory", value)
    advice = "holds weights that stream and all KV: a 90 GB model does not fit, and less KV is fewer tokens/s"
    return Finding("host memory", value, Verdict.SLOW, advice)


def _huge_pages(root: Path) -> Finding:
    file = root / "sys/kernel/mm/transparent_hugepage/enabled"
    try:
        modes = file.read_text()
    except OSError:
        modes = ""
    mode = modes.partition("[")[2].partition("]")[0] or "not supported"
    if mode in ("always", "madvise"):
        return Finding("huge pages", mode)
    advice = f"loading takes several times as long and attention slows down; echo madvise > {file}"
    return Finding("huge pages", mode, Verdict.SLOW, advice)


def _lock_limit() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("locking limit", "none")
    value = f"{format_bytes(soft)} (ulimit -l)"
    advice = (
        "the GPU's driver usually locks memory beyond it; if `page-locking` below fails, copies run at about a "
        "third of the link's rate: raise memlock in /etc/security/limits.conf, or run the container with "
        "--ulimit memlock=-1"
    )
    return Finding("locking limit", value, Verdict.GOOD, advice)


def _numa(root: Path) -> Finding:
    nodes = sorted((root / "sys/devices/system/node").glob("node[0-9]*"))
    if len(nodes) <= 1:
        return Finding("NUMA", "one node")
    return Finding(
        "NUMA", f"{len(nodes)} nodes; weights and KV come from the GPU's, as long as it has memory"
    )
