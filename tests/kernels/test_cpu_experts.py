"""Experts on the CPU against the plain reference."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from moe_lightning.kernels import cpu_experts, reference
from moe_lightning.kernels.cpu_kernels import EMULATED_ISA, ISA_VARIABLE, CpuKernels, available_isas
from moe_lightning.pipeline.shape import experts_in

HIDDEN, ROWS = 48, 24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = [*available_isas(), EMULATED_ISA]


def made(tokens, top_k, num_experts, pages_per_expert, dtype, hidden=HIDDEN, rows=ROWS):
    g = torch.Generator().manual_seed(tokens)
    pages = torch.randn(num_experts * pages_per_expert, 3 * rows * hidden, generator=g) / hidden**0.5
    ids = torch.rand(tokens, num_experts, generator=g).topk(top_k).indices
    weights = torch.rand(tokens, top_k, generator=g)
    return torch.randn(tokens, hidden, generator=g).to(dtype), ids, weights, list(pages.to(dtype))


@pytest.fixture(scope="module", params=ISAS)
def kernels(request):
    """Of one and of three threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ISA_VARIABLE, request.param)
        found = [CpuKernels(1), CpuKernels(3)]
    assert found[0].isa == request.param
    return found


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


# Rows that end within a group or a block of them, elements within a vector; tokens alone, of a tile, of several.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts", "pages", "hidden", "rows"),
    [
        (1, 2, 4, 1, 48, 24), (2, 2, 2, 2, 96, 33), (7, 1, 1, 1, 64, 32), (8, 1, 1, 2, 64, 96),
        (12, 2, 3, 3, 32, 50),
        (16, 2, 2, 1, 160, 64), (17, 1, 1, 1, 64, 40), (32, 1, 1, 2, 96, 80), (40, 2, 5, 2, 96, 64),
        (33, 4, 4, 1, 100, 36),
    ],
)  # fmt: skip
def test_threads_and_instruction_sets_give_the_reference(
    kernels, tokens, top_k, num_experts, pages, hidden, rows, dtype, assert_close
):
    case = made(tokens, top_k, num_experts, pages, dtype, hidden, rows)
    one, several = torch.empty_like(case[0]), torch.empty_like(case[0])
    kernels[0].experts(one, *case, pages)
    kernels[1].experts(several, *case, pages)
    assert_close(one, expected(*case, pages), dtype)
    assert torch.equal(one, several), "who computes what changes nothing"


@pytest.mark.parametrize("tokens", [3, 20])
def test_outputs_may_take_the_place_of_inputs_and_rows_be_apart(kernels, tokens, assert_close):
    x, ids, weights, pages = made(tokens, 2, 3, 2, torch.bfloat16, 64, 32)
    wanted = expected(x, ids, weights, pages, 2)
    wide = torch.full((tokens, 70), 7.0, dtype=torch.bfloat16)
    wide[:, :64] = x
    kernels[1].experts(wide[:, :64], wide[:, :64], ids, weights, pages, 2)
    assert_close(wide[:, :64], wanted, torch.bfloat16)
    assert (wide[:, 64:] == 7).all()


def test_pages_of_experts_that_nobody_goes_to_are_not_read(kernels):
    x, _, weights, pages = made(9, 2, 4, 2, torch.bfloat16, 64, 32)
    ids = torch.tensor([[0, 3]] * 9)
    there = [page if i // 2 in (0, 3) else torch.full_like(page, math.nan) for i, page in enumerate(pages)]
    found = torch.empty_like(x)
    kernels[0].experts(found, x, ids, weights, there, 2)
    assert torch.isfinite(found.float()).all()


def test_a_gate_far_from_zero_gives_what_it_should(kernels):
    pages = [torch.ones(3 * 32 * 32)]
    for value, wanted in ((100.0, 3200.0**2 * 32), (-100.0, 0.0), (math.nan, math.nan), (math.inf, math.inf)):
        x, out = torch.full((1, 32), value), torch.empty(1, 32)
        kernels[0].experts(out, x, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), pages, 1)
        assert out[0].tolist() == pytest.approx([wanted] * 32, nan_ok=True)


