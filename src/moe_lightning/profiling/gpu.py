"""Measures the GPU: its memory, its products, and the kernels at a model's shapes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from moe_lightning.bench.shapes import LayerShape, Routing
from moe_lightning.bench.timing import seconds_of
from moe_lightning.hardware.curve import TimeCurve
from moe_lightning.hardware.kernel_times import DenseProfile, ExpertsProfile, ModelShape, PartTimes
from moe_lightning.kernels import ops
from moe_lightning.models.spec import AttentionSpec, RouterSpec
from moe_lightning.pipeline.shape import experts_in
from moe_lightning.profiling.effort import Effort
from moe_lightning.profiling.queued import task_seconds
from moe_lightning.units import MIB

_COLD_BYTES = 256 * MIB  # more than any cache: matrices are rotated over as much
_HEAD_ROWS = 512  # rows of logits that exist at once
_NUM_ROUTINGS = 4
_COMPILERS = 8


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
        self._tokens = self._fitting()

    def compile(self) -> None:
        """Compile the kernels of all points, several at once: one by one takes most of a first profile."""
        calls = [self._calls(num_tokens)[0] for num_tokens in self._tokens]
        calls[0]()  # what all share, such as the driver's own helpers
        with ThreadPoolExecutor(min(_COMPILERS, os.cpu_count() or 1), initializer=_bind_context) as threads:
            for done in [threads.submit(call) for call in calls[1:]]:
                done.result()
        torch.cuda.synchronize()

    def measure(self) -> ExpertsProfile:
        """Seconds by tokens, of sweeps that begin when their pages are there."""
        counts = [count for count in self._effort.part_tokens if count <= self._tokens[-1]]
        numbers = [n for n in self._effort.expert_parts if n > 1 and self._shape.num_experts % n == 0]
        parts = [PartTimes(1 / n, self._times(counts, n)) for n in sorted(numbers, reverse=True) if counts]
        whole = self._times(self._tokens)
        return ExpertsProfile(self._shape, _name(self._dtype), whole, tuple(parts))

    def _times(self, counts: Sequence[int], num_parts: int = 1) -> TimeCurve:
        seconds = [task_seconds(self._calls(count, num_parts)) for count in counts]
        return TimeCurve(tuple(counts), tuple(seconds))

    def _calls(self, num_tokens: int, num_parts: int = 1) -> list[Callable[[], object]]:
        """Calls with other experts each, so that few tokens do not find theirs in the cache."""
        s = self._shape
        x = torch.randn(num_tokens, s.hidden_size, device="cuda", dtype=self._dtype)
        hidden = torch.zeros_like(x)
        workspace = ops.experts_workspace(
            num_tokens, s.top_k, s.num_experts, s.hidden_size, s.intermediate_size, self._dtype, x.device
        )
        routings = [Routing.random(self._layer, num_tokens) for _ in range(_NUM_ROUTINGS)]

        def call(number: int, routing: Routing) -> Callable[[], object]:
            only = experts_in(s.num_experts, num_parts, number % num_parts) if num_parts > 1 else None
            return lambda: ops.experts_(
                hidden, x, routing.topk_ids, routing.topk_weights, self._frames, self._table,
                s.pages_per_expert, workspace, only,
            )  # fmt: skip

        return [call(number, routing) for number, routing in enumerate(routings)]

    def _fitting(self) -> tuple[int, ...]:
        """Those numbers of tokens whose workspaces fit together beside the pages."""
        s, room = self._shape, self._effort.gpu_bytes - torch.cuda.memory_allocated()
        per_token = (
            s.top_k * (s.hidden_size + s.intermediate_size) + 2 * s.hidden_size
        ) * self._dtype.itemsize
        fitting: list[int] = []
        total = 0
        for num_tokens in sorted(self._effort.tokens):
            total += num_tokens * per_token
            if total < 0.9 * room or not fitting:
                fitting.append(num_tokens)
        return tuple(fitting)


def _bind_context() -> None:
    """Give a thread the GPU's context, which Triton's first launch expects to be there."""
    torch.zeros(1, device="cuda")


def dense(shape: ModelShape, dtype: torch.dtype, effort: Effort) -> list[DenseProfile]:
    """Projections of queries, keys and values, of the attention's output, and the head."""
    matrices = {
        "qkv": (shape.hidden_size, shape.qkv_size),
        "output": (shape.q_size, shape.hidden_size),
        "head": (shape.hidden_size, shape.vocab_size),
    }
    return [
        DenseProfile(
            f"{name} of {shape.name}", inputs, outputs, _name(dtype),
            _product_times(name, inputs, outputs, dtype, effort),
        )
        for name, (inputs, outputs) in matrices.items()
    ]  # fmt: skip


def _product_times(name: str, inputs: int, outputs: int, dtype: torch.dtype, effort: Effort) -> TimeCurve:
    number = max(1, min(16, _COLD_BYTES // (inputs * outputs * dtype.itemsize)))
    weights = [
        torch.empty(outputs, inputs, device="cuda", dtype=dtype).normal_(std=inputs**-0.5)
        for _ in range(number)
    ]
    counts = tuple(rows for rows in effort.rows if name != "head" or rows <= _HEAD_ROWS)
    seconds = []
    for rows in counts:
        x = torch.randn(rows, inputs, device="cuda", dtype=dtype)
        out = torch.zeros(rows, outputs, device="cuda", dtype=dtype)
        product = _added_product if name == "output" else _product
        seconds.append(seconds_of([product(x, w, out) for w in weights], effort.gpu_point_s))
    return TimeCurve(counts, tuple(seconds))


def _product(x: Tensor, weight: Tensor, out: Tensor) -> Callable[[], object]:
    return lambda: torch.mm(x, weight.t(), out=out)


def _added_product(x: Tensor, weight: Tensor, out: Tensor) -> Callable[[], object]:
    """Into the residual stream, which is read too."""
    return lambda: out.addmm_(x, weight.t())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
