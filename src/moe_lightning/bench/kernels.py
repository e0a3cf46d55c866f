"""Every GPU kernel at the shapes of real models: the run behind `moe-lightning bench kernels`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_lightning.bench.experts import ExpertsBench
from moe_lightning.bench.layers import measure_layer
from moe_lightning.bench.machine import facts, require_gpu
from moe_lightning.bench.result import Measurement
from moe_lightning.bench.shapes import MODELS
from moe_lightning.bench.timing import Roofs, measure_roofs
from moe_lightning.bench.unpacking import measure_unpacking

_LAYER_TOKENS = (64, 2048, 8192)  # the kernels around the experts: enough to see their rates


def measure_kernels(
    models: Sequence[str], tokens: Sequence[int], report: Callable[[str], None]
) -> tuple[Roofs, list[Measurement]]:
    """Roofs and measurements; `report` hears of progress.

    Raises:
        ConfigError: no GPU.
        WrongResultError: a kernel computes something else.
    """
    dtype = require_gpu()
    torch.manual_seed(0)
    start = time.perf_counter()
    roofs = measure_roofs(dtype)
    found: list[Measurement] = []
    for model in models:
        shape = MODELS[model]
        if dtype is torch.bfloat16:
            found.append(measure_unpacking(model, shape))
        bench = ExpertsBench.of(model, shape, dtype)
        for num_tokens in tokens:
            found.extend(bench.measure(num_tokens))
            if num_tokens in _LAYER_TOKENS:
                found.extend(measure_layer(model, shape, num_tokens, dtype))
            report(f"{model} {num_tokens} tokens: done after {time.perf_counter() - start:.0f} s")
        del bench
        torch.cuda.empty_cache()
    return roofs, found


def to_json(roofs: Roofs, measurements: Sequence[Measurement]) -> dict[str, Any]:
    """The result file."""
    return facts() | {
        "roofs": {"flops_per_s": roofs.flops, "bytes_per_s": roofs.bandwidth},
        "measurements": [m.to_json(roofs) for m in measurements],
    }
