"""Triton: rows and blocks of page-locked host memory into GPU memory, read by the kernel itself.

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


@triton.jit(do_not_specialize=["num_blocks"])
def _gather_kernel(host_ptr, blocks_ptr, out_ptr, num_blocks, block_words, BLOCK: tl.constexpr):
    pieces = tl.cdiv(block_words, BLOCK)
    for item in range(tl.program_id(0), num_blocks * pieces, tl.num_programs(0)):
        row, words = (item // pieces).to(tl.int64), item % pieces * BLOCK + tl.arange(0, BLOCK)
        block = tl.load(blocks_ptr + row).to(tl.int64)
        inside = words < block_words
        values = tl.load(host_ptr + block * block_words + words, mask=inside)
        tl.store(out_ptr + row * block_words + words, values, mask=inside)


def load_host_blocks(host: Tensor, blocks: Tensor, out: Tensor) -> None:
    """Copy some blocks of `host`, memory as for `load_host_rows`, to `out`, one after the other.

    Few programs do it, as there: they wait for the link, and the GPU computes meanwhile.

    Args:
        host: [num_blocks, ...], contiguous, of any size.
        blocks: [N] int64, which, on the GPU.
        out: [N, ...], contiguous.
    """
    assert host.shape[1:] == out.shape[1:]
    assert len(blocks) == len(out)
    assert host.is_contiguous()
    assert out.is_contiguous()
    if out.numel() == 0:
        return
    words, into = host.flatten(1).view(torch.int32), out.flatten(1).view(torch.int32)
    programs = min(_PROGRAMS, len(out) * triton.cdiv(words.shape[1], _BLOCK))
    _gather_kernel[(programs,)](words, blocks, into, len(out), words.shape[1], BLOCK=_BLOCK, num_warps=4)
