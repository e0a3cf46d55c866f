"""Measures a machine with a GPU: CPU and link at work at once, then the GPU's kernels."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from moe_lightning.bench.machine import require_gpu
from moe_lightning.bench.plain_rates import read_rate
from moe_lightning.engine.gpu_budget import cap_gpu_memory
from moe_lightning.engine.worker import cpu_lane_threads
from moe_lightning.errors import ConfigError
from moe_lightning.hardware.kernel_times import ModelShape
from moe_lightning.hardware.profile import GpuProfile, HostProfile, LaneProfile, LinkProfile
from moe_lightning.kernels.cpu_kernels import CpuKernels
from moe_lightning.memory.mapped import device_view
from moe_lightning.perf.memory import CPU_EXPERTS_AT_ONCE
from moe_lightning.profiling import gpu, host
from moe_lightning.profiling.arena import HostMemory
from moe_lightning.profiling.attention import AttentionBench
from moe_lightning.profiling.decode import decode
from moe_lightning.profiling.dense import dense
from moe_lightning.profiling.effort import Effort
from moe_lightning.profiling.lanes import LanesBench
from moe_lightning.profiling.link import Copies, Link
from moe_lightning.profiling.load import Load
from moe_lightning.profiling.prefill import prefill
from moe_lightning.profiling.small_kernels import small_kernels
from moe_lightning.profiling.steps import Report, Steps
from moe_lightning.units import MIB, format_bytes

_HOST_DTYPES = (torch.bfloat16, torch.float32)
_GPU_DTYPES = (torch.float16, torch.float32)  # beside the one that it computes models in
_PAGE = 16 * MIB  # bytes of the copies beside attention: about a page of weights
_LEAST = 768 * MIB
_MOST_OF_BUDGET = 0.5  # beside what copies take


def measure_gpu_machine(
    shapes: Sequence[ModelShape], effort: Effort, gpu_memory: int | None, report: Report
) -> tuple[HostProfile, GpuProfile]:
    """Link, CPU attention beside copies, lanes, and the kernels of each shape.

    Raises:
        ConfigError: there is too little memory, or no Triton.
        DeviceError: the GPU does not answer.
    """
    dtype = require_gpu()
    steps = Steps(9 + len(effort.geometries) + 7 * len(shapes), report)
    with steps.named(), _within_budget(effort, gpu_memory) as effort:
        return _all(shapes, effort, dtype, steps)  # when it returns, what it had on the GPU is free


def _all(
    shapes: Sequence[ModelShape], effort: Effort, dtype: torch.dtype, steps: Steps
) -> tuple[HostProfile, GpuProfile]:
    steps.begin("host memory, and compiling meanwhile")
    stopped = threading.Event()
    with ThreadPoolExecutor(1, "compile") as background:
        compiled = background.submit(_compile, shapes, effort, dtype, stopped)
        try:
            memory = HostMemory(effort, has_gpu=True)
            memory.fill(dtype)
            compiled.result()
        except BaseException:
            stopped.set()  # nobody waits for kernels after that
            raise
    found_host, link, loads = _host_and_link(memory, shapes, effort, dtype, steps)
    steps.begin("launching and handing over")
    lanes = LanesBench(effort).measure()
    torch.cuda.empty_cache()
    return found_host, _kernels(shapes, loads, effort, dtype, link, lanes, steps)


def _compile(
    shapes: Sequence[ModelShape], effort: Effort, dtype: torch.dtype, stopped: threading.Event
) -> None:
    """All kernels of the shapes' experts; with one shape's memory at a time, as when they are measured."""
    for shape in shapes:
        if stopped.is_set():
            return
        gpu.ExpertsBench(shape, dtype, effort).compile(stopped)
        torch.cuda.empty_cache()


@contextmanager
def _within_budget(effort: Effort, gpu_memory: int | None) -> Iterator[Effort]:
    """The effort that fits what may be used; more is refused by torch's allocator meanwhile."""
    device = torch.device("cuda", 0)
    budget = min(cap_gpu_memory(device, gpu_memory), effort.gpu_bytes)
    try:
        if budget < min(_LEAST, effort.gpu_bytes):
            raise ConfigError(
                f"{format_bytes(budget)} of GPU memory is left beside the driver's own; measuring takes "
                f"{format_bytes(_LEAST)} at least. Raise --gpu-memory, or end other programs on the GPU"
            )
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
        size = effort.gpu_product
        while 3 * 4 * size**2 > _MOST_OF_BUDGET * budget:
            size //= 2
        pool = min(effort.pool_bytes, budget // 4)
        yield replace(effort, gpu_bytes=budget, pool_bytes=pool, gpu_product=size)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"measuring needs more than {format_bytes(budget)} of GPU memory; raise --gpu-memory, or measure a "
            "smaller --model"
        ) from error
    finally:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _host_and_link(
    memory: HostMemory, shapes: Sequence[ModelShape], effort: Effort, dtype: torch.dtype, steps: Steps
) -> tuple[HostProfile, LinkProfile, list[Load | None]]:
    """Both, and what goes on in that memory while a shape's kernels are measured."""
    kernel = CpuKernels(cpu_lane_threads(torch.device("cuda")))
    link = Link(memory.copied, effort)
    steps.begin("copies to the GPU")
    h2d = link.to_gpu()
    steps.begin("copies from the GPU")
    d2h = link.from_gpu()
    steps.begin("copies both ways")
    both = link.both_ways()
    steps.begin("reading host memory")
    copies = None
    read, read_beside = read_rate(kernel, memory.read, effort.point_s, effort.call_bytes), None
    if memory.is_pinned:
        copies = Copies(link, min(_PAGE, max(effort.copy_sizes)), h2d.best_rate)
        with copies:
            read_beside = read_rate(kernel, memory.read, effort.point_s, effort.call_bytes, copies.keep_up)
    steps.begin("CPU products")
    flops = {host.name_of(d): host.product_flops(d, effort) for d in _HOST_DTYPES}
    attention = []
    for done, geometry in enumerate(effort.geometries):
        steps.begin(f"CPU attention beside copies, {host.describe(geometry)}")
        paced = effort.paced(steps.elapsed_s, done)
        attention.append(AttentionBench(kernel, memory.read, geometry, dtype, paced).measure(copies))
    experts = []
    few = tuple(count for count in effort.cpu_tokens if count <= CPU_EXPERTS_AT_ONCE)
    brief = replace(
        effort, point_s=effort.point_s / 2, cpu_experts_s=effort.cpu_experts_beside_s, cpu_tokens=few
    )
    for shape in shapes:
        steps.begin(f"experts of {shape.name} on the CPU beside copies")
        with copies or nullcontext():
            keep_up = copies.keep_up if copies else lambda: None
            experts.append(host.experts(shape, dtype, brief, keep_up, kernel))
    beside = None
    if copies is not None:
        beside = copies.rate_watched() or h2d.best_rate
    loads: list[Load | None] = [None] * len(shapes)
    if copies is not None:
        benches = [AttentionBench(kernel, memory.read, shape.attention, dtype, effort) for shape in shapes]
        layers = [bench.layer(bench.lengths(effort.load_context)) for bench in benches]
        loads = [Load(copies, *layer, _on_gpu(memory.read)) for layer in layers]
    found = HostProfile(read, read_beside, flops, tuple(attention), tuple(experts))
    return found, LinkProfile(memory.is_pinned, h2d, d2h, *both, beside), loads


