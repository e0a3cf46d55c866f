"""Measures a layer's tasks before and after attention: a product and the small kernels beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_lightning.hardware.curve import TimeCurve
from moe_lightning.hardware.kernel_times import ModelShape, SmallKernels
from moe_lightning.kernels import ops, reference
from moe_lightning.models.spec import RouterSpec
from moe_lightning.profiling.effort import Effort
from moe_lightning.profiling.host import name_of
from moe_lightning.profiling.load import Load
from moe_lightning.profiling.queued import task_seconds
from moe_lightning.units import MIB

_EPS = 1e-5
_COLD_BYTES = 256 * MIB  # more than any cache: layers are rotated over as much
_MOST_LAYERS = 8

Launch = Callable[[], None]


def small_kernels(shape: ModelShape, dtype: torch.dtype, effort: Effort, load: Load | None) -> SmallKernels:
    """The tasks of a model's layer, by rows, while the load goes on."""
    layers = weights(shape, dtype)
    works = [tasks(shape, layers, rows) for rows in effort.rows]
    found = task_seconds([[task[n] for task in each] for n in (0, 1) for each in works], load)
    pre, post = (TimeCurve(effort.rows, tuple(found[n * len(works) : (n + 1) * len(works)])) for n in (0, 1))
    return SmallKernels(shape, name_of(dtype), pre, post, is_whole=True)


def weights(shape: ModelShape, dtype: torch.dtype, most: int = _MOST_LAYERS) -> list[tuple[Tensor, Tensor]]:
    """Of some layers: [qkv_size, hidden_size] before attention, [hidden_size, q_size] after it."""
    sizes = (shape.qkv_size, shape.hidden_size), (shape.hidden_size, shape.q_size)
    layer_bytes = sum(outputs * inputs for outputs, inputs in sizes) * dtype.itemsize
    count = max(1, min(most, _COLD_BYTES // layer_bytes))

    def matrix(outputs: int, inputs: int) -> Tensor:
        return torch.empty(outputs, inputs, device="cuda", dtype=dtype).normal_(std=inputs**-0.5)

    return [(matrix(*sizes[0]), matrix(*sizes[1])) for _ in range(count)]


def tasks(
    shape: ModelShape, layers: Sequence[tuple[Tensor, Tensor]], rows: int
) -> list[tuple[Launch, Launch]]:
    """Each layer's: norm, product, rotation; and product, norm, router, choice of experts, as passes call them."""
    dtype, device = layers[0][0].dtype, layers[0][0].device
    hidden, normed = (torch.randn(rows, shape.hidden_size, device=device, dtype=dtype) for _ in range(2))
    norm = torch.ones(shape.hidden_size, device=device, dtype=dtype)
    qkv = torch.empty(rows, shape.qkv_size, device=device, dtype=dtype)
    attended = torch.randn(rows, shape.q_size, device=device, dtype=dtype)
    frequencies = torch.rand(shape.head_dim // 2, device=device)
    cos, sin = reference.rotary(torch.arange(rows, device=device), frequencies, dtype)
    router_weight = torch.randn(shape.num_experts, shape.hidden_size, device=device, dtype=dtype)
    logits = torch.empty(rows, shape.num_experts, device=device, dtype=dtype)
    router, ids = RouterSpec(shape.top_k), torch.empty(rows, shape.top_k, device=device, dtype=torch.int64)
    choice = torch.empty(rows, shape.top_k, device=device)

    def of(before_weight: Tensor, after_weight: Tensor) -> tuple[Launch, Launch]:
        def before() -> None:
            ops.rms_norm(hidden, norm, _EPS, out=normed)
            torch.mm(normed, before_weight.t(), out=qkv)
            ops.rotate_(qkv, cos, sin, shape.num_heads + shape.num_kv_heads)

        def after() -> None:
            hidden.addmm_(attended, after_weight.t())
            ops.rms_norm(hidden, norm, _EPS, out=normed)
            torch.mm(normed, router_weight.t(), out=logits)
            ops.route(logits, router, ids, choice)

        return before, after

    return [of(*layer) for layer in layers]
