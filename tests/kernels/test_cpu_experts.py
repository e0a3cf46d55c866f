"""Experts on the CPU against the plain reference."""

from __future__ import annotations

import pytest
import torch

from moe_lightning.kernels import cpu_experts, reference
from moe_lightning.pipeline.shape import experts_in

HIDDEN, ROWS = 48, 24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def made(tokens, top_k, num_experts, pages_per_expert, dtype):
    g = torch.Generator().manual_seed(tokens)
    pages = torch.randn(num_experts * pages_per_expert, 3 * ROWS * HIDDEN, generator=g) / HIDDEN**0.5
    ids = torch.rand(tokens, num_experts, generator=g).topk(top_k).indices
    weights = torch.rand(tokens, top_k, generator=g)
    return torch.randn(tokens, HIDDEN, generator=g).to(dtype), ids, weights, list(pages.to(dtype))


def expected(x, ids, weights, pages, pages_per_expert):
    doubles = [page.double() for page in pages]
    return reference.experts(x.double(), ids, weights.double(), doubles, pages_per_expert)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pages_per_expert", [1, 3])
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts"), [(0, 2, 4), (1, 2, 4), (2, 1, 1), (5, 8, 9), (33, 2, 4), (70, 3, 20)]
)
def test_they_give_the_reference(tokens, top_k, num_experts, pages_per_expert, dtype, assert_close):
    case = made(tokens, top_k, num_experts, pages_per_expert, dtype)
    found = cpu_experts.experts(*case, pages_per_expert)
    assert found.dtype is dtype
    assert_close(found, expected(*case, pages_per_expert), dtype)


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_read_their_own_pages_alone_and_add_up(parts, assert_close):
    x, ids, weights, pages = made(33, 2, 5, 2, torch.float32)
    total = torch.zeros_like(x)
    for part in range(parts):
        only = experts_in(5, parts, part)
        there = [p if i // 2 in only else torch.full_like(p, float("nan")) for i, p in enumerate(pages)]
        total += cpu_experts.experts(x, ids, weights, there, 2, only)
    assert_close(total, expected(x, ids, weights, pages, 2), torch.float32)


def test_a_token_that_is_sent_to_one_expert_twice_counts_twice(assert_close):
    x, _, weights, pages = made(9, 2, 4, 2, torch.float32)
    ids = torch.full((9, 2), 3)
    assert_close(
        cpu_experts.experts(x, ids, weights, pages, 2), expected(x, ids, weights, pages, 2), torch.float32
    )
