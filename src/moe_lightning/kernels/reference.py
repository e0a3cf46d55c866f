"""Every operation in plain PyTorch: the definition of correct, and the CPU path.

Shapes: T tokens, H hidden size, D head dimension, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moe_lightning.models.spec import RopeScaling, RopeSpec, RouterSpec


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rows of x [T, H] scaled to unit root mean square in float32, times weight [H]."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Rotation per position of each pair of components: [D / 2] float32.

    Source: "Effective Long-Context Scaling" as in Llama 3.1's reference for the llama3 scaling.
    """
    freqs = rope.theta ** -(torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.scaling is RopeScaling.LINEAR:
        return freqs / rope.factor
    if rope.scaling is RopeScaling.LLAMA3:
        turns = rope.original_max_position * freqs / (2 * math.pi)  # over the original context
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = blend.clamp(0, 1)
        return (1 - blend) * freqs / rope.factor + blend * freqs
    return freqs


def rotary(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, 1, D] of each position's rotation; the halves of D are alike."""
    angles = positions.float()[:, None] * inv_freq[None, :]
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads of x [T, heads, D] turned by its position; component i pairs with i + D / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def route(router_logits: Tensor, router: RouterSpec) -> tuple[Tensor, Tensor]:
    """Each token's experts: topk_ids [T, K] int64 and topk_weights [T, K] float32.

    They are ranked by logit, of equal ones the lower id first. Likelihoods would rank them alike, but for ties that
    rounding makes, and those differ between devices.
    """
    ids = router_logits.sort(dim=-1, descending=True, stable=True).indices[:, : router.top_k]
    weights = router_logits.float().softmax(dim=-1).gather(-1, ids)
    if router.normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return ids, weights


def experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    pages: Sequence[Tensor],
    pages_per_expert: int,
    only: range | None = None,
) -> Tensor:
    """Sum over each token's experts of weight * down(silu(gate x) * up x).

    Args:
        x: [T, H].
        topk_ids: [T, K].
        topk_weights: [T, K].
        pages: of one layer, expert by expert: [3 * rows * H] each, as `memory.layout` lays them out.
        pages_per_expert: slices of each expert.
        only: some of the experts; None for all.

    Returns:
        [T, H] in x's dtype. Tokens are grouped by expert, so that each page is read once.
    """
    num_tokens, k = topk_ids.shape
    num_experts = len(pages) // pages_per_expert
    order = topk_ids.flatten().argsort(stable=True)
    counts = topk_ids.flatten().bincount(minlength=num_experts).tolist()
    grouped = x[order // k]
    outputs = torch.zeros_like(grouped)
    start = 0
    for expert, count in enumerate(counts):
        if only is not None and expert not in only:
            start += count
        elif count:
            rows = slice(start, start + count)
            mine = pages[expert * pages_per_expert : (expert + 1) * pages_per_expert]
            outputs[rows] = _expert(grouped[rows], mine)
            start += count
    unsorted = torch.empty_like(outputs)
    unsorted[order] = outputs
    weighted = unsorted.view(num_tokens, k, x.shape[1]) * topk_weights.to(x.dtype)[..., None]
    return weighted.sum(dim=1)


def _expert(x: Tensor, pages: Sequence[Tensor]) -> Tensor:
    hidden_size, total = x.shape[1], None
    rows = pages[0].numel() // (3 * hidden_size)
    for page in pages:
        gate_up = page[: 2 * rows * hidden_size].view(2 * rows, hidden_size)
        down = page[2 * rows * hidden_size :].view(hidden_size, rows)
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        part = F.linear(F.silu(gate) * up, down)
        total = part if total is None else total + part
    assert total is not None
    return total


class Segment(NamedTuple):
    """Consecutive tokens of one prompt within a chunk.

    Rows [start, end) are theirs; the prompt's earlier tokens, if any, are the rows from `first` on.
    """

    first: int
    start: int
    end: int


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], sliding_window: int | None
) -> Tensor:
    """Causal attention of each segment over its own prompt.

    Args:
        q: [T, num_heads, D]; row 0 is the first segment's `start`.
        k: [rows, num_kv_heads, D], indexed by the segments' rows.
        v: as k.
        segments: in row order, without gaps.
        sliding_window: tokens that a query sees, itself included; None for all.

    Returns:
        [T, num_heads, D].
    """
    out = torch.empty_like(q)
    base = segments[0].start
    for first, start, end in segments:
        rows = slice(start - base, end - base)
        queries, keys, values = (
            q[rows].transpose(0, 1),
            k[first:end].transpose(0, 1),
            v[first:end].transpose(0, 1),
        )
        if first == start and (sliding_window is None or end - start <= sliding_window):
            attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        else:
            mask = _causal_mask(start - first, end - first, sliding_window, q.device)
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        out[rows] = attended.transpose(0, 1)
    return out


