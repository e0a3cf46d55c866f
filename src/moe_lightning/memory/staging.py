"""Copies to the GPU from memory that cannot be page-locked."""

from __future__ import annotations

import torch
from torch import Tensor

_SLOTS = 4


class StagingRing:
    """A few page-locked buffers that pages pass through, each free again when its copy is done.

    A page then crosses host memory three times instead of once, and the caller waits while it is copied to a slot.
    """

    def __init__(self, num_elements: int, dtype: torch.dtype) -> None:
        # torch's allocator may lock memory where registering is refused; this is little, so it may round up.
        self._slots = torch.empty((_SLOTS, num_elements), dtype=dtype, pin_memory=True)
        self._done: list[torch.cuda.Event] = [torch.cuda.Event() for _ in range(_SLOTS)]
        self._next = 0

    def copy(self, destination: Tensor, source: Tensor) -> None:
        """Copy a page on the current stream; the source may be changed afterwards."""
        slot, done = self._slots[self._next], self._done[self._next]
        done.synchronize()
        slot.copy_(source)
        destination.copy_(slot, non_blocking=True)
        done.record()
        self._next = (self._next + 1) % _SLOTS
