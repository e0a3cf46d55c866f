"""Measures the products of a model's layers beside its experts, and its head's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_lightning.bench.timing import seconds_of
from moe_lightning.hardware.curve import TimeCurve
from moe_lightning.hardware.kernel_times import DenseProfile, ModelShape
from moe_lightning.perf.memory import HEAD_ROWS
from moe_lightning.profiling.effort import Effort
from moe_lightning.profiling.host import name_of
from moe_lightning.units import MIB

_COLD_BYTES = 256 * MIB  # more than any cache: matrices are rotated over as much


def dense(shape: ModelShape, dtype: torch.dtype, effort: Effort) -> list[DenseProfile]:
    """Projections of queries, keys and values, of the attention's output, and the head."""
    matrices = {
        "qkv": (shape.hidden_size, shape.qkv_size),
        "output": (shape.q_size, shape.hidden_size),
        "head": (shape.hidden_size, shape.vocab_size),
    }
    return [
        DenseProfile(
            f"{name} of {shape.name}", inputs, outputs, name_of(dtype),
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
    counts = tuple(rows for rows in effort.rows if name != "head" or rows <= HEAD_ROWS)
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
