"""Host memory that measurements read, write and copy."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.gpu_memory import pci_bus_id
from moe_lightning.hardware.host import available_memory
from moe_lightning.hardware.numa import gpu_node
from moe_lightning.memory.arena import HostArena
from moe_lightning.profiling.effort import Effort
from moe_lightning.units import format_bytes

_TILE = 2**22
_LEAST_ROWS = 8


class HostMemory:
    """Rows of the largest copy's size; a quarter is for copies, the rest for K, V and reads.

    Raises:
        ConfigError: too little memory is free.
    """

    def __init__(self, effort: Effort, *, has_gpu: bool) -> None:
        row = max(effort.copy_sizes)
        free = available_memory()
        num_rows = min(effort.host_bytes if has_gpu else effort.host_bytes // 24, free // 4) // row
        if num_rows < _LEAST_ROWS:
            raise ConfigError(
                f"measuring takes {format_bytes(_LEAST_ROWS * row)} of host memory and leaves three times as much "
                f"alone; {format_bytes(free)} is free. End other programs, or give the container more"
            )
        self._arena = HostArena((num_rows, row), torch.uint8)
        node = gpu_node(pci_bus_id(0)) if has_gpu else None
        self._arena.prepare(pin=has_gpu, num_threads=os.cpu_count() or 1, node=node)
        self._filled: torch.dtype | None = None

    @property
    def is_pinned(self) -> bool:
        """Whether the GPU copies from and to it without a detour."""
        return self._arena.is_pinned

    @property
    def copied(self) -> Tensor:
        """[rows, bytes of the largest copy] uint8, for copies."""
        return self._arena.tensor[: len(self._arena.tensor) // 4]

    @property
    def read(self) -> Tensor:
        """[bytes] uint8, for K, V and reads."""
        return self._arena.tensor[len(self._arena.tensor) // 4 :].flatten()

    def fill(self, dtype: torch.dtype) -> None:
        """Numbers of about 1 everywhere: zeros, and numbers that are none, take other times."""
        if self._filled is not dtype:
            fill(self._arena.tensor.flatten().view(dtype))
            self._filled = dtype


def fill(out: Tensor, std: float = 1.0) -> None:
    """Random normal numbers, the same ones every few MiB: drawing them all would take seconds.

    Args:
        out: [elements].
        std: standard deviation.
    """
    tile = (torch.randn(min(_TILE, len(out))) * std).to(out.dtype)
    for start in range(0, len(out), len(tile)):
        piece = out[start : start + len(tile)]
        piece.copy_(tile[: len(piece)])
