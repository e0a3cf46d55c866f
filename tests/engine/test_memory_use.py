"""What the planner counts of memory is what the runtime takes, tensor by tensor and to the byte."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_lightning.engine import build
from moe_lightning.engine.build import build_worker
from moe_lightning.kernels.cpu_kernels import CpuKernels
from moe_lightning.kernels.experts import Workspace
from moe_lightning.models import registry
from moe_lightning.models.hf_config import HFConfig
from moe_lightning.perf.memory import CPU_EXPERTS_AT_ONCE, EXPERTS_AT_ONCE, HEAD_ROWS, memory_use
from moe_lightning.pipeline.task import Lane, Task, TaskKind
from moe_lightning.policy import Policy
from moe_lightning.runtime.micro_batch import DecodeRow, PrefillPiece, Step, build_micro_batches
from moe_lightning.runtime.runner import TaskRunner
from moe_lightning.runtime.sampler import prompt_logprobs, sample
from moe_lightning.runtime.sampling_batch import RowSampling, build_sampling_batch
from moe_lightning.runtime.upload import Uploader

_SIZES = {
    "num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 70, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}  # fmt: skip
FAMILIES = {
    "LlamaForCausalLM": {"tie_word_embeddings": True},
    "MistralForCausalLM": {"sliding_window": 5},
    "MixtralForCausalLM": {"num_local_experts": 5, "num_experts_per_tok": 2},
}
EVERYTHING = RowSampling(
    temperature=0.7, top_k=5, top_p=0.9, min_p=0.01, uniform=0.5, num_logprobs=3, forbidden_ids=(1,)
)
# Pages of an expert, resident shares of the layers, frames, sequences, prompt tokens, blocks, tokens in a block.
POLICIES = [
    (2, (0.5, 0, 1), 12, 8, 64, 20, 16),
    (1, (1, 1, 1), 0, 3, 100, 7, 4),
    (4, (0, 0, 0), 21, 1, 1, 1, 16),
]


def spec_of(architecture, **changes):
    values = {"architectures": [architecture], **_SIZES, **FAMILIES[architecture], **changes}
    return registry.spec_from_config(HFConfig(values, architecture))


def policy_of(spec, values, **changes):
    pages, shares, frames, seqs, prefill, blocks, block_size = values
    per_layer, every = spec.experts.num_experts * pages, changes.get("cpu_every", 0)
    if changes.get("schedule", "cgopipe") == "cgopipe" and every:
        shares = [0 if (layer + 1) % every == 0 else share for layer, share in enumerate(shares)]
    resident = tuple(int(share * per_layer) for share in shares)
    ring = max(frames, per_layer - min(resident))
    return Policy(**{
        "max_num_seqs": seqs, "micro_batch_size": 4, "group_size": 2, "look_ahead": 2, "prefill_tokens": prefill,
        "chunk_tokens": 24, "pages_per_expert": pages, "resident_pages": resident, "num_frames": ring,
        "num_blocks": blocks, "block_size": block_size, **changes,
    })  # fmt: skip


def storages():
    """Each tensor's memory that is alive, by address; views share theirs. Kept, no address comes again."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return {(t.device, t.untyped_storage().data_ptr()): t.untyped_storage() for t in tensors if t.numel()}


def held_beside(before):
    """Bytes of tensors that have come since."""
    return sum(storage.nbytes() for key, storage in storages().items() if key not in before)


def device_parts(worker, has_gpu):
    weights, b = worker._weights, worker._buffers
    layers = [t for layer in weights.layers for t in vars(layer).values() if t is not None]
    head = [] if weights.lm_head is weights.embed else [weights.lm_head]
    pages, place = weights.pages, weights.pages.placement
    rows = (b.hidden, b.qkv, b.attention_out, b.experts_in, b.topk_ids, b.topk_weights, b.router_logits)
    workspace = [] if b.experts is None else [t for t in vars(b.experts).values() if torch.is_tensor(t)]
    return {
        "weights": size(weights.embed, weights.final_norm, *head, *layers),
        "resident": size(*pages.frames[place.num_ring_frames :]),
        "unpacked": size(pages.unpacked.pages) if pages.unpacked else 0,
        "ring": size(*pages.frames[: place.num_ring_frames]),
        "activations": size(*rows),
        "workspace": size(*workspace),
        "tables": size(
            pages._first_table,
            pages.page_table,
            worker._inv_freq,
            *([pages.unpacked.table] if pages.unpacked else []),
        ),
        "uploads": size(worker._uploader._on_device) if has_gpu else 0,
        "staging": size(*b.kv_stage),
        "kv": size(worker._kv.on_device),
    }


