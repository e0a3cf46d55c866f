"""What is timed on a GPU is what passes do: the same calls on the CPU, their results looked at."""

from __future__ import annotations

import pytest
import torch
from efforts import SHAPE

from moe_lightning.kernels import ops, reference
from moe_lightning.models.spec import RouterSpec
from moe_lightning.profiling import small_kernels
from moe_lightning.profiling.kv_store import BLOCK_SIZE, KvStore
from moe_lightning.profiling.prefill import causal_pairs, prompt_lens
from moe_lightning.profiling.small_kernels import calls

CPU = torch.device("cpu")


def test_the_kernels_beside_products_are_norm_and_rotation_then_norm_router_and_choice(monkeypatch):
    seen = []

    def noted(name):
        true = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, **kw: (seen.append((name, args)), true(*args, **kw))[1])

    for name in ("rms_norm", "rotate_", "route"):
        noted(name)
    before, after = calls(SHAPE, torch.float32, 5, CPU)
    before()
    assert [name for name, _ in seen] == ["rms_norm", "rotate_"]
    assert seen[1][1][0].shape == (5, SHAPE.qkv_size)
    seen.clear()
    after()
    assert [name for name, _ in seen] == ["rms_norm", "route"]
    logits, router, ids, weights = seen[1][1]
    assert logits.shape == (5, SHAPE.num_experts) and router == RouterSpec(SHAPE.top_k)
    assert torch.equal(ids, reference.route(logits, router)[0])
    assert weights.sum(dim=1) == pytest.approx(1.0)


def test_small_kernels_have_a_point_for_each_number_of_rows(monkeypatch):
    from efforts import TINY

    timed = []
    monkeypatch.setattr(small_kernels, "queued_seconds", lambda work, budget: (timed.append(work), 1e-5)[1])
    monkeypatch.setattr(small_kernels.torch, "device", lambda _: CPU)
    found = small_kernels.small_kernels(SHAPE, torch.float32, TINY)
    assert found.pre_attention.sizes == found.post_attention.sizes == TINY.rows
    assert len(timed) == 2 * len(TINY.rows)


@pytest.mark.parametrize("num_blocks", [3, 40])
def test_a_chunks_keys_and_values_go_to_blocks_of_their_own(num_blocks):
    kv_bytes = 2 * SHAPE.num_kv_heads * BLOCK_SIZE * SHAPE.head_dim * 4
    memory = torch.zeros(num_blocks * kv_bytes + 5, dtype=torch.uint8)
    qkv = torch.randn(3 * BLOCK_SIZE, SHAPE.qkv_size)
    kv = KvStore(memory[:-5], qkv, SHAPE.num_heads, SHAPE.num_kv_heads)
    kv.store(0)
    heads = qkv.view(len(qkv), -1, SHAPE.head_dim)
    places = kv.slots[0].tolist()
    assert len(set(places)) == len(qkv)
    for row, place in enumerate(places):
        block, offset = divmod(place, BLOCK_SIZE)
        assert torch.equal(kv.kv[block, 0, :, offset], heads[row, 8:10])
        assert torch.equal(kv.kv[block, 1, :, offset], heads[row, 10:12])
    assert kv.num_bytes == 2 * len(qkv) * SHAPE.num_kv_heads * SHAPE.head_dim * 4


def test_less_memory_than_a_chunk_fills_is_written_twice():
    kv_bytes = 2 * SHAPE.num_kv_heads * BLOCK_SIZE * SHAPE.head_dim * 4
    qkv = torch.randn(3 * BLOCK_SIZE, SHAPE.qkv_size)
    kv = KvStore(torch.zeros(2 * kv_bytes, dtype=torch.uint8), qkv, SHAPE.num_heads, SHAPE.num_kv_heads)
    kv.store(1)
    assert kv.kv.count_nonzero() > 0


@pytest.mark.parametrize("mean", [64, 172, 256, 1024])
def test_prompts_of_a_chunk_are_unequal_and_a_token_is_in_one_of_the_mean_length(mean):
    lengths = prompt_lens(mean)
    total = sum(lengths)
    assert 0.9 * 2048 < total < 1.3 * 2048
    assert sum(n * n for n in lengths) / total == pytest.approx(mean, rel=0.01)
    assert max(lengths) > mean > 1.5 * min(lengths)
    assert 2 * causal_pairs(lengths) == sum(n * n + n for n in lengths)


@pytest.mark.parametrize("mean", [2000, 4096])
def test_a_long_prompt_is_a_chunk_of_its_own(mean):
    assert prompt_lens(mean) == [mean]
