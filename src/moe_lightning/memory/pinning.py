"""Calls of the system and the driver that bring host memory in and page-lock it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import platform

import torch
from torch import Tensor

_MADV_POPULATE_WRITE = 23  # Linux 5.14
_MBIND = {"x86_64": 237, "aarch64": 235}  # the system call's number; the C library has no function for it
_MPOL_PREFERRED = 1
_libc = ctypes.CDLL(None)  # its calls let other Python threads run; those of `mmap` do not


def fault_in(rows: Tensor) -> None:
    """Give memory to a contiguous tensor now; what is in it stays.

    Kernels that cannot do this are no error: memory then comes with the first write, or with the lock.
    """
    end = rows.data_ptr() + rows.nbytes
    start = rows.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_POPULATE_WRITE)


def prefer_node(rows: Tensor, node: int) -> None:
    """Let memory that a contiguous tensor has not got yet come from a node, as long as there is some.

    Systems that cannot do this are no error: memory then comes from wherever the touching thread runs.
    """
    number = _MBIND.get(platform.machine())
    if number is None:
        return
    start = rows.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    mask = (ctypes.c_ulong * 16)()  # 1,024 nodes
    mask[node // 64] = 1 << node % 64
    _libc.syscall(
        ctypes.c_long(number), ctypes.c_void_p(start), ctypes.c_ulong(rows.data_ptr() + rows.nbytes - start),
        _MPOL_PREFERRED, mask, ctypes.c_ulong(16 * 64), 0,
    )  # fmt: skip


def lock(rows: Tensor) -> str | None:
    """Page-lock a contiguous tensor for the GPU; why the driver refuses, or None."""
    try:
        code = int(torch.cuda.cudart().cudaHostRegister(rows.data_ptr(), rows.nbytes, 0))
    except (RuntimeError, AssertionError) as error:  # no driver, or no CUDA in this torch
        return str(error).splitlines()[0]
    return f"cudaHostRegister returns error {code}" if code else None


def unlock(addresses: list[int]) -> None:
    """Undo `lock` for tensors that began there, once no copy is under way; the list is empty afterwards."""
    if addresses:
        with contextlib.suppress(RuntimeError):  # a GPU that has failed copies no more
            torch.cuda.synchronize()
    while addresses:
        torch.cuda.cudart().cudaHostUnregister(addresses.pop())
