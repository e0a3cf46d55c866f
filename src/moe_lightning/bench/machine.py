"""The machine that a measurement ran on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.host import cpu_name

_STAT = Path("/proc/stat")


def require_gpu() -> torch.dtype:
    """The 16-bit dtype that this machine's GPU computes in.

    Raises:
        ConfigError: there is no GPU, or no Triton to compile for it.
    """
    if not torch.cuda.is_available():
        raise ConfigError("no CUDA device: kernels are measured on a GPU; run this on a machine that has one")
    try:
        version("triton")
    except PackageNotFoundError as error:
        raise ConfigError("no triton: install it, or a CUDA build of torch, which brings it") from error
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def facts() -> dict[str, Any]:
    """Commit, hardware and versions, for a result file."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "hardware": _gpu() | {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "versions": {name: _version(name) for name in ("torch", "triton")}
        | {"python": platform.python_version(), "cuda": torch.version.cuda},
    }


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"gpu": None}
    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def seconds_since_start() -> float:
    """Since the process began, imports and all."""
    # The command's name, in brackets, may hold spaces; the start is the 22nd field, in ticks since the system's.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - started


def stolen_seconds() -> float:
    """CPU seconds that a virtual machine's host has given to others since the start; 0 where nobody counts them."""
    try:
        fields = _STAT.read_text().partition("\n")[0].split()  # cpu, user, nice, ..., the eighth time
    except OSError:
        return 0.0
    return int(fields[8]) / os.sysconf("SC_CLK_TCK") if len(fields) > 8 else 0.0


def _git(*args: str) -> str:
    """Empty where the package does not run from a repository."""
    command = ["git", *args]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
        )
    except FileNotFoundError:
        return ""
    return found.stdout.strip()
