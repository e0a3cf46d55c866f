"""RMSNorm, rotary embedding and router against the reference."""

from __future__ import annotations

import pytest
import torch

from moe_lightning.kernels import reference
from moe_lightning.memory.arena import HostArena
from moe_lightning.memory.mapped import device_view
from moe_lightning.models.spec import RopeSpec, RouterScoring, RouterSpec

pytest.importorskip("triton")
from moe_lightning.kernels import host_rows, norm, rope, store_kv
from moe_lightning.kernels import router as router_kernel

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy beneath the interpreter, in masked rows


@pytest.mark.parametrize(("rows", "size"), [(0, 64), (1, 64), (5, 100), (3, 2049)])
def test_rms_norm_rounds_as_the_reference(device, dtype, rows, size, assert_close):
    x, weight = torch.randn(rows, size + 7).to(dtype)[:, :size], torch.rand(size).to(dtype)
    out = torch.full((rows, size), float("nan"), dtype=dtype, device=device)
    on_device = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device).copy_(x)
    norm.rms_norm(on_device, weight.to(device), 1e-5, out)
    expected = reference.rms_norm(x, weight, 1e-5)
    assert_close(out, expected, dtype)
    # The sum's order may move the scale by a bit; hardly any element may round to another number for it.
    if rows and _rounds_to_nearest(device, dtype):
        assert (out.cpu() == expected).float().mean() > 0.98


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "head_dim"), [(0, 4, 2, 16), (1, 3, 1, 8), (7, 33, 4, 80)]
)
def test_rotation_turns_queries_and_keys_in_place_and_leaves_values(
    device, dtype, rows, heads, kv_heads, head_dim
):
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim).to(dtype)
    inv_freq = reference.inverse_frequencies(RopeSpec(), head_dim)
    cos, sin = reference.rotary(torch.arange(rows) * 1000, inv_freq, dtype)
    expected = qkv.clone()
    turned = expected[:, : (heads + kv_heads) * head_dim].view(rows, heads + kv_heads, head_dim)
    turned.copy_(reference.rotate(turned, cos, sin))
    out = qkv.to(device)
    rope.rotate_(out, cos.to(device), sin.to(device), heads + kv_heads)
    values = turned.shape[1] * head_dim
    assert torch.equal(out.cpu()[:, values:], qkv[:, values:])
    # Off by what the reference rounds its products by, and by one rounding more where bfloat16 is cut off.
    ulp = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    size = turned.float().norm() / max(turned.numel(), 1) ** 0.5
    torch.testing.assert_close(out.cpu(), expected, rtol=4 * ulp, atol=4 * ulp * float(size) if rows else 0.0)


@pytest.mark.parametrize(("rows", "width"), [(0, 64), (1, 2), (3, 66), (700, 1024)])
def test_rows_of_host_memory_arrive_whole_and_nothing_else_is_written(device, dtype, rows, width):
    arena = HostArena((1, max(rows, 1), width), dtype)
    arena.prepare(pin=device.type == "cuda")
    host = arena.tensor[0][:rows]
    seen = host if device.type == "cpu" else device_view(arena.tensor[0], device)[:rows]
    out = torch.full((rows + 2, width), 7.0, dtype=dtype, device=device)
    for _ in range(2):  # what a cache kept of the first time would be wrong
        host.copy_(torch.randn(rows, width))
        host_rows.load_host_rows(seen, out[1 : rows + 1])
        assert torch.equal(out[1 : rows + 1].cpu(), host)
    assert out[0].eq(7).all()
    assert out[-1].eq(7).all()


@pytest.mark.parametrize(("count", "words"), [(0, 2), (1, 2), (40, 2048), (70, 2049), (3, 5000)])
def test_blocks_of_host_memory_are_gathered_in_order_and_nothing_else_is_written(device, count, words):
    arena = HostArena((80, 2 * words), torch.float16)
    arena.prepare(pin=device.type == "cuda")
    arena.tensor.copy_(torch.randn(arena.tensor.shape))
    seen = arena.tensor if device.type == "cpu" else device_view(arena.tensor, device)
    chosen = torch.randperm(80)[:count]
    out = torch.full((count + 2, 2 * words), 7.0, dtype=torch.float16, device=device)
    host_rows.load_host_blocks(seen, chosen.to(device), out[1 : count + 1])
    assert torch.equal(out[1 : count + 1].cpu(), arena.tensor[chosen])
    assert out[0].eq(7).all()
    assert out[-1].eq(7).all()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("rows", "num_experts", "top_k"), [(0, 8, 2), (1, 8, 2), (9, 60, 4), (6, 256, 8)])
@pytest.mark.parametrize("scoring", RouterScoring)
def test_router_chooses_as_the_reference(
    device, dtype, scoring, normalize, ids_dtype, rows, num_experts, top_k
):
    router = RouterSpec(top_k, scoring, normalize)
    logits = torch.randn(rows, num_experts).to(dtype)
    ids, weights = _route(logits, router, device, ids_dtype)
    expected_ids, expected_weights = reference.route(logits, router)
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("where", ["kernel", "reference"])
def test_of_equal_logits_the_lowest_ids_are_chosen(device, where):
    router = RouterSpec(top_k=3)
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, 2.0], [0.0] * 5])
    choose = _route if where == "kernel" else lambda x, spec, *_: reference.route(x.to(device), spec)
    assert choose(logits, router, device, torch.int64)[0].tolist() == [[1, 4, 0], [0, 1, 2]]


def test_logits_that_are_not_numbers_still_give_experts_that_exist(device):
    ids, _ = _route(torch.full((3, 6), float("nan")), RouterSpec(top_k=2), device, torch.int64)
    assert ((ids >= 0) & (ids < 6)).all()


def _rounds_to_nearest(device, dtype):
    """Whether results of a 16-bit dtype can be expected bit by bit: the interpreter cuts bfloat16 off."""
    return dtype is torch.float16 or (dtype is torch.bfloat16 and device.type == "cuda")


def _route(logits, router, device, ids_dtype):
    shape = (len(logits), router.top_k)
    ids = torch.full(shape, -1, dtype=ids_dtype, device=device)
    weights = torch.full(shape, float("nan"), device=device)
    router_kernel.route(logits.to(device), router, ids, weights)
    return ids.cpu(), weights.cpu()


@pytest.mark.parametrize(
    ("tokens", "kv_heads", "head_dim"), [(0, 2, 16), (1, 1, 80), (37, 3, 24), (300, 8, 128)]
)
def test_keys_and_values_come_to_their_slots_and_nothing_else_is_written(
    device, dtype, tokens, kv_heads, head_dim
):
    """Into host memory, from rows of a wider projection, to slots in any order."""
    block = (2, kv_heads, 16, head_dim)
    arena = HostArena((1, 40, *block), dtype)
    arena.prepare(pin=device.type == "cuda")
    blocks = arena.tensor[0]
    expected = blocks.copy_(torch.randn(blocks.shape)).clone()
    qkv = torch.randn(tokens, (2 + 2 * kv_heads) * head_dim).to(dtype)
    slots = torch.randperm(40 * 16)[:tokens]
    _, k, v = qkv.view(tokens, 2 + 2 * kv_heads, head_dim).split((2, kv_heads, kv_heads), dim=1)
    reference.store_kv(expected, k, v, slots)
    _, k, v = qkv.to(device).view(tokens, 2 + 2 * kv_heads, head_dim).split((2, kv_heads, kv_heads), dim=1)
    store_kv.store_kv(
        device_view(blocks, device) if device.type == "cuda" else blocks, k, v, slots.to(device)
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(blocks, expected)