def _kernels(
    shapes: Sequence[ModelShape],
    loads: Sequence[Load | None],
    effort: Effort,
    dtype: torch.dtype,
    link: LinkProfile,
    lanes: LaneProfile,
    steps: Steps,
) -> GpuProfile:
    steps.begin("GPU memory")
    memory = gpu.memory_rate(effort)
    steps.begin("GPU products")
    flops = {host.name_of(d): gpu.product_flops(d, effort) for d in dict.fromkeys((dtype, *_GPU_DTYPES))}
    experts, products, prompts, decoding, small, page_rates = [], [], [], [], [], []
    for shape, load in zip(shapes, loads, strict=True):
        steps.begin(f"experts of {shape.name} beside copies and the CPU's attention")
        bench = gpu.ExpertsBench(shape, dtype, effort)
        experts.append(bench.measure(load))
        steps.begin(f"pages beside sweeps of {shape.name} and the CPU's attention")
        if load and (rate := bench.page_rate(load)):
            page_rates.append(rate)
        del bench
        torch.cuda.empty_cache()
        steps.begin(f"products of {shape.name}")
        products += dense(shape, dtype, effort)
        steps.begin(f"before and after attention of {shape.name}, beside the same")
        small.append(small_kernels(shape, dtype, effort, load))
        steps.begin(f"attention of prompts of {shape.name}, beside the same")
        prompts.append(prefill(shape, dtype, effort, load))
        steps.begin(f"attention over KV in GPU memory of {shape.name}")
        decoding.append(decode(shape, dtype, effort))
    if page_rates:
        link = replace(link, h2d_beside_attention=fmean(page_rates))
    return GpuProfile(
        memory,
        flops,
        tuple(experts),
        tuple(products),
        tuple(prompts),
        link,
        lanes,
        tuple(small),
        tuple(decoding),
    )


def _on_gpu(memory: Tensor) -> Tensor:
    return device_view(memory, torch.device("cuda", 0))
