"""Experts where the CPU does all the work: each page is read once, as the larger factor of its products.

As the smaller factor a library packs it first, which costs as much as reading it again: that is for many tokens.
Products have whole tiles of columns: libraries are slower between those sizes, and compile code for each new one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

TILE = 16  # rows that an expert's are a multiple of, but for a single one


def experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    pages: Sequence[Tensor],
    pages_per_expert: int,
    only: range | None = None,
) -> Tensor:
    """Sum over each token's experts of weight * down(silu(gate x) * up x); arguments are those of `reference`.

    Returns:
        [T, H] in x's dtype; a token's experts are summed in float32.
    """
    k, num_experts = topk_ids.shape[1], len(pages) // pages_per_expert
    order = topk_ids.flatten().argsort(stable=True)
    counts = topk_ids.flatten().bincount(minlength=num_experts).tolist()
    weights, out = topk_weights.flatten(), torch.zeros(x.shape, dtype=torch.float32)
    start = 0
    for expert, count in enumerate(counts):
        slots = order[start : start + count]
        start += count
        if count and (only is None or expert in only):
            mine = pages[expert * pages_per_expert : (expert + 1) * pages_per_expert]
            rows = slots // k
            out.index_add_(0, rows, _of_rows(x, rows, mine).float().mul_(weights[slots, None]))
    return out.to(x.dtype)


def _of_rows(x: Tensor, rows: Tensor, pages: Sequence[Tensor]) -> Tensor:
    """One expert's outputs [n, H] of n rows of x [T, H]."""
    count = len(rows)
    mine = x.new_zeros(count if count == 1 else -(-count // TILE) * TILE, x.shape[1])
    torch.index_select(x, 0, rows, out=mine[:count])
    return _expert(mine.t(), pages).t()[:count]


def _expert(x: Tensor, pages: Sequence[Tensor]) -> Tensor:
    """One expert's outputs [H, n] of its tokens [H, n]."""
    hidden_size, total = len(x), None
    segment = pages[0].numel() // 3
    for page in pages:
        gate, up = _product(page[: 2 * segment].view(-1, hidden_size), x).chunk(2)
        part = _product(page[2 * segment :].view(hidden_size, -1), F.silu(gate).mul_(up))
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _product(weights: Tensor, x: Tensor) -> Tensor:
    """[N, n] of weights [N, K] and x [K, n]; of one column as a vector, which libraries are better at."""
    return F.linear(x.t(), weights).t() if x.shape[1] == 1 else torch.mm(weights, x)
