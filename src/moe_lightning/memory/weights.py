"""The weights of a model where a pass finds them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lightning.errors import ScheduleError
from moe_lightning.kernels import ops, packing
from moe_lightning.memory.arena import HostArena, MakeArena, device_tensor
from moe_lightning.memory.layout import PageLayout, Placement
from moe_lightning.memory.staging import StagingRing
from moe_lightning.models.spec import EXPERT_ROLES, ModelSpec, Role, TensorSpec
from moe_lightning.perf.page_size import segment_bytes

_SEGMENTS = (Role.GATE, Role.UP, Role.DOWN)  # of a page, in order


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

    Each page is stored once: resident pages in their frames, streamed pages in host memory. Packed pages are bytes
    in both, and `swept` unpacks those of one sweep to where kernels read them.
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
        # Made once: each would cost a launcher microseconds at every copy.
        self._frames, self._rows = self.frames.unbind(0), self.host.unbind(0)
        self._staging: StagingRing | None = None
        self._packing = threading.Lock()
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
            self._unpacked(largest_sweep or layout.pages_per_layer, device) if layout.packed else None
        )

    def place_ring(self, offset: int) -> None:
        """Make `page_table` that of a pass whose ring begins at frame `offset`; computed on the device."""
        ring = self.placement.num_ring_frames
        if ring:
            turned = (self._first_table + offset).remainder_(ring)
            torch.where(self._first_table < ring, turned, self._first_table, out=self.page_table)

    def _unpacked(self, num_pages: int, device: torch.device) -> Unpacked:
        pages = device_tensor((num_pages, self.layout.page_elements), self.dtype, device)
        table = torch.arange(self.layout.pages_per_layer, dtype=torch.int32) % num_pages
        return Unpacked(pages, table.to(device))

    def swept(self, layer: int, experts: range) -> tuple[Tensor, Tensor]:
        """Where kernels find the pages of some of a layer's experts: pages, and the row of each page of the layer.

        Packed ones are unpacked, on the current stream, unless the call before was for the same.
        """
        if self.unpacked is None:
            return self.frames, self.page_table[layer]
        p, unpacked = self.layout.pages_per_expert, self.unpacked
        if unpacked.content != (layer, experts):
            unpacked.content = None
            first, count = experts.start * p, len(experts) * p
            n = self.layout.segment_elements
            ops.unpack_pages(self.frames, self.page_table[layer], first, count, unpacked.pages, n)
            unpacked.content = layer, experts
        return unpacked.pages, unpacked.table

    def segments(self, layer: int, page: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down of a page where it is stored, packed if pages are."""
        layout = self.layout
        size = segment_bytes(layout.segment_elements) if layout.packed else layout.segment_elements
        gate, up, down, *_ = self.home(layer, page).split(size)
        return gate, up, down

    @property
    def packs_on_gpu(self) -> bool:
        """Whether `write` packs, and on a GPU."""
        return self.layout.packed and self.frames.is_cuda

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
            yield values.to(self.frames.device)

    def write(self, segment: Tensor, values: Tensor) -> None:
        """Fill a segment with weights of any shape and dtype, as many as it has.

        Raises:
            NotPackableError: pages are packed, and these weights do not fit.
        """
        if not self.layout.packed:
            segment.view(values.shape).copy_(values)
        else:
            packing.pack(values.to(self.frames.device, self.dtype), segment)

    def read(self, segment: Tensor) -> Tensor:
        """The weights of a segment, [rows * H]; where pages are packed, a copy."""
        return packing.unpack(segment, self.layout.segment_elements) if self.layout.packed else segment

    def home(self, layer: int, page: int) -> Tensor:
        """The page where it is stored: [page_elements], or its bytes where it is packed."""
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


@dataclass
class Unpacked:
    """Pages of the last sweep as kernels read them.

    Attributes:
        pages: [the most of a sweep, page_elements].
        table: [pages_per_layer] int32, row of each page of a layer; those of any sweep are apart.
        content: layer and experts of that sweep.
    """

    pages: Tensor
    table: Tensor
    content: tuple[int, range] | None = None


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

    def put(self, tensor: TensorSpec, values: Tensor) -> int:
        """Fill in a checkpoint tensor; how many weights were placed.

        Raises:
            NotPackableError: pages are packed, and these weights do not fit.
        """
        if tensor.role not in EXPERT_ROLES:
            return self._resident(tensor).copy_(values).numel()
        placed = 0
        with self.pages.near(values) as near:
            for segment, cut in self._segments(tensor):
                part = near[cut]
                self.pages.write(segment, part)
                placed += part.numel()
        return placed

    def get(self, tensor: TensorSpec) -> Tensor:
        """A tensor as a checkpoint has it, put together on the device."""
        found = torch.empty(tensor.shape, dtype=self.embed.dtype, device=self.embed.device)
        if tensor.role not in EXPERT_ROLES:
            return found.copy_(self._resident(tensor))
        for segment, cut in self._segments(tensor):
            found[cut] = self.pages.read(segment.to(found.device)).view(found[cut].shape)
        return found

    def _segments(self, tensor: TensorSpec) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
        """Where an expert's matrix is: pairs of a page's segment and the part of the matrix that it holds."""
        layout, place = self.pages.layout, _SEGMENTS.index(tensor.role)
        for part in range(layout.pages_per_expert):
            page = tensor.expert * layout.pages_per_expert + part
            cut = slice(part * layout.rows, (part + 1) * layout.rows)
            segment = self.pages.segments(tensor.layer, page)[place]
            yield segment, ((slice(None), cut) if tensor.role is Role.DOWN else (cut,))

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
    largest_sweep: int | None = None,
) -> Weights:
    """Memory for all weights, not yet filled.

    Args:
        spec: the model.
        layout: of its pages.
        placement: of its pages.
        dtype: of its weights.
        device: where those are that do not stream.
        make_arena: makes the memory of those that do.
        largest_sweep: pages that a sweep reads at most, where pages are packed; default: a layer's.
    """

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
    pages = PageStore(layout, placement, dtype, device, make_arena, largest_sweep)
    return Weights(spec, embed, empty(h), lm_head, layers, pages)
