"""A whole profile of this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch

from moe_lightning.engine.identity import this_machine
from moe_lightning.errors import ConfigError
from moe_lightning.hardware.inspection import disk_read_rate
from moe_lightning.hardware.kernel_times import ModelShape
from moe_lightning.hardware.profile import DiskProfile, Profile
from moe_lightning.profiling.cpu_machine import measure_cpu_machine
from moe_lightning.profiling.effort import Effort
from moe_lightning.profiling.steps import Report
from moe_lightning.runtime.device_errors import explain


def measure(
    shapes: Sequence[ModelShape],
    effort: Effort,
    *,
    gpu_memory: int | None = None,
    report: Report = lambda part, done, total: None,
) -> Profile:
    """Measure this machine, with its first GPU if it has one.

    Args:
        shapes: models whose kernels are measured.
        effort: how much, in how much memory and how long.
        gpu_memory: bytes of GPU memory that the process may use; None: as `effort` says.
        report: hears of progress.

    Raises:
        ConfigError: there is too little memory, or a GPU without Triton.
        DeviceError: the GPU failed.
    """
    start = time.perf_counter()
    machine = this_machine()
    torch.manual_seed(0)
    gpu = None
    if machine.gpu is None:
        host = measure_cpu_machine(shapes, effort, report)
    else:
        from moe_lightning.profiling.gpu_machine import measure_gpu_machine

        with _failures_explained():
            host, gpu = measure_gpu_machine(shapes, effort, gpu_memory, report)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Profile(machine, created, time.perf_counter() - start, host, gpu)


def measure_disk(directory: Path) -> DiskProfile:
    """The read rate of a directory's disk.

    Raises:
        ConfigError: the directory cannot be written.
    """
    try:
        return DiskProfile(str(directory.resolve()), disk_read_rate(directory))
    except OSError as error:
        raise ConfigError(
            f"cannot measure the disk of {directory}: {error.strerror}; give a directory that can be written, with "
            "0.5 GiB free, as --disk"
        ) from error


@contextmanager
def _failures_explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        known = explain(error)
        if known is None:
            raise
        raise known from error
