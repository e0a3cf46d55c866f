"""Measures the GPU: its memory, its products, and sweeps over a model's experts."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import torch

from moe_lightning.bench.shapes import LayerShape, Routing
from moe_lightning.bench.timing import seconds_of
from moe_lightning.hardware.curve import TimeCurve
from moe_lightning.hardware.kernel_times import ExpertsProfile, ModelShape, PartTimes
from moe_lightning.kernels import ops
from moe_lightning.models.spec import AttentionSpec, RouterSpec
from moe_lightning.pipeline.shape import experts_in
from moe_lightning.profiling.effort import Effort
from moe_lightning.profiling.events import recorded, wait_for
from moe_lightning.profiling.host import name_of
from moe_lightning.profiling.load import Load
from moe_lightning.profiling.queued import task_seconds

if TYPE_CHECKING:
    from moe_lightning.kernels.experts import Workspace

_NUM_ROUTINGS = 4
_COMPILERS = 8
_SWEEPS_AHEAD = 3


def memory_rate(effort: Effort) -> float:
    """Bytes/s of a copy within the GPU's memory, read plus written."""
    source = torch.empty(effort.gpu_bytes // 8, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of([lambda: target.copy_(source)], effort.gpu_point_s)


def product_flops(dtype: torch.dtype, effort: Effort) -> float:
    """FLOP/s of a large square product."""
    size = effort.gpu_product
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * size**3 / seconds_of([lambda: torch.mm(a, b, out=out)], effort.gpu_point_s)


class ExpertsBench:
    """Sweeps over the experts of one layer.

    Only so many pages as `effort.pool_bytes` holds exist; larger layers read them again, long after.
    """

    def __init__(self, shape: ModelShape, dtype: torch.dtype, effort: Effort) -> None:
        self._shape, self._dtype, self._effort = shape, dtype, effort
        elements = 3 * shape.hidden_size * shape.intermediate_size // shape.pages_per_expert
        num_pages = shape.num_experts * shape.pages_per_expert
        num_frames = max(1, min(num_pages, effort.pool_bytes // (elements * dtype.itemsize)))
        self._frames = torch.empty((num_frames, elements), dtype=dtype, device="cuda")
        self._frames.normal_(std=shape.hidden_size**-0.5)
        order = torch.randperm(num_frames, device="cuda")
        self._table = order[torch.arange(num_pages, device="cuda") % num_frames].int()
        self._layer = LayerShape(
            shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.pages_per_expert,
            RouterSpec(shape.top_k), AttentionSpec(shape.num_heads, shape.num_kv_heads, shape.head_dim),
        )  # fmt: skip
        tokens = self._fitting()
        # One workspace for the most tokens, as passes have it; nothing may be allocated beside a load.
        self._x = torch.randn(tokens[-1], shape.hidden_size, device="cuda", dtype=dtype)
        self._hidden = torch.zeros_like(self._x)
        self._workspace = self._workspace_of(tokens[-1])
        numbers = sorted(
            (n for n in effort.expert_parts if n > 1 and shape.num_experts % n == 0), reverse=True
        )
        part_tokens = tuple(count for count in effort.part_tokens if count <= tokens[-1])
        self._sweeps = {1: tokens} | {n: part_tokens for n in numbers if part_tokens}

    def compile(self, stopped: threading.Event) -> None:
        """Compile all kernels of the sweeps, several at once: one by one takes most of a first profile."""
        s = self._shape
        ops.compile_experts(
            self._frames, self._table, s.pages_per_expert, s.hidden_size, s.top_k, self._sweeps,
            num_threads=min(_COMPILERS, os.cpu_count() or 1), stopped=stopped,
        )  # fmt: skip
        torch.cuda.synchronize()

    def measure(self, load: Load | None) -> ExpertsProfile:
        """Seconds by tokens, of sweeps that begin when their pages are there, while the load goes on."""
        # Kept by nobody: calls that the bench held would hold the bench and all its GPU memory.
        calls = [self._calls_of(count, n) for n, counts in self._sweeps.items() for count in counts]
        seconds = iter(task_seconds(calls, load))
        curves = {
            n: TimeCurve(counts, tuple(islice(seconds, len(counts)))) for n, counts in self._sweeps.items()
        }
        whole = curves.pop(1)
        parts = tuple(PartTimes(1 / n, curve) for n, curve in curves.items())
        return ExpertsProfile(self._shape, name_of(self._dtype), whole, parts)

    def page_rate(self, load: Load) -> float | None:
        """Bytes/s of the load's pages while sweeps, which `measure` has run before, follow each other beside it.

        None where no page has come.
        """
        counts = self._sweeps[1]
        count = max((n for n in counts if n <= self._effort.load_tokens), default=counts[0])
        calls, under_way = self._calls_of(count, 1), deque[torch.cuda.Event]()
        torch.cuda.synchronize()
        load.copies.rate_watched()  # forget what was watched before
        with load.running():
            end = time.perf_counter() + self._effort.pages_s
            while time.perf_counter() < end:
                calls[0]()
                calls.append(calls.pop(0))
                under_way.append(recorded())
                if len(under_way) > _SWEEPS_AHEAD:
                    wait_for(under_way.popleft())
            for event in under_way:
                wait_for(event)
        return load.copies.rate_watched()

    def _calls_of(self, num_tokens: int, num_parts: int) -> list[Callable[[], object]]:
        """Calls with other experts each, so that few tokens do not find theirs in the cache."""
        num_experts = self._shape.num_experts
        parts = [experts_in(num_experts, num_parts, number % num_parts) for number in range(_NUM_ROUTINGS)]
        return [
            partial(
                self._call,
                Routing.random(self._layer, num_tokens),
                self._workspace,
                part if num_parts > 1 else None,
            )
            for part in parts
        ]

    def _call(self, routing: Routing, workspace: Workspace | None, only: range | None = None) -> None:
        n = len(routing.topk_ids)
        ops.experts_(
            self._hidden[:n], self._x[:n], routing.topk_ids, routing.topk_weights, self._frames, self._table,
            self._shape.pages_per_expert, workspace, only,
        )  # fmt: skip

    def _workspace_of(self, num_tokens: int) -> Workspace | None:
        s = self._shape
        return ops.experts_workspace(
            num_tokens,
            s.top_k,
            s.num_experts,
            s.hidden_size,
            s.intermediate_size,
            self._dtype,
            self._x.device,
        )

    def _fitting(self) -> tuple[int, ...]:
        """Those numbers of tokens whose workspace fits beside the pages."""
        s, room = self._shape, self._effort.gpu_bytes - torch.cuda.memory_allocated()
        per_token = (
            s.top_k * (s.hidden_size + s.intermediate_size) + 2 * s.hidden_size
        ) * self._dtype.itemsize
        tokens = sorted(self._effort.tokens)
        return tuple(count for count in tokens if count == tokens[0] or count * per_token < 0.9 * room)