def test_nothing_is_done_for_no_tokens(kernels):
    x, ids, weights, pages = made(0, 2, 4, 1, torch.bfloat16)
    kernels[1].experts(x, x, ids, weights, pages, 1)


@pytest.mark.parametrize("expert", [-1, 4])
def test_a_token_may_not_go_to_an_expert_that_is_not_there(kernels, expert):
    x, ids, weights, pages = made(3, 2, 4, 1, torch.bfloat16)
    ids[2, 1] = expert
    with pytest.raises(ValueError, match=f"token 2 goes to expert {expert}; there are 4"):
        kernels[1].experts(torch.empty_like(x), x, ids, weights, pages, 1)


def strided(tensor):
    """The same values, each row's elements apart."""
    return tensor.repeat_interleave(2, dim=1)[:, ::2]


def apart(tensor):
    """The same values, rows apart."""
    return torch.cat([tensor, tensor], dim=1)[:, : tensor.shape[1]]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("out", lambda x: x[:, :40]), ("out", lambda x: x.float()), ("out", lambda x: x[:1].expand(4, 48)),
        ("out", strided), ("x", lambda x: x.double()), ("x", strided), ("x", lambda x: x[0]),
        ("topk_ids", lambda ids: ids.int()), ("topk_ids", lambda ids: ids[:2]), ("topk_ids", strided),
        ("topk_ids", apart), ("topk_ids", lambda ids: ids[:, 0]),
        ("topk_weights", lambda w: w.double()), ("topk_weights", lambda w: w[:, :1]), ("topk_weights", apart),
        ("pages", lambda pages: pages[:3]), ("pages", lambda pages: [pages[0][:-1], *pages[1:]]),
        ("pages", lambda pages: [*pages[:3], pages[3].float()]), ("pages", lambda pages: [p[:10] for p in pages]),
        ("pages", lambda pages: [*pages[:3], pages[3].repeat(2)[::2]]), ("pages", lambda pages: []),
        ("pages", lambda pages: [*pages[:3], pages[3].to("meta")]), ("pages", lambda pages: [p[:0] for p in pages]),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(kernels, name, change):
    x, ids, weights, pages = made(4, 2, 2, 2, torch.bfloat16)
    given = {"out": torch.empty_like(x), "x": x, "topk_ids": ids, "topk_weights": weights, "pages": pages}
    kernels[0].experts(**given, pages_per_expert=2)
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=f"^{name} "):
        kernels[0].experts(**given, pages_per_expert=2)


@pytest.mark.parametrize("pages_per_expert", [-1, 0, 3])
def test_experts_have_whole_numbers_of_pages(kernels, pages_per_expert):
    x, ids, weights, pages = made(4, 2, 2, 2, torch.bfloat16)
    with pytest.raises(ValueError, match=f"pages are 4, {pages_per_expert} of each expert"):
        kernels[0].experts(torch.empty_like(x), x, ids, weights, pages, pages_per_expert)


def test_memory_that_is_refused_leaves_kernels_that_work():
    """In a process of its own, as its limit is the process's."""
    script = """
import resource, torch
from moe_lightning.kernels.cpu_kernels import CpuKernels
kernel, pages = CpuKernels(1), [torch.ones(3 * 64 * 2048)]
def run(tokens):
    x, ids = torch.ones(tokens, 64), torch.zeros(tokens, 1, dtype=torch.int64)
    kernel.experts(torch.empty_like(x), x, ids, torch.ones(tokens, 1), pages, 1)
run(100)
some = kernel.experts_bytes
pages_now = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages_now * resource.getpagesize() + 2**27, -1))
try:
    run(30_000)
except MemoryError:
    run(100)
    print("works with", kernel.experts_bytes - some)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert found.stdout.startswith("works with"), found.stderr
