"""The rate of plain copies to the GPU: the roof of everything that streams."""

from __future__ import annotations

import time

import torch

from moe_lightning.memory.arena import HostArena


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
