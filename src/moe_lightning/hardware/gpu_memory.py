"""What the driver says of itself and of GPU memory, through its management library."""

from __future__ import annotations

import ctypes
import os
from functools import cache

_UNKNOWN = 2**64 - 1


class _Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used_bytes", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return None if library.nvmlInit_v2() else library


def _device(address: str) -> ctypes.c_void_p | None:
    library, handle = _library(), ctypes.c_void_p()
    if library is None:
        return None
    failed = library.nvmlDeviceGetHandleByPciBusId_v2(address.encode(), ctypes.byref(handle))
    return None if failed else handle


def driver_version() -> str:
    """Such as ``570.86.15``; empty without a driver."""
    library, text = _library(), ctypes.create_string_buffer(96)
    if library is None or library.nvmlSystemGetDriverVersion(text, len(text)):
        return ""
    return text.value.decode()


def pci_bus_id(index: int) -> str:
    """Address of a GPU that CUDA gives this number, such as ``0000:65:00.0``; empty without a driver."""
    name = ctypes.create_string_buffer(32)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        driver.cuInit(0)
        driver.cuDeviceGetPCIBusId(name, len(name), index)
    except OSError:
        return ""
    return name.value.decode()


def process_bytes(address: str) -> int | None:
    """GPU memory that this process holds, its context and kernels included; None where the driver does not say.

    Args:
        address: as `pci_bus_id` gives it.
    """
    library, device = _library(), _device(address)
    if library is None or device is None:
        return None
    count = ctypes.c_uint(1024)
    processes = (_Process * count.value)()
    if library.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(count), processes):
        return None
    for process in processes[: count.value]:
        if process.pid == os.getpid() and process.used_bytes != _UNKNOWN:
            return int(process.used_bytes)
    return None


def device_bytes(address: str) -> tuple[int, int] | None:
    """Used and total memory of the GPU, all processes together; None where the driver does not say."""
    library, device, memory = _library(), _device(address), _Memory()
    if library is None or device is None or library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)):
        return None
    return int(memory.used), int(memory.total)
