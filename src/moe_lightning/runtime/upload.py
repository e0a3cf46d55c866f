"""Small host values as tensors on the device, sent together once a pass."""

from __future__ import annotations

from collections.abc import Sequence

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
_ALIGNMENT = 64  # so that the kernel, whose loads are vectors, has 16 words of whatever it copies


class Uploader:
    """Gives out tensors at once and fills all of them together.

    A pass has hundreds of small arrays. Copies of them would wait behind the weight pages that are on the link: a
    kernel reads them all; where it cannot, one copy waits once.
    """

    def __init__(self, device: torch.device, capacity: int = UPLOAD_BYTES) -> None:
        self._device = device
        self._used = 0
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
