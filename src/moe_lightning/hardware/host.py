"""What this machine has free."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int:
    """Bytes of host memory that can be used without pushing others out: the system's or the container's."""
    values = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available = int(values["MemAvailable"].split()[0]) * 1024
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or none of this kind
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - used))
