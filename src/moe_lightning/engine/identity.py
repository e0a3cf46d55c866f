"""This machine, as far as it changes what is measured on it."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from moe_lightning import kernels
from moe_lightning.hardware.gpu_memory import driver_version
from moe_lightning.hardware.host import cpu_name, total_memory
from moe_lightning.hardware.machine import GpuIdentity, Machine
from moe_lightning.kernels.cpu_kernels import CpuKernels


def this_machine() -> Machine:
    """The machine that this process runs on, with its first GPU."""
    return Machine(
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        isa=CpuKernels(1).isa,
        host_memory_bytes=total_memory(),
        kernels=f"{_version('moe-lightning')}+{kernels_digest()}",
        torch=torch.__version__,
        gpu=_gpu() if torch.cuda.is_available() else None,
    )


def _gpu() -> GpuIdentity:
    p = torch.cuda.get_device_properties(0)
    return GpuIdentity(
        name=p.name,
        uuid=str(p.uuid),
        memory_bytes=p.total_memory,
        driver=driver_version() or "unknown",
        cuda=torch.version.cuda or "unknown",
        triton=_version("triton"),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@cache
def kernels_digest() -> str:
    """Short hash of the kernels' files: between two versions of the package they may change all the same."""
    directories = [Path(found) for found in kernels.__path__]
    files = sorted(path for directory in directories for path in directory.iterdir() if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
