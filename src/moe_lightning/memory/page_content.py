"""Weights in and out of pages, packed where pages are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moe_lightning.kernels import ops, packing
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
        """Gate, up and down of a page where it is stored, packed if it is."""
        elements, home = self._pages.layout.segment_elements, self._pages.home(layer, page)
        gate, up, down, *_ = home.split(segment_bytes(elements) if is_packed(home) else elements)
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
            NotPackableError: it is packed, and these weights do not fit.
        """
        pages = self._pages
        if is_packed(segment):
            ops.pack(values.to(pages.frames.device, pages.dtype), segment)
        else:
            segment.view(values.shape).copy_(values)

    def read(self, segment: Tensor) -> Tensor:
        """The weights of a segment, [rows * H]; of a packed one, a copy."""
        elements = self._pages.layout.segment_elements
        return packing.unpack(segment, elements) if is_packed(segment) else segment


def is_packed(stored: Tensor) -> bool:
    """Whether a page or a segment is bytes."""
    return stored.dtype is torch.uint8
