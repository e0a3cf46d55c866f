"""Every operation of a pass, on the device where its tensors are.

CPU tensors go to `reference` and `cpu_experts`, CUDA tensors to Triton kernels and libraries. These are imported
when the first CUDA tensor comes, so that a machine without a GPU needs no Triton. Results go into buffers that the
caller owns.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_lightning.kernels import cpu_experts, packing, reference
from moe_lightning.kernels.prefill_plan import PrefillPlan
from moe_lightning.models.spec import RouterSpec
from moe_lightning.perf.memory import EXPERTS_AT_ONCE

if TYPE_CHECKING:
    from moe_lightning.kernels.experts import Workspace


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Rows of x [T, H] normalized, times weight [H]; into `out` where it is given."""
    if not x.is_cuda:
        normed = reference.rms_norm(x, weight, eps)
        return normed if out is None else out.copy_(normed)
    from moe_lightning.kernels import norm

    out = torch.empty_like(x) if out is None else out
    norm.rms_norm(x, weight, eps, out)
    return out


def rotate_(qkv: Tensor, cos: Tensor, sin: Tensor, num_rotated_heads: int) -> None:
    """Turn the first heads of rows [T, heads * D] by `reference.rotary`'s cos and sin, in place."""
    if qkv.is_cuda:
        from moe_lightning.kernels import rope

        rope.rotate_(qkv, cos, sin, num_rotated_heads)
        return
    head_dim = cos.shape[-1]
    rotated = qkv[:, : num_rotated_heads * head_dim].view(len(qkv), -1, head_dim)
    rotated.copy_(reference.rotate(rotated, cos, sin))


def route(logits: Tensor, router: RouterSpec, topk_ids: Tensor, topk_weights: Tensor) -> None:
    """Each token's experts of logits [T, E] into topk_ids and topk_weights [T, K]."""
    if logits.is_cuda:
        from moe_lightning.kernels import router as kernel

        kernel.route(logits, router, topk_ids, topk_weights)
        return
    ids, weights = reference.route(logits, router)
    topk_ids.copy_(ids)
    topk_weights.copy_(weights)


def load_host_rows(host: Tensor, out: Tensor) -> None:
    """Rows of page-locked host memory, as the GPU sees it, to `out` on the GPU; both [N, W], contiguous."""
    from moe_lightning.kernels import host_rows

    host_rows.load_host_rows(host, out)


def load_host_blocks(host: Tensor, blocks: Tensor, out: Tensor) -> None:
    """Blocks [N] int64 of host [num_blocks, ...], as `out`'s device sees it, into out [N, ...]."""
    if not out.is_cuda:
        torch.index_select(host, 0, blocks, out=out)
        return
    from moe_lightning.kernels import host_rows

    host_rows.load_host_blocks(host, blocks, out)