def _causal_mask(start: int, end: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """[end - start, end]: which of the keys 0 .. end - 1 the queries start .. end - 1 see."""
    queries = torch.arange(start, end, device=device)[:, None]
    keys = torch.arange(end, device=device)[None, :]
    mask = keys <= queries
    return mask if sliding_window is None else mask & (keys > queries - sliding_window)


def store_kv(kv: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write k and v [T, num_kv_heads, D] into a layer's blocks at slots [T] (block * block_size + offset).

    Args:
        kv: [num_blocks, 2, num_kv_heads, block_size, D].
        k: keys.
        v: values.
        slots: int64.
    """
    block_size = kv.shape[3]
    blocks, offsets = slots // block_size, slots % block_size
    kv[blocks, 0, :, offsets] = k
    kv[blocks, 1, :, offsets] = v


def decode_attention(
    q: Tensor, kv: Tensor, block_tables: Tensor, context_lens: Tensor, sliding_window: int | None
) -> Tensor:
    """Attention of one query per sequence over its cached keys and values, the new token's included.

    Args:
        q: [B, num_heads, D].
        kv: [num_blocks, 2, num_kv_heads, block_size, D], a layer's blocks.
        block_tables: [B, max_blocks] int64, on the device of the blocks.
        context_lens: [B] int64, at least 1, on the same device.
        sliding_window: tokens that a query sees, itself included; None for all.

    Returns:
        [B, num_heads, D].
    """
    out = torch.empty_like(q)
    for rows in _alike(context_lens):
        length = int(context_lens[rows].max())
        keys, values = _gather(kv, block_tables[rows], length)
        positions = torch.arange(length, device=kv.device)[None, :]
        last = context_lens[rows][:, None]
        mask = positions < last
        if sliding_window is not None:
            mask &= positions >= last - sliding_window
        num_kv_heads = kv.shape[2]
        # What freed blocks hold may be no number, and 0 times that is none either.
        unseen = ~mask[:, None, :, None]
        keys.masked_fill_(unseen, 0)
        values.masked_fill_(unseen, 0)
        queries = q[rows].view(len(rows), num_kv_heads, -1, q.shape[-1])  # a KV head's queries side by side
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None, :])
        out[rows] = attended.reshape(len(rows), *q.shape[1:])
    return out


def padded_tables(tables: Tensor, first: Tensor, context_lens: Tensor, block_size: int) -> Tensor:
    """Tables [N] that begin at `first` [B] as [B, max_blocks], each row filled up with anything."""
    most = -(-int(context_lens.max()) // block_size)
    places = first[:, None] + torch.arange(most, device=first.device)
    return tables[places.clamp_(max=len(tables) - 1)]


def _alike(context_lens: Tensor) -> list[Tensor]:
    """Sequences grouped so that padding to the longest of a group adds a quarter at most."""
    order = context_lens.argsort(descending=True, stable=True)
    groups, start = [], 0
    lengths = context_lens[order].tolist()
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or lengths[end] * 5 < lengths[start] * 4 - 64:
            groups.append(order[start:end])
            start = end
    return groups


def _gather(kv: Tensor, block_tables: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, num_kv_heads, length, D] of sequences, in one copy each."""
    num_kv_heads, block_size, head_dim = kv.shape[2:]
    positions = torch.arange(length, device=kv.device)
    blocks = block_tables[:, positions // block_size]  # [B, length]
    heads = torch.arange(num_kv_heads, device=kv.device)
    # Rows of the layer seen as [num_blocks * 2 * num_kv_heads * block_size, D].
    row = ((blocks * 2)[:, None, :] * num_kv_heads + heads[None, :, None]) * block_size
    row = (row + (positions % block_size)[None, None, :]).flatten()
    flat = kv.reshape(-1, head_dim)
    shape = (len(block_tables), num_kv_heads, length, head_dim)
    keys = flat.index_select(0, row).view(shape)
    values = flat.index_select(0, row + num_kv_heads * block_size).view(shape)
    return keys, values
