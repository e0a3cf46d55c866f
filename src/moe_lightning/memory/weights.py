"""The weights of a model where a pass finds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe_lightning.memory.arena import HostArena, MakeArena, device_tensor
from moe_lightning.memory.layout import PageLayout, Placement
from moe_lightning.memory.page_content import PageContent
from moe_lightning.memory.page_store import PageStore
from moe_lightning.models.spec import EXPERT_ROLES, ModelSpec, Role, TensorSpec

_SEGMENTS = (Role.GATE, Role.UP, Role.DOWN)  # of a page, in order


@dataclass(frozen=True)
class LayerWeights:
    """Weights of a layer that stay on the device. H: hidden size."""

    input_norm: Tensor  # [H]
    qkv: Tensor  # [q_size + 2 kv_size, H]
    o: Tensor  # [H, q_size]
    post_norm: Tensor  # [H]
    router: Tensor | None  # [num_experts, H]

    # As products take them; each turn would cost a launcher microseconds in every task.
    @cached_property
    def qkv_turned(self) -> Tensor:
        """[H, q_size + 2 kv_size], the same memory."""
        return self.qkv.t()

    @cached_property
    def o_turned(self) -> Tensor:
        """[q_size, H], the same memory."""
        return self.o.t()

    @cached_property
    def router_turned(self) -> Tensor | None:
        """[H, num_experts], the same memory."""
        return None if self.router is None else self.router.t()


@dataclass(frozen=True)
class Weights:
    """All weights of a model."""

    spec: ModelSpec
    embed: Tensor  # [V, H]
    final_norm: Tensor  # [H]
    lm_head: Tensor  # [V, H]; the embedding itself where they are tied
    layers: tuple[LayerWeights, ...]
    pages: PageStore
    content: PageContent  # of the pages

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
        with self.content.near(values) as near:
            for segment, cut in self._segments(tensor):
                part = near[cut]
                self.content.write(segment, part)
                placed += part.numel()
        return placed

    def get(self, tensor: TensorSpec) -> Tensor:
        """A tensor as a checkpoint has it, put together on the device."""
        found = torch.empty(tensor.shape, dtype=self.embed.dtype, device=self.embed.device)
        if tensor.role not in EXPERT_ROLES:
            return found.copy_(self._resident(tensor))
        for segment, cut in self._segments(tensor):
            found[cut] = self.content.read(segment.to(found.device)).view(found[cut].shape)
        return found

    def _segments(self, tensor: TensorSpec) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
        """Where an expert's matrix is: pairs of a page's segment and the part of the matrix that it holds."""
        layout, place = self.pages.layout, _SEGMENTS.index(tensor.role)
        for part in range(layout.pages_per_expert):
            page = tensor.expert * layout.pages_per_expert + part
            cut = slice(part * layout.rows, (part + 1) * layout.rows)
            segment = self.content.segments(tensor.layer, page)[place]
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
    return Weights(spec, embed, empty(h), lm_head, layers, pages, PageContent(pages))