def store_kv(kv: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write k and v [T, num_kv_heads, D] into a layer's blocks, as k's device sees them; see `reference`."""
    if not k.is_cuda:
        reference.store_kv(kv, k, v, slots)
        return
    from moe_lightning.kernels import store_kv as kernel

    kernel.store_kv(kv, k, v, slots)


def pack(values: Tensor, out: Tensor) -> None:
    """bfloat16 values into a packed segment; see `packing.pack`, also for what it raises."""
    if not values.is_cuda:
        packing.pack(values, out)
        return
    from moe_lightning.kernels import pack as kernel

    kernel.pack(values, out)


def unpack_pages(packed: Tensor, table: Tensor, first: int, count: int, out: Tensor, num_values: int) -> None:
    """Pages first .. first + count - 1 of a layer, packed by `packing.pack`; page p into row p % rows of `out`.

    Args:
        packed: [num_frames, page_bytes] uint8, the pool, contiguous; a page is three packed segments, see
            `perf.page_size`.
        table: [pages of the layer] int32, frame of each.
        first: page.
        count: pages.
        out: [>= count, 3 * num_values] bfloat16, its rows contiguous.
        num_values: of a segment.
    """
    if not packed.is_cuda:
        packing.unpack_pages(packed, table, first, count, out, num_values)
        return
    from moe_lightning.kernels import unpack

    unpack.unpack_pages(packed, table, first, count, out, num_values)


def experts_workspace(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Workspace | None:
    """What `experts_` needs on the device for calls of up to `num_tokens` tokens; nothing on a CPU."""
    if device.type != "cuda":
        return None
    from moe_lightning.kernels.experts import Workspace

    tokens = min(num_tokens, EXPERTS_AT_ONCE)
    return Workspace.allocate(tokens, top_k, num_experts, hidden_size, intermediate_size, dtype, device)


def compile_experts(
    frames: Tensor,
    page_table: Tensor,
    pages_per_expert: int,
    hidden_size: int,
    top_k: int,
    sweeps: Mapping[int, Iterable[int]],
    num_threads: int = 1,
    stopped: threading.Event | None = None,
) -> None:
    """Compile what `experts_` needs; nothing on a CPU.

    Args:
        frames: as `experts_` is going to be given them; what they hold does not matter.
        page_table: of a layer.
        pages_per_expert: slices of each expert.
        hidden_size: H.
        top_k: experts per token.
        sweeps: tokens of each, by the parts of a layer that sweeps are over.
        num_threads: that compile at once.
        stopped: ends it early when set.
    """
    if not frames.is_cuda:
        return
    from moe_lightning.kernels import experts_ahead

    fitting = {n: sorted({min(count, EXPERTS_AT_ONCE) for count in counts}) for n, counts in sweeps.items()}
    room = max(max(counts) for counts in fitting.values())
    experts_ahead.compile_experts(
        frames, page_table, pages_per_expert, hidden_size, top_k, fitting, room, num_threads,
        stopped or threading.Event(),
    )  # fmt: skip


def experts_(
    hidden: Tensor,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    frames: Tensor,
    page_table: Tensor,
    pages_per_expert: int,
    workspace: Workspace | None,
    only: range | None = None,
) -> None:
    """Add to hidden [T, H] the weighted outputs of each token's experts.

    Args:
        hidden: [T, H].
        x: [T, H].
        topk_ids: [T, K].
        topk_weights: [T, K] float32.
        frames: [num_frames, page_elements], the pool.
        page_table: [E * pages_per_expert] int32, frame of each page of the layer, expert by expert.
        pages_per_expert: slices of each expert.
        workspace: from `experts_workspace`.
        only: some of the experts, whose pages alone are read; None for all.
    """
    if not x.is_cuda:
        pages = [frames[frame] for frame in page_table.tolist()]
        hidden.add_(cpu_experts.experts(x, topk_ids, topk_weights, pages, pages_per_expert, only))
        return
    from moe_lightning.kernels import experts

    assert workspace is not None
    experts.experts_(
        hidden, x, topk_ids, topk_weights, frames, page_table, pages_per_expert, workspace, experts=only
    )


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: PrefillPlan, sliding_window: int | None, out: Tensor
) -> None:
    """Causal attention of a chunk's segments over their prompts, into out [T, num_heads * D].

    Args:
        q: [rows, num_heads, D], the whole pass's rows.
        k: [rows, num_kv_heads, D].
        v: as k.
        plan: of the chunk.
        sliding_window: tokens that a query sees, itself included; None for all.
        out: the chunk's rows.
    """
    if q.is_cuda:
        from moe_lightning.kernels import prefill_attention as kernel

        kernel.prefill_attention(q, k, v, plan, sliding_window, out)
        return
    rows = slice(plan.segments[0].start, plan.segments[-1].end)
    found = reference.prefill_attention(q[rows], k, v, plan.segments, sliding_window)
    out.copy_(found.flatten(1))


def decode_attention(
    q: Tensor,
    kv: Tensor,
    tables: Tensor,
    first: Tensor,
    context_lens: Tensor,
    sliding_window: int | None,
    out: Tensor,
) -> None:
    """Attention of one query per sequence over its blocks, into out [B, num_heads * D].

    `tables` [N] int64 has the blocks of all sequences; those of each begin at `first` [B] int64. See `reference`.
    """
    if q.is_cuda:
        from moe_lightning.kernels import paged_attention as kernel

        kernel.paged_attention(q, kv, tables, first, context_lens, sliding_window, out)
        return
    padded = reference.padded_tables(tables, first, context_lens, kv.shape[3])
    out.copy_(reference.decode_attention(q, kv, padded, context_lens, sliding_window).flatten(1))
