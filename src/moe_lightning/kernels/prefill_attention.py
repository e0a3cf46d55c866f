"""Prefill attention on a GPU: PyTorch's FlashAttention where it serves the card, else another kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lightning.kernels import reference
from moe_lightning.kernels.prefill_plan import PrefillPlan
from moe_lightning.kernels.varlen_attention import varlen_attention

_FLASH_DTYPES = (torch.float16, torch.bfloat16)


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: PrefillPlan, sliding_window: int | None, out: Tensor
) -> None:
    """Causal attention of each segment of the plan over its own prompt.

    Args:
        q: [rows, num_heads, D], views of the pass's fused rows, indexed by the plan's rows.
        k: [rows, num_kv_heads, D].
        v: as k.
        plan: of the chunk.
        sliding_window: tokens that a query sees, itself included; None for all.
        out: [T, num_heads * D], the chunk's rows.
    """
    if not plan.segments:
        return
    first_row = plan.segments[0].start
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        # Triton does not use Turing's tensor cores; PyTorch's scaled_dot_product_attention does.
        found = reference.prefill_attention(
            q[first_row : plan.segments[-1].end], k, v, plan.segments, sliding_window
        )
        out.copy_(found.flatten(1))
        return
    if not has_flash(q):
        varlen_attention(q, k, v, plan.blocks, first_row, sliding_window, out)
        return
    left = None if sliding_window is None else sliding_window - 1
    for run in plan.runs:
        keys = slice(run.first_key, run.rows.stop)
        # Queries are aligned with the last keys, which is what a prompt that goes on needs.
        found = torch.ops.aten._flash_attention_forward(
            q[run.rows], k[keys], v[keys], run.cu_seqlens_q, run.cu_seqlens_k, run.max_q, run.max_k,
            0.0, True, False, window_size_left=left, window_size_right=None if left is None else 0,
        )[0]  # fmt: skip
        out[run.rows.start - first_row : run.rows.stop - first_row].copy_(found.flatten(1))


def has_flash(q: Tensor) -> bool:
    """Whether PyTorch's FlashAttention can take these queries."""
    if q.device.type != "cuda" or q.dtype not in _FLASH_DTYPES:
        return False
    head_dim = q.shape[-1]
    ampere = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return (
        ampere
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.backends.cuda.is_flash_attention_available()
    )
