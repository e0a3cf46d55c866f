"""Pages of expert weights: host rows, frames on the device, and the copies between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lightning.errors import ScheduleError
from moe_lightning.memory.arena import HostArena, MakeArena, device_tensor
from moe_lightning.memory.layout import PageLayout, Placement
from moe_lightning.memory.staging import StagingRing
from moe_lightning.memory.unpacked import Unpacked


class PageStore:
    """Where pages are, and how they come to where kernels read them.

    Each page is stored once: resident pages in their frames, streamed pages and the CPU's in host memory. Packed
    pages are bytes, but for the CPU's, and `swept` unpacks those of one sweep.
    """

    def __init__(
        self,
        layout: PageLayout,
        placement: Placement,
        dtype: torch.dtype,
        device: torch.device,
        make_arena: MakeArena = HostArena,
        largest_sweep: int | None = None,
    ) -> None:
        self.layout = layout
        self.placement = placement
        self.dtype = dtype
        row = layout.page_bytes(dtype.itemsize) if layout.packed else layout.page_elements
        stored = torch.uint8 if layout.packed else dtype
        self.frames = device_tensor((placement.num_frames, row), stored, device)
        self.arena = make_arena((placement.num_host_rows, row), stored)
        self.host = self.arena.tensor
        self.cpu_arena = HostArena(
            (len(placement.on_cpu) * layout.pages_per_layer, layout.page_elements), dtype
        )
        self._cpu_rows = self.cpu_arena.tensor.unbind(0)
        # Made once: each would cost a launcher microseconds at every copy.
        self._frames, self._rows = self.frames.unbind(0), self.host.unbind(0)
        self._staging: StagingRing | None = None
        self._is_held = False
        # What each frame holds, so that a stale page is an error and never plausible text.
        self._content: list[tuple[int, int] | None] = [None] * placement.num_frames
        for layer, count in enumerate(placement.resident):
            for page in range(count):
                self._content[placement.resident_frame(layer, page)] = (layer, page)
        # Frame of each page where the pass's first streamed page is in frame 0 of the ring; what kernels read.
        layers = range(len(placement.resident))
        pages = [
            [placement.frame(layer, page) for page in range(placement.pages_per_layer)] for layer in layers
        ]
        self._first_table = torch.tensor(pages, dtype=torch.int32).to(device)
        self.page_table = self._first_table.clone()  # [num_layers, pages_per_layer] int32
        self.unpacked = (
            Unpacked.allocate(layout, largest_sweep or layout.pages_per_layer, dtype, device)
            if layout.packed
            else None
        )

    def place_ring(self, offset: int) -> None:
        """Make `page_table` that of a pass whose ring begins at frame `offset`; computed on the device."""
        ring = self.placement.num_ring_frames
        if ring:
            # Places of the CPU's pages turn too: nobody reads them.
            turned = (self._first_table + offset).remainder_(ring)
            torch.where(self._first_table < ring, turned, self._first_table, out=self.page_table)

    def swept(self, layer: int, experts: range) -> tuple[Tensor, Tensor]:
        """Where kernels find the pages of some of a layer's experts: pages, and the row of each page of the layer.

        Packed ones are unpacked, on the current stream, unless the call before was for the same.
        """
        if self.unpacked is None:
            return self.frames, self.page_table[layer]
        return self.unpacked.swept(self.frames, self.page_table[layer], layer, experts)

    def home(self, layer: int, page: int) -> Tensor:
        """The page where it is stored: [page_elements], or its bytes where it is packed."""
        if layer in self.placement.on_cpu:
            return self._cpu_rows[self.placement.cpu_row(layer, page)]
        frame = self.placement.resident_frame(layer, page)
        return self._frames[frame] if frame >= 0 else self._rows[self.placement.host_row(layer, page)]

    def on_cpu(self, layer: int) -> Sequence[Tensor]:
        """The pages of a layer whose experts the CPU computes: [page_elements] each."""
        first = self.placement.cpu_row(layer, 0)
        return self._cpu_rows[first : first + self.placement.pages_per_layer]

    def load(self, layer: int, page: int, frame: int) -> None:
        """Copy a streamed page to a frame of the ring."""
        self._content[frame] = None
        if self.frames.is_cuda and not self.arena.is_pinned:
            self._stage(layer, page, frame)
        else:
            self._hold()
            self._frames[frame].copy_(self._rows[self.placement.host_row(layer, page)], non_blocking=True)
        self._content[frame] = (layer, page)

    def _hold(self) -> None:
        """When the frames are dropped, let no other tensor have their memory while copies are under way."""
        if self.frames.is_cuda and not self._is_held:
            self._is_held = True
            self.frames.record_stream(torch.cuda.current_stream())

    def _stage(self, layer: int, page: int, frame: int) -> None:
        if self._staging is None:
            self._staging = StagingRing(self.host.shape[1], self.host.dtype)
        self._staging.copy(self._frames[frame], self.home(layer, page))

    def check(self, layer: int, first: int, frames: list[int]) -> None:
        """Make sure that `frames` hold the streamed pages of the layer in order, from page `first` on.

        Raises:
            ScheduleError: a frame holds another page.
        """
        for page, frame in enumerate(frames, start=max(first, self.placement.resident[layer])):
            if self._content[frame] != (layer, page):
                raise ScheduleError(
                    f"experts of layer {layer} want page {page} in frame {frame}, "
                    f"which holds {self._content[frame]}"
                )
