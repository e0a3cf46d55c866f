"""Host memory that engines use one after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from moe_lightning.errors import ConfigError
from moe_lightning.memory.arena import NUM_THREADS, HostArena, Preparing, for_each
from moe_lightning.units import format_bytes


class SharedArena:
    """One arena for the pages and the KV of engines that follow each other, for measurements with random weights.

        | pages of the engine ... | KV of the engine ...        | unused |

    Bringing in, locking and filling memory takes a minute; the next engine finds it done, whatever share of the
    experts it streams. So a row may hold the numbers of another page than a fresh engine's: weights that are random
    anyway. Rows where KV was are filled anew.

    Args:
        num_bytes: of all rows; rounded up to whole pages.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._arena: HostArena | None = None
        self._is_in = False
        self._num_pages, self._num_filled = 0, 0
        self._numbers = 0, 0  # bytes from and to which there are numbers, of weights or KV

    @property
    def arena(self) -> HostArena:
        """All of it; there is one once pages were asked for."""
        assert self._arena is not None, "pages come before blocks"
        return self._arena

    def pages(self, shape: tuple[int, ...], dtype: torch.dtype) -> ArenaPart:
        """Memory for the pages of the next engine: [rows, elements]; the engine before must be gone.

        Raises:
            ConfigError: there are not as many rows.
        """
        row = shape[1:]
        if self._arena is None or (self._arena.tensor.shape[1:], self._arena.tensor.dtype) != (row, dtype):
            self._arena = None  # before there is another
            num_rows = max(1, math.ceil(self._num_bytes / (math.prod(row) * dtype.itemsize)))
            self._arena = HostArena((num_rows, *row), dtype)
            self._is_in, self._num_filled, self._numbers = False, 0, (0, 0)
        self._check(shape[0] * self._row_bytes)
        self._num_pages = shape[0]
        self._num_filled = min(self._num_filled, self._num_pages)  # what follows will hold KV
        if dtype is torch.uint8:
            # As KV, a packed page may be anything, NaN too.
            begin, end = self._numbers
            self._numbers = max(begin, shape[0] * self._row_bytes), end
        return ArenaPart(self.arena.tensor[: shape[0]], self, is_pages=True)

    def blocks(self, shape: tuple[int, ...], dtype: torch.dtype) -> ArenaPart:
        """Memory for its KV, behind the pages; they are brought in together.

        Raises:
            ConfigError: there is not as much.
        """
        start, size = self._num_pages * self._row_bytes, math.prod(shape) * dtype.itemsize
        self._check(start + size)
        rest = self.arena.tensor.view(-1).view(torch.uint8)[start : start + size]
        return ArenaPart(rest.view(dtype).view(shape), self, is_pages=False)

    def bring_in(self, **how: Unpack[Preparing]) -> None:
        """What the engines before have left to do: locking, and filling pages that hold no weights."""
        on_rows, first, last = how.get("on_rows"), self._num_filled, self._num_pages
        self._num_filled = 0  # until all is done

        def fill(start: int, stop: int) -> None:
            start, stop = max(start, first), min(stop, last)
            if on_rows is not None and start < stop:
                on_rows(start, stop)

        if self._is_in:
            for_each(lambda bounds: fill(*bounds), self.arena.slices(), how.get("num_threads", NUM_THREADS))
        else:
            how["on_rows"] = fill
            self.arena.prepare(**how)
        self._is_in = True
        self._num_filled = last if on_rows is not None else 0

    def filled_before(self, blocks: Tensor) -> int:
        """Elements at the beginning of an engine's KV that hold numbers already; from now on, all of them do."""
        start = blocks.data_ptr() - self.arena.tensor.data_ptr()
        begin, end = self._numbers
        end = end if begin <= start else start
        self._numbers = min(begin, start), max(end, start + blocks.nbytes)
        return min(max((end - start) // blocks.itemsize, 0), blocks.numel())

    @property
    def _row_bytes(self) -> int:
        return self.arena.num_bytes // len(self.arena.tensor)

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self.arena.num_bytes:
            raise ConfigError(
                f"pages and KV take {format_bytes(num_bytes)} of a shared arena of "
                f"{format_bytes(self.arena.num_bytes)}; give all engines the same host_memory"
            )


@dataclass(frozen=True)
class ArenaPart:
    """Pages or KV in a shared arena."""

    tensor: Tensor
    _whole: SharedArena
    is_pages: bool

    @property
    def is_pinned(self) -> bool:
        """The memory is page-locked."""
        return self._whole.arena.is_pinned

    @property
    def num_bytes(self) -> int:
        """Of this part."""
        return self.tensor.nbytes

    def prepare(self, **how: Unpack[Preparing]) -> None:
        """Pages bring in the whole arena, KV among it."""
        if self.is_pages:
            self._whole.bring_in(**how)
