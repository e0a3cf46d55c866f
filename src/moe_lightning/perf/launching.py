"""What one thread takes to launch all tasks of a pass: where tasks are short, no pass takes less."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from moe_lightning.pipeline.task import PassShape, TaskKind

# Seconds of a task, in Python for the most part: the least of 22 passes of an H100's host, of which each has up to
# thousands of a kind, with timers around each launch (`benchmarks/results/launching_h100.json`).
_LAUNCH_S: Mapping[TaskKind, float] = MappingProxyType({
    TaskKind.EMBED: 180e-6, TaskKind.PRE_ATTENTION: 155e-6, TaskKind.OFFLOAD_QKV: 45e-6, TaskKind.ATTENTION: 3.5e-6,
    TaskKind.LOAD_HIDDEN: 95e-6, TaskKind.PREFILL_ATTENTION: 225e-6, TaskKind.STORE_KV: 125e-6,
    TaskKind.RESIDENT_ATTENTION: 150e-6, TaskKind.KEEP_KV: 95e-6, TaskKind.POST_ATTENTION: 200e-6,
    TaskKind.LOAD_PAGE: 16e-6, TaskKind.EXPERTS: 560e-6, TaskKind.SAMPLE: 455e-6,
    # Nobody has timed the CPU's experts: as attention and its copies.
    TaskKind.OFFLOAD_INPUTS: 45e-6, TaskKind.CPU_EXPERTS: 3.5e-6, TaskKind.ADD_OUTPUTS: 95e-6,
})  # fmt: skip
KERNEL_S = 8e-6  # what that machine's profile has for one more kernel of a task


def launch_seconds(shape: PassShape) -> float:
    """Seconds of all tasks of a pass in CGOPipe's schedule, on a machine that launches a kernel in `KERNEL_S`."""
    keeping, on_cpu, layers = shape.num_keeping_kv, shape.num_on_cpu, shape.num_layers
    chunks, decode, both = shape.num_prefill, shape.num_decode, shape.num_micro_batches
    groups = len(shape.groups)
    counts = {
        TaskKind.EMBED: both,
        TaskKind.SAMPLE: both,
        TaskKind.PRE_ATTENTION: layers * both,
        TaskKind.POST_ATTENTION: layers * both,
        TaskKind.PREFILL_ATTENTION: layers * chunks,
        TaskKind.KEEP_KV: keeping * chunks,
        TaskKind.RESIDENT_ATTENTION: keeping * decode,
        TaskKind.STORE_KV: (layers - keeping) * chunks,
        TaskKind.OFFLOAD_QKV: (layers - keeping) * decode,
        TaskKind.ATTENTION: (layers - keeping) * decode,
        TaskKind.LOAD_HIDDEN: (layers - keeping) * decode,
        TaskKind.EXPERTS: (layers - on_cpu) * groups * shape.num_parts,
        TaskKind.OFFLOAD_INPUTS: on_cpu * groups,
        TaskKind.CPU_EXPERTS: on_cpu * groups,
        TaskKind.ADD_OUTPUTS: on_cpu * groups,
        TaskKind.LOAD_PAGE: sum(shape.streamed_pages),
    }
    return sum(count * _LAUNCH_S[kind] for kind, count in counts.items())
