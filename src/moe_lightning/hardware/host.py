"""Host memory and CPU of this machine."""

from __future__ import annotations

import platform
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int:
    """Bytes of host memory that can be used without pushing others out: the system's or the container's."""
    available = _meminfo(meminfo, "MemAvailable")
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text()) - _cached_files(cgroup)
    except (OSError, ValueError):  # no container, or none of this kind
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - used))


def _cached_files(cgroup: Path) -> int:
    """Of what a container holds, bytes that the system takes back when others need them: as the read checkpoint."""
    values = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    return int(values.get("active_file", 0)) + int(values.get("inactive_file", 0))


def total_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int:
    """Bytes of host memory, used or not: the system's or the container's."""
    total = _meminfo(meminfo, "MemTotal")
    try:
        return min(total, int((cgroup / "memory.max").read_text()))
    except (OSError, ValueError):  # no container, none of this kind, or no limit
        return total


def cpu_name(root: Path = Path("/")) -> str:
    """The CPU's model, as the system calls it."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _meminfo(meminfo: Path, name: str) -> int:
    values = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    return int(values[name].split()[0]) * 1024
