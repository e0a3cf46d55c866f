"""Packed pages of one sweep over experts, unpacked to where kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lightning.kernels import ops
from moe_lightning.memory.arena import device_tensor
from moe_lightning.memory.layout import PageLayout


@dataclass
class Unpacked:
    """Pages of the last sweep.

    Attributes:
        layout: of all pages.
        pages: [the most of a sweep, page_elements].
        table: [pages_per_layer] int32, row of each page of a layer; those of any sweep are apart.
        content: layer and experts of that sweep.
    """

    layout: PageLayout
    pages: Tensor
    table: Tensor
    content: tuple[int, range] | None = None

    @classmethod
    def allocate(
        cls, layout: PageLayout, num_pages: int, dtype: torch.dtype, device: torch.device
    ) -> Unpacked:
        """For sweeps over so many pages at most."""
        pages = device_tensor((num_pages, layout.page_elements), dtype, device)
        table = torch.arange(layout.pages_per_layer, dtype=torch.int32) % num_pages
        return cls(layout, pages, table.to(device))

    def swept(
        self, frames: Tensor, frame_of_page: Tensor, layer: int, experts: range
    ) -> tuple[Tensor, Tensor]:
        """Pages of some of a layer's experts, and the row of each page of the layer.

        They are unpacked on the current stream, unless the call before was for the same.

        Args:
            frames: [num_frames, bytes of a packed page] uint8.
            frame_of_page: [pages_per_layer] int32, of that layer.
            layer: which.
            experts: of it.
        """
        if self.content != (layer, experts):
            self.content = None
            p = self.layout.pages_per_expert
            first, count = experts.start * p, len(experts) * p
            ops.unpack_pages(frames, frame_of_page, first, count, self.pages, self.layout.segment_elements)
            self.content = layer, experts
        return self.pages, self.table
