"""Triton: rows of page-locked host memory into GPU memory, read by the kernel itself.

A copy would wait in the hardware's queue of copies, behind pages or, worse, before them: one that waits for the CPU
stops the pages launched after it, whatever its stream.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # words of a program: 8 KiB
_PROGRAMS = 64  # together they ask for half a MiB, more than the link has under way


@triton.jit
def _load_kernel(host_ptr, out_ptr, num_words, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for at in range(start, num_words, step):
        words = at + tl.arange(0, BLOCK)
        inside = words < num_words
        # What the CPU wrote before this kernel began: a kernel begins with nothing in its caches.
        tl.store(out_ptr + words, tl.load(host_ptr + words, mask=inside), mask=inside)


def load_host_rows(host: Tensor, out: Tensor) -> None:
    """Copy `host`, page-locked memory as `memory.mapped.device_view` shows it, to `out`.

    Args:
        host: [N, W], contiguous.
        out: as host.
    """
    assert host.shape == out.shape
    assert host.is_contiguous()
    assert out.is_contiguous()
    if host.numel() == 0:
        return
    words, into = host.view(-1).view(torch.int32), out.view(-1).view(torch.int32)
    programs = min(_PROGRAMS, triton.cdiv(len(words), _BLOCK))
    _load_kernel[(programs,)](words, into, len(words), BLOCK=_BLOCK, num_warps=4)
