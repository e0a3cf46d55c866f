"""Page-locked host memory as the GPU sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_WORDS = {1: "|u1", 2: "<i2", 4: "<i4", 8: "<i8"}  # the interface below has no name for bfloat16


class _Alias:
    def __init__(self, host: Tensor) -> None:
        self._host = host  # keeps the memory alive
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": tuple(host.shape),
            "typestr": _WORDS[host.dtype.itemsize],
            "data": (host.data_ptr(), False),
            "strides": None,
            "version": 3,
        }


def device_view(host: Tensor, device: torch.device) -> Tensor:
    """A CUDA tensor over the same bytes: kernels read and write host memory through the link.

    Under unified addressing, page-locked memory has one address on both sides.

    Args:
        host: contiguous, page-locked.
        device: the GPU.
    """
    view = torch.as_tensor(_Alias(host), device=device).view(host.dtype)
    assert view.data_ptr() == host.data_ptr(), "a copy, not the same memory"
    return view
