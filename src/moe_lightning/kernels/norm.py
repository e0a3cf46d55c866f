"""Triton: RMSNorm."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, x_stride, out_stride, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < size
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    # Rounded before and after the weight, as the reference does.
    tl.store(out_ptr + row * out_stride + cols, (x.to(dtype).to(tl.float32) * weight).to(dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """Rows of x [T, H] scaled to unit root mean square in float32, times weight [H], into out [T, H].

    `out` may be x itself; rows are contiguous, but may lie apart.
    """
    num_rows, size = x.shape
    if num_rows == 0:
        return
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(num_rows,)](
        x,
        weight,
        out,
        x.stride(0),
        out.stride(0),
        size,
        eps,
        BLOCK=block,
        num_warps=min(8, max(1, block // 512)),
    )
