"""Large buffers of exactly the size that was asked for."""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Protocol, Required, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_lightning.errors import ConfigError
from moe_lightning.memory import pinning
from moe_lightning.units import MIB, format_bytes

_HUGE_PAGE = 2 * MIB
# Faulting in goes slice by slice, so that threads share it and copies can start before the end.
_SLICE_BYTES = 256 * MIB
NUM_THREADS = 8  # that bring rows in, where nobody says


def host_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor over anonymous memory of its own: zeros that cost nothing until they are touched.

    Not from torch's allocators: they round up, and pinned ones to the next power of two.

    Raises:
        ConfigError: the system has no such amount of memory.
    """
    return _tensor(_map(math.prod(shape) * dtype.itemsize), shape, dtype)


def _map(num_bytes: int) -> npt.NDArray[np.uint8]:
    if num_bytes == 0:
        return np.empty(0, np.uint8)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ConfigError(
            f"the system refuses {format_bytes(num_bytes)} of memory ({error.strerror}); lower host_memory"
        ) from error
    if num_bytes >= _HUGE_PAGE:
        with contextlib.suppress(OSError):  # kernels without huge pages refuse the advice
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _tensor(memory: npt.NDArray[np.uint8], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (
        torch.from_numpy(memory).view(dtype).view(shape) if len(memory) else torch.empty(shape, dtype=dtype)
    )


def device_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of the device that does the dense work; where that is the CPU, a host tensor."""
    if device.type == "cpu":
        return host_tensor(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


OnRows = Callable[[int, int], None]  # rows [start, stop) are in memory; on the thread that brought them in


class Preparing(TypedDict, total=False):
    """How rows are brought in: arguments of `HostArena.prepare`."""

    pin: Required[bool]
    num_threads: int
    node: int | None
    on_rows: OnRows | None


class Arena(Protocol):
    """Host memory for rows of one size: an arena of its own, or a part of one that engines share."""

    @property
    def tensor(self) -> Tensor:
        """[rows, ...]."""

    @property
    def is_pinned(self) -> bool:
        """The rows are page-locked."""

    @property
    def num_bytes(self) -> int:
        """Exactly those of the rows."""

    def prepare(self, **how: Unpack[Preparing]) -> None:
        """Bring all rows in and lock them; see `HostArena`."""


MakeArena = Callable[[tuple[int, ...], torch.dtype], Arena]


class HostArena:
    """Host memory for rows of one size, which a GPU copies from and to without a detour.

    Attributes:
        tensor: [rows, ...], zeros.
        is_pinned: the rows are page-locked: copies run at the link's rate, beside whatever else runs.
        refusal: why the system did not lock them; None if it did or nobody asked.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        num_bytes = math.prod(shape) * dtype.itemsize
        self._bytes = _map(num_bytes)
        self.tensor = _tensor(self._bytes, shape, dtype)
        self.is_pinned = False
        self.refusal: str | None = None

    @property
    def num_bytes(self) -> int:
        """Exactly those of the rows."""
        return self.tensor.nbytes

    def slices(self) -> list[tuple[int, int]]:
        """Ranges of rows that are brought in and locked as one; no row is in two of them.

        Memory locked in two calls is two memories to the driver, and no copy may cross from one to the other. Each
        slice begins on a page of the system.
        """
        num_rows = self.tensor.shape[0]
        row_bytes = self.num_bytes // num_rows if num_rows else 0
        if row_bytes == 0:
            return []
        step = mmap.PAGESIZE // math.gcd(row_bytes, mmap.PAGESIZE)  # rows that end with a page
        per_slice = max(step, _SLICE_BYTES // row_bytes // step * step)
        return [(start, min(start + per_slice, num_rows)) for start in range(0, num_rows, per_slice)]

    def prepare(
        self,
        *,
        pin: bool,
        num_threads: int = NUM_THREADS,
        node: int | None = None,
        on_rows: OnRows | None = None,
    ) -> None:
        """Bring all rows in, from a memory node if one is given, and lock them; what is in them already stays.

        Each thread takes a slice, faults it in, locks it and calls `on_rows`: filling one slice overlaps with
        bringing in the others. Where the system refuses to lock memory nothing stays locked, `refusal` says why,
        and the arena works all the same, slower.
        """
        locked: list[int] = []
        if node is not None:
            pinning.prefer_node(self.tensor, node)

        def bring_in(bounds: tuple[int, int]) -> None:
            rows = self.tensor[bounds[0] : bounds[1]]
            pinning.fault_in(rows)
            if pin and self.refusal is None:
                reason = pinning.lock(rows)
                if reason is None:
                    locked.append(rows.data_ptr())
                else:
                    self.refusal = reason
            if on_rows:
                on_rows(*bounds)

        # Unlocking has to come before unmapping: an array is gone before the mapping under it, a mapping that ends
        # is unmapped before anybody hears of it.
        weakref.finalize(self._bytes, pinning.unlock, locked).atexit = False
        try:
            for_each(bring_in, self.slices(), num_threads)
        except BaseException:
            pinning.unlock(locked)
            raise
        if self.refusal:
            pinning.unlock(locked)
        self.is_pinned = pin and self.refusal is None


def for_each(do: Callable[[tuple[int, int]], None], items: list[tuple[int, int]], num_threads: int) -> None:
    """Call `do` with every item on several threads; the first error stops the rest and is raised."""
    with ThreadPoolExecutor(max(1, min(num_threads, len(items))), thread_name_prefix="arena") as threads:
        futures = [threads.submit(do, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise
