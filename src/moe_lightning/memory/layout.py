"""Where each weight of an expert lies: pages, frames and host rows, as arithmetic.

A page holds rows [p * rows, (p + 1) * rows) of gate and up, and the same columns of down:

    | gate_p [rows, H] | up_p [rows, H] | down_p [H, rows] |

It is self-contained: the expert's output is the sum over its pages of down_p(act(gate_p x) * up_p x). In a packed
page each of the three segments is packed for itself (`perf.page_size`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from moe_lightning.errors import ConfigError
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.page_size import page_bytes


@dataclass(frozen=True)
class PageLayout:
    """Shape of a page; pages of a layer are numbered expert by expert."""

    hidden_size: int
    rows: int
    pages_per_expert: int
    num_experts: int
    packed: bool = False

    @classmethod
    def of(cls, spec: ModelSpec, pages_per_expert: int, *, packed: bool = False) -> PageLayout:
        """The layout of a model's experts.

        Raises:
            ConfigError: the intermediate dimension cannot be cut into that many equal pages.
        """
        size = spec.experts.intermediate_size
        if pages_per_expert < 1 or size % pages_per_expert:
            raise ConfigError(
                f"pages_per_expert={pages_per_expert} does not divide the intermediate size {size}; "
                f"use one of {_divisors(size)}"
            )
        rows, num_experts = size // pages_per_expert, spec.experts.num_experts
        return cls(spec.hidden_size, rows, pages_per_expert, num_experts, packed)

    @property
    def page_elements(self) -> int:
        """Weights in one page."""
        return 3 * self.segment_elements

    @property
    def segment_elements(self) -> int:
        """Weights of each of gate, up and down in one page."""
        return self.rows * self.hidden_size

    def page_bytes(self, dtype_bytes: int) -> int:
        """Of one page as it is stored."""
        return page_bytes(self.hidden_size, self.rows, dtype_bytes, packed=self.packed)

    @property
    def pages_per_layer(self) -> int:
        """Pages of all experts of a layer."""
        return self.num_experts * self.pages_per_expert


@dataclass(frozen=True)
class Placement:
    """Which pages stay in frames of their own, which go through the ring, and which the CPU computes with.

    Frames 0 .. num_ring_frames - 1 are the ring; resident pages have the frames after it. The first
    `resident[l]` pages of layer l are resident, the others have a row each in host memory. Layers `on_cpu` have all
    their pages in host memory, in rows of their own, and none goes to the GPU.
    """

    pages_per_layer: int
    resident: tuple[int, ...]
    num_ring_frames: int
    on_cpu: range = range(0)

    def __post_init__(self) -> None:
        if any(not 0 <= count <= self.pages_per_layer for count in self.resident):
            raise ConfigError(
                f"resident_pages={self.resident}: each layer has {self.pages_per_layer} pages; "
                "give from none to all of them"
            )
        if kept := [layer for layer in self.on_cpu if self.resident[layer]]:
            raise ConfigError(
                f"resident_pages={self.resident}: the CPU computes the experts of layers {list(self.on_cpu)}, so "
                f"none of layers {kept} may stay on the GPU; give 0 for these"
            )

    @cached_property
    def streamed(self) -> tuple[int, ...]:
        """Streamed pages of each layer."""
        return tuple(
            0 if layer in self.on_cpu else self.pages_per_layer - count
            for layer, count in enumerate(self.resident)
        )

    @property
    def num_frames(self) -> int:
        """Ring and resident frames together."""
        return self.num_ring_frames + sum(self.resident)

    @property
    def num_host_rows(self) -> int:
        """Streamed pages of all layers."""
        return sum(self.streamed)

    def streamed_pages(self) -> list[tuple[int, int]]:
        """Layer and page of each host row, in order."""
        layers = [layer for layer in range(len(self.resident)) if layer not in self.on_cpu]
        return [
            (layer, page) for layer in layers for page in range(self.resident[layer], self.pages_per_layer)
        ]

    def pages_on_cpu(self) -> list[tuple[int, int]]:
        """Layer and page of each row of the CPU's, in order."""
        return [(layer, page) for layer in self.on_cpu for page in range(self.pages_per_layer)]

    def resident_frame(self, layer: int, page: int) -> int:
        """Frame of a resident page, or -1 for a streamed one."""
        if page >= self.resident[layer]:
            return -1
        return self.num_ring_frames + self._resident_before[layer] + page

    def frame(self, layer: int, page: int) -> int:
        """Frame of any page in a pass whose first streamed page is in frame 0; -1 for one of the CPU's."""
        if layer in self.on_cpu:
            return -1
        if page < self.resident[layer]:
            return self.resident_frame(layer, page)
        return self.host_row(layer, page) % self.num_ring_frames

    def host_row(self, layer: int, page: int) -> int:
        """Row in host memory of a streamed page."""
        return self._streamed_before[layer] + page - self.resident[layer]

    def cpu_row(self, layer: int, page: int) -> int:
        """Row of a page of the CPU's."""
        return self.on_cpu.index(layer) * self.pages_per_layer + page

    @cached_property
    def _resident_before(self) -> tuple[int, ...]:
        return (0, *accumulate(self.resident))

    @cached_property
    def _streamed_before(self) -> tuple[int, ...]:
        return (0, *accumulate(self.streamed))


def _divisors(size: int) -> list[int]:
    return [d for d in range(1, min(size, 64) + 1) if size % d == 0]
