"""Measures a machine on which the CPU does everything."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_lightning.bench.plain_rates import read_rate
from moe_lightning.engine.worker import cpu_lane_threads
from moe_lightning.hardware.kernel_times import ExpertsProfile, ModelShape
from moe_lightning.hardware.profile import AttentionProfile, HostProfile
from moe_lightning.kernels.cpu_kernels import CpuKernels
from moe_lightning.profiling import host
from moe_lightning.profiling.arena import HostMemory
from moe_lightning.profiling.attention import AttentionBench
from moe_lightning.profiling.effort import Effort
from moe_lightning.profiling.steps import Report, Steps

_DTYPES = (torch.bfloat16, torch.float32)


def measure_cpu_machine(shapes: Sequence[ModelShape], effort: Effort, report: Report) -> HostProfile:
    """Memory, products, attention, and the experts of each shape."""
    steps = Steps(3 + len(_DTYPES) * (len(effort.geometries) + len(shapes)), report)
    steps.begin("host memory")
    memory = HostMemory(effort, has_gpu=False)
    memory.fill(_DTYPES[0])
    kernel = CpuKernels(cpu_lane_threads(torch.device("cpu")))
    steps.begin("reading host memory")
    read = read_rate(kernel, memory.read, effort.point_s, effort.call_bytes)
    steps.begin("CPU products")
    flops = {host.name_of(dtype): host.product_flops(dtype, effort) for dtype in _DTYPES}
    attention: list[AttentionProfile] = []
    for dtype in _DTYPES:
        memory.fill(dtype)
        for geometry in effort.geometries:
            steps.begin(f"CPU attention, {host.describe(geometry)}, {host.name_of(dtype)}")
            attention.append(AttentionBench(kernel, memory.read, geometry, dtype, effort).measure(None))
    del memory
    experts: list[ExpertsProfile] = []
    for shape in shapes:
        for dtype in _DTYPES:
            steps.begin(f"experts of {shape.name} on the CPU, {host.name_of(dtype)}")
            experts.append(host.experts(shape, dtype, effort))
    return HostProfile(read, None, flops, tuple(attention), tuple(experts))
