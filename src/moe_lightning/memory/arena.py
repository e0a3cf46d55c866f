"""Large buffers of exactly the size that was asked for."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

from moe_lightning.errors import ConfigError
from moe_lightning.units import format_bytes


def host_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor over anonymous memory of its own: zeros that cost nothing until they are touched.

    Not from torch's allocators: they round up, and pinned ones to the next power of two.

    Raises:
        ConfigError: the system has no such amount of memory.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ConfigError(
            f"the system refuses {format_bytes(num_bytes)} of memory ({error.strerror}); lower host_memory"
        ) from error
    if num_bytes >= 2 * 2**20:
        with contextlib.suppress(OSError):  # kernels without huge pages refuse the advice
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def device_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of the device that does the dense work; where that is the CPU, a host tensor."""
    if device.type == "cpu":
        return host_tensor(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)
