"""The weights of a model where a pass finds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lightning.errors import ScheduleError
from moe_lightning.memory.arena import HostArena, MakeArena, device_tensor
from moe_lightning.memory.layout import PageLayout, Placement
from moe_lightning.memory.staging import StagingRing
from moe_lightning.models.spec import EXPERT_ROLES, ModelSpec, Role, TensorSpec


@dataclass(frozen=True)
class LayerWeights:
    """Weights of a layer that stay on the device. H: hidden size."""

    input_norm: Tensor  # [H]
    qkv: Tensor  # [q_size + 2 kv_size, H]
    o: Tensor  # [H, q_size]
    post_norm: Tensor  # [H]
    router: Tensor | None  # [num_experts, H]


class PageStore:
    """Pages of expert weights: host rows, frames on the device, and the copies between them.

    Each page is stored once: resident pages in their frames, streamed pages in host memory.
    """

    def __init__(
        self,
        layout: PageLayout,
        placement: Placement,
        dtype: torch.dtype,
        device: torch.device,
        make_arena: MakeArena = HostArena,
    ) -> None:
        self.layout = layout
        self.placement = placement
        self.frames = device_tensor((placement.num_frames, layout.page_elements), dtype, device)
        self.arena = make_arena((placement.num_host_rows, layout.page_elements), dtype)
        self.host = self.arena.tensor
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

    def place_ring(self, offset: int) -> None:
        """Make `page_table` that of a pass whose ring begins at frame `offset`; computed on the device."""
        ring = self.placement.num_ring_frames
        if ring:
            turned = (self._first_table + offset).remainder_(ring)
            torch.where(self._first_table < ring, turned, self._first_table, out=self.page_table)

    def home(self, layer: int, page: int) -> Tensor:
        """The page where it is stored: [page_elements]."""
        frame = self.placement.resident_frame(layer, page)
        return self._frames[frame] if frame >= 0 else self._rows[self.placement.host_row(layer, page)]

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
            self._staging = StagingRing(self.layout.page_elements, self.host.dtype)
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


@dataclass(frozen=True)
class Weights:
    """All weights of a model."""

    spec: ModelSpec
    embed: Tensor  # [V, H]
    final_norm: Tensor  # [H]
    lm_head: Tensor  # [V, H]; the embedding itself where they are tied
    layers: tuple[LayerWeights, ...]
    pages: PageStore

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights; ring frames are not counted."""
        return self.spec.num_parameters * self.embed.dtype.itemsize

    def destinations(self, tensor: TensorSpec) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
        """Where a checkpoint tensor goes: pairs of a destination and the part of the tensor that fills it."""
        if tensor.role in EXPERT_ROLES:
            yield from self._page_parts(tensor)
        else:
            yield self._resident(tensor), (slice(None),)

    def _page_parts(self, tensor: TensorSpec) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
        layout = self.pages.layout
        half, both = layout.gate_up_elements // 2, layout.gate_up_elements
        for part in range(layout.pages_per_expert):
            page = self.pages.home(tensor.layer, tensor.expert * layout.pages_per_expert + part)
            cut = slice(part * layout.rows, (part + 1) * layout.rows)
            if tensor.role is Role.DOWN:
                yield page[both:].view(layout.hidden_size, layout.rows), (slice(None), cut)
            else:
                start = 0 if tensor.role is Role.GATE else half
                yield page[start : start + half].view(layout.rows, layout.hidden_size), (cut,)

    def _resident(self, tensor: TensorSpec) -> Tensor:
        top = {Role.EMBED: self.embed, Role.FINAL_NORM: self.final_norm, Role.LM_HEAD: self.lm_head}
        if tensor.role in top:
            return top[tensor.role]
        layer, a = self.layers[tensor.layer], self.spec.attention
        match tensor.role:
            case Role.Q:
                return layer.qkv[: a.q_size]
            case Role.K:
                return layer.qkv[a.q_size : a.q_size + a.kv_size]
            case Role.V:
                return layer.qkv[a.q_size + a.kv_size :]
            case Role.ROUTER:
                assert layer.router is not None
                return layer.router
            case _:
                found: Tensor = getattr(layer, tensor.role.value)
                return found


def allocate(
    spec: ModelSpec,
    layout: PageLayout,
    placement: Placement,
    dtype: torch.dtype,
    device: torch.device,
    make_arena: MakeArena = HostArena,
) -> Weights:
    """Memory for all weights, not yet filled; that of streamed pages is made by `make_arena`."""

    def empty(*shape: int) -> Tensor:
        return device_tensor(shape, dtype, device)

    h, a = spec.hidden_size, spec.attention
    embed = empty(spec.vocab_size, h)
    layers = tuple(
        LayerWeights(
            input_norm=empty(h),
            qkv=empty(a.qkv_size, h),
            o=empty(h, a.q_size),
            post_norm=empty(h),
            router=empty(spec.experts.num_experts, h) if spec.experts.router else None,
        )
        for _ in range(spec.num_layers)
    )
    lm_head = embed if spec.tie_word_embeddings else empty(spec.vocab_size, h)
    pages = PageStore(layout, placement, dtype, device, make_arena)
    return Weights(spec, embed, empty(h), lm_head, layers, pages)
