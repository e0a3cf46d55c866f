"""Rates with nothing beside them: of copies to the GPU and of reads by the CPU, the roofs of all that moves."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from moe_lightning.bench.timing import median_seconds
from moe_lightning.kernels.cpu_kernels import CpuKernels
from moe_lightning.memory.arena import HostArena
from moe_lightning.units import MIB

READ_BYTES = 256 * MIB


def plain_copy_rate(page_bytes: int, seconds: float = 1.0, *, has_gpu: bool = True) -> float:
    """Bytes/s of page-locked copies of pages to the GPU with nothing beside them.

    Args:
        page_bytes: of each copy.
        seconds: to measure for.
        has_gpu: false where the CPU plays the GPU: then copies are from host memory to host memory.
    """
    if not has_gpu:
        return _host_copy_rate(page_bytes, seconds)
    arena = HostArena((16, page_bytes), torch.uint8)
    arena.prepare(pin=True)
    frames = torch.empty((4, page_bytes), dtype=torch.uint8, device="cuda")
    copied, start = 0, 0.0
    for number in range(10**9):
        if number == 16:
            torch.cuda.synchronize()
            copied, start = 0, time.perf_counter()
        frames[number % 4].copy_(arena.tensor[number % 16], non_blocking=True)
        copied += page_bytes
        if number % 32 == 31:
            torch.cuda.synchronize()
            if number > 32 and time.perf_counter() - start > seconds:
                break
    return copied / (time.perf_counter() - start)


def _host_copy_rate(page_bytes: int, seconds: float) -> float:
    pages, frame = torch.ones((4, page_bytes), dtype=torch.uint8), torch.empty(page_bytes, dtype=torch.uint8)
    start, copied = time.perf_counter(), 0
    while copied == 0 or time.perf_counter() - start < seconds:
        frame.copy_(pages[copied // page_bytes % 4])
        copied += page_bytes
    return copied / (time.perf_counter() - start)


def read_rate(
    kernel: CpuKernels,
    memory: Tensor,
    seconds: float,
    read_bytes: int = READ_BYTES,
    before: Callable[[], object] = lambda: None,
) -> float:
    """Bytes/s of the attention's threads reading memory [bytes] uint8.

    Args:
        kernel: with its threads.
        memory: other parts of it in each turn.
        seconds: of all turns.
        read_bytes: of a turn; less where there is little memory.
        before: called before each turn, outside of its time.
    """
    size = max(1, min(read_bytes, memory.nbytes // 3))
    parts = memory[: memory.nbytes // size * size].view(-1, size)
    return size / median_seconds(lambda turn: kernel.read(parts[turn % len(parts)]), seconds, before)
