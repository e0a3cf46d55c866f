"""The rate of plain copies to the GPU: the roof of everything that streams."""

from __future__ import annotations

import time

import torch

from moe_lightning.memory.arena import HostArena


def plain_copy_rate(page_bytes: int, seconds: float = 1.0) -> float:
    """Bytes/s of page-locked copies of pages to the GPU with nothing beside them.

    Args:
        page_bytes: of each copy.
        seconds: to measure for.
    """
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