def host_parts(worker, has_gpu):
    b, uploads = worker._buffers, 0
    if has_gpu:
        uploads = worker._uploader._host.nbytes + worker._executor._cpu.counter._words.nbytes
    return {
        "experts": size(worker._weights.pages.host),
        "cpu_experts": size(worker._weights.pages.cpu_arena.tensor),
        "kv": size(worker._kv.arena.tensor),
        "rows": size(b.host_qkv, b.host_out, b.host_experts, b.host_topk_ids, b.host_topk_weights),
        "uploads": uploads,
    }


def size(*tensors):
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize(
    ("values", "dtype", "changes"),
    [
        (POLICIES[0], torch.bfloat16, {}), (POLICIES[0], torch.float32, {"schedule": "flexgen"}),
        (POLICIES[1], torch.float16, {}), (POLICIES[2], torch.bfloat16, {}),
        (POLICIES[0], torch.bfloat16, {"packed": True, "expert_parts": 3}),
        (POLICIES[2], torch.bfloat16, {"packed": True}),
        (POLICIES[0], torch.float16, {"kv_every": 2}), (POLICIES[1], torch.bfloat16, {"kv_every": 1}),
        (POLICIES[0], torch.bfloat16, {"kv_every": 2, "schedule": "flexgen"}),
        (POLICIES[0], torch.float32, {"cpu_every": 2}), (POLICIES[2], torch.bfloat16, {"cpu_every": 1}),
        (POLICIES[2], torch.bfloat16, {"cpu_every": 2, "packed": True}),
        (POLICIES[0], torch.bfloat16, {"cpu_every": 2, "schedule": "flexgen"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("architecture", FAMILIES)
def test_each_part_is_what_a_worker_holds_and_there_is_no_other(architecture, dtype, values, changes):
    spec = spec_of(architecture)
    policy = policy_of(spec, values, **changes)
    before = storages()
    worker = build_worker(spec, policy, dtype, torch.device("cpu"), tensors=None, executor="serial")
    held = held_beside(before)
    use = memory_use(spec, dtype.itemsize, policy, has_gpu=False)
    assert device_parts(worker, False) == vars(use.device)
    assert host_parts(worker, False) == vars(use.host)
    assert held == use.device.total + use.host.total


@pytest.mark.parametrize(("cpu_every", "compiles"), [(0, True), (1, False), (2, True)])
def test_kernels_are_compiled_for_pages_that_there_are(cpu_every, compiles, monkeypatch):
    tables = []
    monkeypatch.setattr(
        build.ops, "compile_experts", lambda frames, table, *args, **kwargs: tables.append(table)
    )
    spec, cpu = spec_of("MixtralForCausalLM"), torch.device("cpu")
    policy = policy_of(spec, POLICIES[2], cpu_every=cpu_every)
    build_worker(spec, policy, torch.float32, cpu, tensors=None, executor="serial")
    assert len(tables) == compiles
    assert all(int(table.min()) >= 0 for table in tables)


def test_every_family_is_counted():
    assert FAMILIES.keys() == registry.ARCHITECTURES.keys()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes", [{}, {"packed": True}, {"kv_every": 2}, {"kv_every": 1}, {"cpu_every": 2, "packed": True}]
)
@pytest.mark.parametrize("values", POLICIES[:2])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_on_a_gpu_each_part_is_what_a_worker_holds_and_there_is_no_other(architecture, values, changes):
    spec = spec_of(architecture, hidden_size=128, intermediate_size=256, vocab_size=512)
    policy = policy_of(spec, values, **changes)
    before, device = storages(), torch.device("cuda", 0)
    worker = build_worker(spec, policy, torch.bfloat16, device, tensors=None)
    held = held_beside(before)
    use = memory_use(spec, 2, policy)
    assert device_parts(worker, True) == vars(use.device)
    assert host_parts(worker, True) == vars(use.host)
    # The same memory, seen from the device.
    buffers = worker._buffers
    aliases = [buffers.host_out_on_device, buffers.host_experts_on_device, worker._uploader._mapped]
    mapped = size(*(t for t in aliases if t is not None))
    assert held - mapped == use.device.total + use.host.total


@pytest.mark.parametrize("rows", [1, 700, EXPERTS_AT_ONCE + 5])
@pytest.mark.parametrize("experts", [{}, {"num_local_experts": 40, "num_experts_per_tok": 6}])
def test_the_workspace_is_what_the_experts_kernels_allocate(rows, experts):
    spec = spec_of("MixtralForCausalLM", **experts)
    policy = policy_of(spec, (2, (0, 0, 0), 0, 1, rows - 1, 1, 16))
    e, h = spec.experts, spec.hidden_size
    tokens, cpu = min(rows, EXPERTS_AT_ONCE), torch.device("cpu")
    w = Workspace.allocate(tokens, e.top_k, e.num_experts, h, e.intermediate_size, torch.bfloat16, cpu)
    assert memory_use(spec, 2, policy).device.workspace == size(
        w.rows, w.inter, w.sorted_slots, w.counts, w.blocks
    )


# -- what a pass adds --------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """A micro-batch of which only its rows matter."""

    rows: slice
    host_rows: slice = slice(0, 0)


class Peak(TorchDispatchMode):
    """Most bytes that the results of operations hold at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if not torch.is_tensor(leaf) or leaf.untyped_storage().data_ptr() in given:
                continue
            storage = leaf.untyped_storage()
            key = storage.data_ptr()
            if key and key not in self.alive:
                self.alive[key] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, key, None)
        self.most = max(self.most, sum(self.alive.values()))
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "pages"), [(3, 1), (300, 4), (CPU_EXPERTS_AT_ONCE + 100, 2)])
def test_a_sweep_by_the_cpu_takes_what_is_set_aside(rows, pages, dtype):
    spec = spec_of("MixtralForCausalLM")
    policy = policy_of(spec, (pages, (0, 0, 0), 12, 1, rows - 1, 1, 16), cpu_every=1)
    worker = build_worker(spec, policy, dtype, torch.device("cpu"), tensors=None, executor="serial")
    worker._buffers.host_topk_ids.copy_(torch.randint(5, (rows, 2)))
    kernel = CpuKernels(1)
    runner = TaskRunner(worker._weights, None, worker._buffers, kernel, None, [Rows(slice(0, rows))])
    with Peak() as peak:
        runner.run(Task(TaskKind.CPU_EXPERTS, Lane.CPU, 1, (0,), (), ()))
    assert kernel.experts_bytes == memory_use(spec, dtype.itemsize, policy).cpu_sweep
    assert peak.most == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [16, 300])
def test_sampling_takes_no_more_than_is_set_aside_and_much_of_it(rows, dtype):
    spec = spec_of("MixtralForCausalLM", vocab_size=8000)
    policy = policy_of(spec, (2, (0, 0, 0), 0, rows, 0, 1, 16), micro_batch_size=rows)
    torch.manual_seed(0)
    hidden, head = torch.randn(rows, 48, dtype=dtype), torch.randn(8000, 48, dtype=dtype)
    batch = build_sampling_batch([EVERYTHING] * rows, spec.vocab_size)
    with Peak() as peak:
        sample(torch.nn.functional.linear(hidden, head), batch)
    allowed = memory_use(spec, dtype.itemsize, policy).during_pass.logits
    assert allowed / 2 < peak.most <= allowed
    # Bits of the tokens that forms allow stay in host memory, and come a few rows at a time.
    formed = [replace(EVERYTHING, allowed=np.full(250, -1, dtype=np.int32))] * rows
    batch = build_sampling_batch(formed, spec.vocab_size)
    with Peak() as peak:
        sample(torch.nn.functional.linear(hidden, head), batch)
    assert peak.most <= allowed
    ids = torch.zeros(rows, dtype=torch.int64)
    with Peak() as peak:
        prompt_logprobs(torch.nn.functional.linear(hidden, head), ids, 5)
    assert peak.most <= allowed


@pytest.mark.parametrize("rows", [HEAD_ROWS, 2 * HEAD_ROWS + 76])
def test_of_a_large_micro_batch_some_rows_have_logits_at_a_time(rows):
    spec = spec_of("MixtralForCausalLM", vocab_size=8000)
    policy = policy_of(spec, (2, (0, 0, 0), 12, rows, 0, rows, 16), micro_batch_size=rows)
    worker = build_worker(spec, policy, torch.float32, torch.device("cpu"), tensors=None, executor="serial")
    decode = tuple(DecodeRow(5, 0, [block], EVERYTHING) for block in range(rows))
    batches = build_micro_batches(Step(decode=(decode,)), 16, spec.vocab_size, Uploader(torch.device("cpu")))
    worker._buffers.hidden.normal_()
    runner = TaskRunner(worker._weights, worker._kv, worker._buffers, None, worker._inv_freq, batches)
    with Peak() as peak:
        runner.run(Task(TaskKind.SAMPLE, Lane.GPU, -1, (0,), (), ()))
    assert len(runner.outputs[0].sampled.token_ids) == rows
    allowed = memory_use(spec, 4, policy).during_pass.logits
    assert allowed / 2 < peak.most <= allowed
    assert allowed == memory_use(spec, 4, replace(policy, micro_batch_size=HEAD_ROWS)).during_pass.logits


@pytest.mark.parametrize("kv_every", [0, 3])
def test_small_arrays_and_rotations_take_no_more_than_is_set_aside(kv_every):
    spec = spec_of("MixtralForCausalLM")
    uploaded, own = 0, Uploader(torch.device("cpu"))

    class Counting:
        def put(self, values, dtype):
            nonlocal uploaded
            found = own.put(values, dtype)
            uploaded += -(-found.nbytes // 16) * 16
            return found

    # The most arrays a row can have: prompts of one token, each sampled from.
    sampling = replace(EVERYTHING, forbidden_ids=())
    prompts = tuple(PrefillPiece([3], 0, [block], sampling) for block in range(200))
    # With tables on the device, sequences are long enough for these to be most of what is sent, one more so.
    of_row = 40 if kv_every else 1
    blocks = [list(range(300 + of_row * row, 300 + of_row * (row + 1))) for row in range(200)]
    if kv_every:
        blocks[0] = list(range(10_000, 11_000))
    rows = tuple(DecodeRow(5, 16 * len(each) - 9, each, sampling) for each in blocks)
    step = Step(prefill=(prompts[:24],) * 8, decode=(rows[:100], rows[100:]))
    batches = build_micro_batches(step, 16, spec.vocab_size, Counting(), keeps_kv=kv_every > 0)
    values = (2, (0, 0, 0), 0, 200, 8 * 24, sum(map(len, blocks)), 16)
    policy = policy_of(spec, values, micro_batch_size=100, kv_every=kv_every)
    use = memory_use(spec, 2, policy).during_pass
    # A buffer that is too small, and one of twice its size.
    assert use.arrays / 6 < uploaded <= use.arrays / 3
    assert memory_use(spec, 2, replace(policy, kv_every=0)).during_pass.arrays / 3 < uploaded or not kv_every
    worker = build_worker(spec, policy, torch.bfloat16, torch.device("cpu"), tensors=None, executor="serial")
    runner = TaskRunner(worker._weights, worker._kv, worker._buffers, None, worker._inv_freq, batches)
    with Peak() as peak:
        for j in range(len(batches)):
            runner.run(Task(TaskKind.EMBED, Lane.GPU, -1, (j,), (), ()))
    assert use.rotary / 2 < peak.most <= use.rotary


@pytest.mark.gpu
def test_bits_of_forms_take_no_memory_of_the_gpu_before_they_are_read():
    device, vocab_size, rows = torch.device("cuda", 0), 64_000, 600
    rng = np.random.default_rng(0)
    uploader = Uploader(device)
    before = torch.cuda.memory_allocated()
    for _ in range(2):  # the memory is used again
        uploader.clear()
        bits = [rng.integers(-(2**31), 2**31, vocab_size // 32, dtype=np.int32) for _ in range(rows)]
        formed = [RowSampling(temperature=0, allowed=some) for some in bits]
        parts = [build_sampling_batch(formed[i : i + 50], vocab_size, uploader) for i in range(0, rows, 50)]
        assert torch.cuda.memory_allocated() - before < 2**20
        uploader.send()
        logits = torch.randn(50, vocab_size)
        there = [sample(logits.to(device), part).token_ids.tolist() for part in parts]
        here = [
            sample(logits, build_sampling_batch(formed[i : i + 50], vocab_size)).token_ids.tolist()
            for i in range(0, rows, 50)
        ]
        assert there == here
