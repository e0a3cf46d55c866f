"""Weights in and out of pages, packed where pages are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from moe_lightning.kernels import packing
from moe_lightning.memory.page_store import PageStore
from moe_lightning.perf.page_size import segment_bytes


class PageContent:
    """Gate, up and down of each page, as checkpoints and random weights fill them in.

    Args:
        pages: where they are stored.
    """

    def __init__(self, pages: PageStore) -> None:
        self._pages = pages
        self._packing = threading.Lock()

    def segments(self, layer: int, page: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down of a page where it is stored, packed if pages are."""
        layout = self._pages.layout
        size = segment_bytes(layout.segment_elements) if layout.packed else layout.segment_elements
        gate, up, down, *_ = self._pages.home(layer, page).split(size)
        return gate, up, down

    @property
    def packs_on_gpu(self) -> bool:
        """Whether `write` packs, and on a GPU."""
        return self._pages.layout.packed and self._pages.frames.is_cuda

    @contextmanager
    def near(self, values: Tensor) -> Iterator[Tensor]:
        """Values that are about to be written, where that is fast.

        Where a GPU packs, one thread is let in at a time: several would wait for each other's kernels, and each
        needs GPU memory.
        """
        if not self.packs_on_gpu:
            yield values
            return
        with self._packing:
            yield values.to(self._pages.frames.device)

    def write(self, segment: Tensor, values: Tensor) -> None:
        """Fill a segment with weights of any shape and dtype, as many as it has.

        Raises:
            NotPackableError: pages are packed, and these weights do not fit.
        """
        pages = self._pages
        if pages.layout.packed:
            packing.pack(values.to(pages.frames.device, pages.dtype), segment)
        else:
            segment.view(values.shape).copy_(values)

    def read(self, segment: Tensor) -> Tensor:
        """The weights of a segment, [rows * H]; where pages are packed, a copy."""
        layout = self._pages.layout
        return packing.unpack(segment, layout.segment_elements) if layout.packed else segment
