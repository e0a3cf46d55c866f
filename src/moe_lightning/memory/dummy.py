"""Random weights of a model's true shapes, for measuring without a checkpoint."""

from __future__ import annotations

import queue
import threading
from contextlib import nullcontext

import torch
from torch import Tensor

from moe_lightning.memory.arena import device_tensor
from moe_lightning.memory.page_content import is_packed
from moe_lightning.memory.weights import Weights

_PACKING = 4  # pages at once


class RandomWeights:
    """Fills weights so that activations stay of order one: 1 / sqrt(inputs) in matrices, near one in norms.

    The values depend on the seed and the page's place only. They are drawn on the device and copied out: a CPU
    would take minutes for what a GPU draws in seconds.
    """

    def __init__(self, weights: Weights, seed: int) -> None:
        self._weights = weights
        self._seed = seed
        self._device = weights.embed.device
        self._of_thread = threading.local()
        # Pages are drawn in frames of the ring, or where pages are unpacked to, which nothing is in yet: there may
        # be no other memory left. Packing takes some beside, so few do it at once.
        pages, unpacked = weights.pages, weights.pages.unpacked
        rows = unpacked.pages[:_PACKING] if unpacked else pages.frames[: pages.placement.num_ring_frames]
        if pages.placement.on_cpu and not len(rows):
            rows = device_tensor((1, pages.layout.page_elements), pages.dtype, self._device)
        self._scratch: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for row in rows:
            self._scratch.put(row)

    def fill_device(self) -> None:
        """All that stays on the device, resident pages included."""
        w, placement = self._weights, self._weights.pages.placement
        generator = torch.Generator(self._device).manual_seed(self._seed)
        tops = [w.embed] if w.lm_head is w.embed else [w.embed, w.lm_head]
        for layer in w.layers:
            tops += [t for t in (layer.qkv, layer.o, layer.router) if t is not None]
            for norm in (layer.input_norm, layer.post_norm):
                norm.normal_(1.0, 0.1, generator=generator)
        w.final_norm.normal_(1.0, 0.1, generator=generator)
        for matrix in tops:
            matrix.normal_(0.0, matrix.shape[1] ** -0.5, generator=generator)
        for number, count in enumerate(placement.resident):
            for page in range(count):
                self._fill(number, page)

    def fill_rows(self, start: int, stop: int) -> None:
        """Host rows [start, stop) of the streamed pages; threads may fill different rows at once."""
        self._fill_all(self._weights.pages.placement.streamed_pages()[start:stop])

    def fill_cpu_rows(self, start: int, stop: int) -> None:
        """The same of the pages that the CPU computes with."""
        self._fill_all(self._weights.pages.placement.pages_on_cpu()[start:stop])

    def _fill_all(self, places: list[tuple[int, int]]) -> None:
        for layer, page in places:
            self._fill(layer, page)

    def _fill(self, layer: int, page: int) -> None:
        pages, content = self._weights.pages, self._weights.content
        home = pages.home(layer, page)
        if not is_packed(home) and home.device == self._device:
            self._draw(home, layer, page)
            return
        drawn = self._scratch.get()
        try:
            with torch.cuda.stream(self._stream()) if self._device.type == "cuda" else nullcontext():
                self._draw(drawn, layer, page)
                # Waits, so that the memory is free again afterwards.
                for segment, values in zip(content.segments(layer, page), drawn.chunk(3), strict=True):
                    content.write(segment, values)
                if home.is_cuda:
                    torch.cuda.current_stream().synchronize()
        finally:
            self._scratch.put(drawn)

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = torch.cuda.Stream(self._device)
        stream: torch.cuda.Stream = self._of_thread.stream
        return stream

    def _draw(self, page: Tensor, layer: int, number: int) -> None:
        layout = self._weights.pages.layout
        seed = (self._seed * 1_000_003 + layer) * 1_000_003 + number
        generator = torch.Generator(self._device).manual_seed(seed % 2**63)
        gate_up, down = page.split(2 * layout.segment_elements)
        gate_up.normal_(0.0, layout.hidden_size**-0.5, generator=generator)
        down.normal_(0.0, (layout.rows * layout.pages_per_expert) ** -0.5, generator=generator)
