"""A count that the host raises and CUDA streams wait for."""

from __future__ import annotations

import ctypes
import threading
from functools import cache

import torch

from moe_lightning.memory.arena import HostArena
from moe_lightning.perf.memory import COUNTER_BYTES

_WAIT_GEQ = 0  # until (int32)(*address - value) >= 0: right also after the count has wrapped


class StreamCounter:
    """Counts upwards in page-locked memory, where streams see it.

    A stream that waits here needs no thread to launch what comes after: the driver's own queue waits. Where the
    driver cannot, the caller waits.

    Args:
        in_stream: let streams wait; None for wherever the driver can.
    """

    def __init__(self, in_stream: bool | None = None) -> None:
        arena = HostArena((COUNTER_BYTES // 4,), torch.int32)
        arena.prepare(pin=True)
        self._words = arena.tensor.numpy()
        self._address = arena.tensor.data_ptr()
        self._raised = threading.Condition()
        self._value = 0
        can_wait = arena.is_pinned and _stream_wait_value() is not None
        self._in_stream = can_wait if in_stream is None else in_stream

    @property
    def value(self) -> int:
        """Where it stands."""
        return self._value

    def raise_to(self, value: int) -> None:
        """Count up to a value; what was written before is seen by whoever waited for it."""
        with self._raised:
            self._value = value
            self._words[0] = (self._value + 2**31) % 2**32 - 2**31  # as the 32 bits that the driver compares
            self._raised.notify_all()

    def wait(self, stream: torch.cuda.Stream, value: int) -> None:
        """Hold what is launched on the stream from now on until the count has reached the value."""
        if not self._in_stream:
            self.wait_here(value)
            return
        wait = _stream_wait_value()
        assert wait is not None
        code = wait(stream.cuda_stream, self._address, value & 0xFFFFFFFF, _WAIT_GEQ)
        if code:
            raise RuntimeError(f"cuStreamWaitValue32 returns error {code}")

    def wait_here(self, value: int) -> None:
        """Hold the caller until the count has reached the value."""
        with self._raised:
            self._raised.wait_for(lambda: self._value >= value)


@cache
def _stream_wait_value() -> ctypes._NamedFuncPointer | None:
    """The driver's function, or None if it has none."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuStreamWaitValue32_v2
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)
    function.restype = ctypes.c_int
    return function
