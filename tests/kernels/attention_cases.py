"""Random inputs of decode attention, and what it must compute from them, in float64 and without blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Case:
    """Sequences with a cache in shuffled blocks, whose last tokens are new and not in the cache yet.

    `keys` and `values` hold each sequence's tokens [length, num_kv_heads, D] in order, the new ones included.
    """

    out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    kv: Tensor
    block_tables: Tensor
    context_lens: Tensor
    query_lens: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What `attend` takes in order; without query_lens."""
        return self.out, self.q, self.k, self.v, self.kv, self.block_tables, self.context_lens


def make_case(
    lengths: Sequence[int],
    queries: Sequence[int] | None = None,
    *,
    num_heads: int = 8,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """A case whose q, k and v are slices of one buffer and whose free slots hold NaN: reading one shows."""
    g = torch.Generator().manual_seed(seed)
    queries = [1] * len(lengths) if queries is None else queries
    num_tokens, heads = sum(queries), num_heads + 2 * num_kv_heads
    qkv = torch.randn(num_tokens, heads * head_dim + 32, generator=g).to(dtype)[:, : heads * head_dim]
    rows = qkv.view(num_tokens, heads, head_dim)
    q, k, v = rows.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    need = [-(-n // block_size) for n in lengths]
    num_blocks = sum(need) + 3
    kv = torch.full((num_blocks, 2, num_kv_heads, block_size, head_dim), math.nan, dtype=dtype)
    order = torch.randperm(num_blocks, generator=g).tolist()
    tables = torch.full((len(lengths), max(need, default=0) + 2), -1)[:, : max(need, default=0) + 1]
    keys, values, row = [], [], 0
    for i, (length, new) in enumerate(zip(lengths, queries, strict=True)):
        mine = [order.pop() for _ in range(need[i])]
        tables[i, : need[i]] = torch.tensor(mine, dtype=torch.int64)
        old = torch.randn(2, length - new, num_kv_heads, head_dim, generator=g).to(dtype)
        positions = torch.arange(length - new)
        kv[tables[i, positions // block_size], :, :, positions % block_size] = old.transpose(0, 1)
        keys.append(torch.cat((old[0], k[row : row + new])))
        values.append(torch.cat((old[1], v[row : row + new])))
        row += new
    out = torch.full((num_tokens, num_heads * head_dim + 16), math.nan, dtype=dtype)[
        :, : num_heads * head_dim
    ]
    return Case(
        out, q, k, v, kv, tables, torch.tensor(lengths, dtype=torch.int64),
        torch.tensor(queries, dtype=torch.int64), keys, values,
    )  # fmt: skip


def expected(
    case: Case,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """What must be in `out` [N, num_heads * D], in float64."""
    num_heads, head_dim = case.q.shape[1:]
    group = num_heads // case.k.shape[1]
    rows: list[Tensor] = []
    for keys, values, new in zip(case.keys, case.values, case.query_lens.tolist(), strict=True):
        wide_keys = keys.double().repeat_interleave(group, dim=1)  # [length, num_heads, D]
        wide_values = values.double().repeat_interleave(group, dim=1)
        for position in range(len(keys) - new, len(keys)):
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            seen = slice(first, position + 1)
            query = case.q[len(rows)].double()
            scores = torch.einsum("hd,lhd->hl", query, wide_keys[seen]) * (scale or head_dim**-0.5)
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            if sinks is not None:
                scores = torch.cat((scores, sinks.double()[:, None]), dim=1)
            weights = scores.softmax(dim=1)[:, : position + 1 - first]
            rows.append(torch.einsum("hl,lhd->hd", weights, wide_values[seen]).flatten())
    return torch.stack(rows) if rows else case.out.double()
