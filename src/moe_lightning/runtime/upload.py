"""Small host values as tensors on the device, sent together once a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_lightning.kernels import ops
from moe_lightning.memory.arena import HostArena
from moe_lightning.memory.mapped import device_view
from moe_lightning.perf.memory import UPLOAD_BYTES

Values = Sequence[int] | Sequence[float] | npt.NDArray[np.generic]
_NUMPY = {
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.float32: np.float32,
    torch.float64: np.float64,
}
_ROW_WORDS = 16
_ALIGNMENT = 4 * _ROW_WORDS  # so that the kernel, whose loads are vectors, has 16 words of whatever it copies


class Uploader:
    """Gives out tensors at once and fills all of them together.

    A pass has hundreds of small arrays. Copies of them would wait behind the weight pages that are on the link: a
    kernel reads them all; where it cannot, one copy waits once. Larger ones that are read once stay in host memory.
    """

    def __init__(self, device: torch.device, capacity: int = UPLOAD_BYTES) -> None:
        self._device = device
        self._used = self._lent = 0
        self._shelves: list[_Shelf] = []
        if device.type != "cpu":
            self._make_room(capacity)
            self._sent = torch.cuda.Event()

    def put(self, values: Values, dtype: torch.dtype) -> Tensor:
        """A tensor of the values, on the device; there it may be read by what is launched after `send`."""
        array = np.ascontiguousarray(values, dtype=_NUMPY[dtype])
        if self._device.type == "cpu":
            return torch.from_numpy(array.copy() if array is values else array)
        start, end = self._used, self._used + array.nbytes
        if end > self._host.nbytes:
            self.send()
            self._make_room(max(2 * self._host.nbytes, array.nbytes))
            start, end = 0, array.nbytes
        self._host_bytes[start:end] = array.reshape(-1).view(np.uint8)
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        return self._on_device[start:end].view(dtype).view(array.shape)

    def lend(self, values: npt.NDArray[np.int32]) -> Tensor:
        """Rows in host memory that the device reads from there: they take none of the device's.

        They may come back wider than they are, with anything in what is added: they are all aligned alike, so that
        the kernel that reads them needs no other variant.

        Whoever has read results of the pass that reads it may `clear`. Where the host's memory cannot be locked, it
        is as `put`.
        """
        if self._device.type == "cpu":
            return torch.from_numpy(values)
        if self._mapped is None:
            return self.put(values, torch.int32)
        rows, words = values.shape
        width = -(-words // _ROW_WORDS) * _ROW_WORDS
        start, end = self._lent, self._lent + rows * width
        if not self._shelves or end > self._shelves[-1].words.size:
            last = self._shelves[-1].words.size if self._shelves else 0
            shelf = _Shelf.of(max(2 * last, rows * width), self._device)
            if shelf is None:
                return self.put(values, torch.int32)
            self._shelves.append(shelf)
            start, end = 0, rows * width
        self._shelves[-1].words[start:end].reshape(rows, width)[:, :words] = values
        self._lent = end
        return self._shelves[-1].on_device[start:end].view(rows, width)

    def send(self) -> None:
        """Send what was put since the last `clear`, on the current stream."""
        if self._used:
            into = self._on_device[: self._used]
            if self._mapped is not None:
                ops.load_host_rows(self._mapped[: self._used], into)
            else:
                into.copy_(self._host[: self._used], non_blocking=True)
            self._sent.record()

    def clear(self) -> None:
        """Start anew: what was put before is no longer read."""
        if self._used:
            self._sent.synchronize()
            self._used = 0
        self._shelves, self._lent = self._shelves[-1:], 0  # smaller ones were read until now

    def _make_room(self, capacity: int) -> None:
        capacity = -(-capacity // _ALIGNMENT) * _ALIGNMENT
        on_device = torch.empty(capacity, dtype=torch.uint8, device=self._device)
        host = HostArena((1, capacity), torch.uint8)  # one row, so that it is locked as one piece
        host.prepare(pin=True)
        # Tensors given out before keep the device's old memory alive; the host's is read until it is sent.
        if self._used:
            self._sent.synchronize()
        self._arena, self._host, self._on_device = host, host.tensor[0], on_device
        self._host_bytes = self._host.numpy()
        self._mapped = None if host.refusal else device_view(self._host, self._device)
        self._used = 0


@dataclass(frozen=True)
class _Shelf:
    """Locked host memory, and the same as the device sees it."""

    words: npt.NDArray[np.int32]
    on_device: Tensor
    arena: HostArena

    @staticmethod
    def of(num_words: int, device: torch.device) -> _Shelf | None:
        """A new one; None if the system does not lock that much."""
        arena = HostArena((1, num_words), torch.int32)
        arena.prepare(pin=True)
        if arena.refusal:
            return None
        return _Shelf(arena.tensor[0].numpy(), device_view(arena.tensor[0], device), arena)
