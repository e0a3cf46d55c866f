"""Measures the kernels beside a layer's products, which cost more than their bytes: each has a start and an end."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_lightning.hardware.curve import TimeCurve
from moe_lightning.hardware.kernel_times import ModelShape, SmallKernels
from moe_lightning.kernels import ops, reference
from moe_lightning.models.spec import RouterSpec
from moe_lightning.profiling.effort import Effort
from moe_lightning.profiling.host import name_of
from moe_lightning.profiling.queued import queued_seconds

_EPS = 1e-5


def small_kernels(shape: ModelShape, dtype: torch.dtype, effort: Effort) -> SmallKernels:
    """Those of a model's layer, by rows."""
    works = [calls(shape, dtype, rows, torch.device("cuda")) for rows in effort.rows]
    pre, post = (
        TimeCurve(effort.rows, tuple(queued_seconds(each[n], effort.gpu_point_s) for each in works))
        for n in (0, 1)
    )
    return SmallKernels(shape, name_of(dtype), pre, post)


def calls(
    shape: ModelShape, dtype: torch.dtype, rows: int, device: torch.device
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Before attention norm and rotation; after it norm, router and the choice of experts, as passes call them."""
    hidden, normed = (torch.randn(rows, shape.hidden_size, device=device, dtype=dtype) for _ in range(2))
    norm = torch.ones(shape.hidden_size, device=device, dtype=dtype)
    qkv = torch.randn(rows, shape.qkv_size, device=device, dtype=dtype)
    frequencies = torch.rand(shape.head_dim // 2, device=device)
    cos, sin = reference.rotary(torch.arange(rows, device=device), frequencies, dtype)
    weight = torch.randn(shape.num_experts, shape.hidden_size, device=device, dtype=dtype)
    logits = torch.empty(rows, shape.num_experts, device=device, dtype=dtype)
    router, ids = RouterSpec(shape.top_k), torch.empty(rows, shape.top_k, device=device, dtype=torch.int64)
    weights = torch.empty(rows, shape.top_k, device=device)

    def before() -> None:
        ops.rms_norm(hidden, norm, _EPS, out=normed)
        ops.rotate_(qkv, cos, sin, shape.num_heads + shape.num_kv_heads)

    def after() -> None:
        ops.rms_norm(hidden, norm, _EPS, out=normed)
        torch.mm(normed, weight.t(), out=logits)
        ops.route(logits, router, ids, weights)

    return before, after
