"""What is timed on a GPU is what passes do: the same calls on the CPU, their results looked at."""

from __future__ import annotations

import pytest
import torch
from efforts import SHAPE, TINY, OnCpu

from moe_lightning.kernels import ops, reference
from moe_lightning.models.spec import RouterSpec
from moe_lightning.profiling import kv_store, small_kernels
from moe_lightning.profiling.kv_store import BLOCK_SIZE, KvStore
from moe_lightning.profiling.prefill import causal_pairs, prompt_lens
from moe_lightning.profiling.small_kernels import tasks


def test_tasks_are_norm_product_rotation_then_product_norm_router_and_choice(monkeypatch):
    seen = []

    def noted(name):
        true = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, **kw: (seen.append((name, args)), true(*args, **kw))[1])

    for name in ("rms_norm", "rotate_", "route"):
        noted(name)
    before_weight = torch.randn(SHAPE.qkv_size, SHAPE.hidden_size)
    after_weight = torch.randn(SHAPE.hidden_size, SHAPE.q_size)
    ((before, after),) = tasks(SHAPE, [(before_weight, after_weight)], 5)
    before()
    assert [name for name, _ in seen] == ["rms_norm", "rotate_"]
    hidden, qkv = seen[0][1][0], seen[1][1][0]
    assert qkv.shape == (5, SHAPE.qkv_size)
    last_v = reference.rms_norm(hidden, torch.ones(SHAPE.hidden_size), 1e-5) @ before_weight[-1]
    assert torch.allclose(qkv[:, -1], last_v, rtol=1e-3, atol=1e-4), "values are not rotated"
    was = hidden.clone()
    seen.clear()
    after()
    assert [name for name, _ in seen] == ["rms_norm", "route"]
    assert seen[0][1][0] is hidden and not torch.equal(hidden, was), "the residual stream"
    logits, router, ids, choice = seen[1][1]
    assert logits.shape == (5, SHAPE.num_experts) and router == RouterSpec(SHAPE.top_k)
    assert torch.equal(ids, reference.route(logits, router)[0])
    assert choice.sum(dim=1) == pytest.approx(1.0)


def test_a_layers_tasks_have_a_point_for_each_number_of_rows_over_several_layers(monkeypatch):
    timed = []
    seconds = [1.0, 2.0, 3.0, 4.0]
    monkeypatch.setattr(
        small_kernels, "task_seconds", lambda points, load: (timed.extend(points), seconds)[1]
    )
    monkeypatch.setattr(
        small_kernels, "_COLD_BYTES", 3 * 2 * (SHAPE.qkv_size + SHAPE.q_size) * SHAPE.hidden_size
    )
    with OnCpu():
        found = small_kernels.small_kernels(SHAPE, torch.bfloat16, TINY, None)
    assert found.pre_attention.sizes == found.post_attention.sizes == TINY.rows and found.is_whole
    assert [len(works) for works in timed] == [3] * 2 * len(TINY.rows)
    assert found.pre_attention.seconds == (1.0, 2.0) and found.post_attention.seconds == (3.0, 4.0)


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
        assert torch.equal(kv.layers[0, block, 0, :, offset], heads[row, 8:10])
        assert torch.equal(kv.layers[0, block, 1, :, offset], heads[row, 10:12])
    assert kv.num_bytes == 2 * len(qkv) * SHAPE.num_kv_heads * SHAPE.head_dim * 4


def test_stores_go_from_layer_to_layer_and_to_other_blocks_in_each(monkeypatch):
    kv_bytes = 2 * SHAPE.num_kv_heads * BLOCK_SIZE * SHAPE.head_dim * 4
    monkeypatch.setattr(kv_store, "_LAYER_BYTES", 20 * kv_bytes)
    memory, qkv = torch.zeros(50 * kv_bytes, dtype=torch.uint8), torch.randn(3 * BLOCK_SIZE, SHAPE.qkv_size)
    kv = KvStore(memory, qkv, SHAPE.num_heads, SHAPE.num_kv_heads)
    assert kv.layers.shape[:2] == (3, 16)
    for turn in range(5):
        kv.store(turn)
        written = kv.layers.flatten(2).any(dim=2).sum(dim=1).tolist()
        assert written == [3 * (1 + (turn - n) // 3) if turn >= n else 0 for n in range(3)]


def test_less_memory_than_a_chunk_fills_is_written_twice():
    kv_bytes = 2 * SHAPE.num_kv_heads * BLOCK_SIZE * SHAPE.head_dim * 4
    qkv = torch.randn(3 * BLOCK_SIZE, SHAPE.qkv_size)
    kv = KvStore(torch.zeros(2 * kv_bytes, dtype=torch.uint8), qkv, SHAPE.num_heads, SHAPE.num_kv_heads)
    kv.store(1)
    assert kv.layers.count_nonzero() > 0


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
