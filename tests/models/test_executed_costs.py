"""What `perf.cost` counts for a task is what the task does, for every family and kind of task.

FLOPs are PyTorch's own count of the operations that run. Of attention it sees nothing in C++, and masked products
elsewhere; so attention is counted over `Seen.attend`, each token against the keys that it sees and no others, and
what that gives must be the task's result. Likewise of experts in C++, over those that PyTorch computes. Bytes are
those of the tensors that a task reads, writes and copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from checkpoints import tiny_policy
from moe_lightning.engine.build import build_worker
from moe_lightning.kernels import cpu_experts
from moe_lightning.models.hf_config import HFConfig
from moe_lightning.models.registry import ARCHITECTURES, spec_from_config
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.cost import Cost, PassWork, task_cost
from moe_lightning.pipeline.task import BufferKind, Lane, Task, TaskKind
from moe_lightning.runtime.micro_batch import DecodeRow, PrefillPiece, Step
from moe_lightning.runtime.runner import TaskRunner
from moe_lightning.runtime.sampling_batch import RowSampling

_SIZES = {
    "num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 70, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 5},
    "MixtralForCausalLM": {"num_local_experts": 5, "num_experts_per_tok": 2},
}
PAGES = 2
ROW = RowSampling(temperature=0.0)
# Two prompts, of 6 tokens and of 7 in two chunks, and five sequences that decode.
STEP = Step(
    prefill=(
        (PrefillPiece(range(3, 9), 0, [0, 1], ROW), PrefillPiece(range(9, 12), 0, [2, 3])),
        (PrefillPiece(range(12, 16), 3, [2, 3], ROW),),
    ),
    decode=(
        (DecodeRow(5, 4, [4, 5], ROW), DecodeRow(6, 9, [6, 7, 8], ROW), DecodeRow(7, 12, [9, 10, 11, 12], ROW)),
        (DecodeRow(8, 0, [13], ROW), DecodeRow(9, 20, [14, 15, 16, 17, 18, 19], ROW)),
    ),
)  # fmt: skip
POSITIONS = ((*range(6), *range(3)), (3, 4, 5, 6), (4, 9, 12), (0, 20))
SAMPLED = (1, 1, 3, 2)
ATTENTION = (
    TaskKind.ATTENTION, TaskKind.GPU_ATTENTION, TaskKind.RESIDENT_ATTENTION, TaskKind.PREFILL_ATTENTION,
)  # fmt: skip
EXPERTS = (TaskKind.EXPERTS, TaskKind.CPU_EXPERTS)
# By name: a schedule, how often a layer keeps its KV on the GPU, and how often it has its experts on the CPU.
WAYS = {
    "cgopipe": ("cgopipe", 0, 0),
    "kept": ("cgopipe", 2, 0),
    "on_cpu": ("cgopipe", 0, 2),
    "flexgen": ("flexgen", 0, 0),
}
COPIES = (
    TaskKind.OFFLOAD_QKV, TaskKind.LOAD_HIDDEN, TaskKind.LOAD_PAGE, TaskKind.STORE_KV, TaskKind.OFFLOAD_INPUTS,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_tiles():
    """A CPU's products are filled up to whole tiles with rows of nobody: the model has none of these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_experts, "TILE", 1)
        yield


def spec_of(architecture: str) -> ModelSpec:
    values = {"architectures": [architecture], **_SIZES, **CONFIGS[architecture]}
    return spec_from_config(HFConfig(values, architecture))


def work_of(spec: ModelSpec, dtype: str) -> PassWork:
    window = spec.attention.sliding_window or 10**9
    context = tuple(sum(min(position + 1, window) for position in mine) for mine in POSITIONS)
    return PassWork(spec, dtype, PAGES, tuple(map(len, POSITIONS)), context, SAMPLED)


# -- counting what runs ------------------------------------------------------------------------------------


class Moved(TorchDispatchMode):
    """Bytes that copies and writes by index move, out of or into the tensors that a pass keeps."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.num_bytes += args[1].nbytes
        elif func is torch.ops.aten.index_put_.default:
            self.num_bytes += args[2].nbytes
        return func(*args, **(kwargs or {}))


def _addmm_flops(_out, a, b, *args, **kwargs) -> int:
    return 2 * a[0] * a[1] * b[1]


def counter() -> FlopCounterMode:
    # PyTorch's table has addmm and not addmm_.
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})


@dataclass
class Seen:
    """Keys and values of the tokens that one token sees: those of earlier ones, then its own."""

    query: torch.Tensor  # [num_heads, D]
    cached: list[torch.Tensor]  # keys [n - 1, num_kv_heads, D], then values
    own: list[torch.Tensor]  # key [1, num_kv_heads, D], then value

    def attend(self) -> torch.Tensor:
        keys, values = (
            torch.cat(pair).transpose(0, 1).float() for pair in zip(self.cached, self.own, strict=True)
        )
        queries = self.query.view(len(keys), -1, self.query.shape[-1]).float()
        scores = torch.bmm(queries, keys.transpose(1, 2)) * self.query.shape[-1] ** -0.5
        return torch.bmm(scores.softmax(-1), values).flatten()


@dataclass
class Observed:
    """What one task did."""

    task: Task
    cost: Cost
    note: dict[str, int] = field(default_factory=dict)


class Watching:
    """A runner that counts what each task of another one does."""

    def __init__(self, runner: TaskRunner, log: list[Observed]) -> None:
        self._runner, self._log = runner, log
        self._logits: list[tuple[torch.Tensor, torch.Tensor]] = []
        compute = runner._logits

        def logits(hidden):
            found = compute(hidden)
            self._logits.append((hidden, found))
            return found

        runner._logits = logits

    def run(self, task: Task) -> None:
        seen = list(self._seen(task)) if task.kind in ATTENTION else []
        routed = self._routed(task) if task.kind is TaskKind.CPU_EXPERTS else ()
        with counter() as flops, Moved() as moved:
            self._runner.run(task)
        counted = flops.get_total_flops()
        if routed:
            with counter() as flops:
                found = cpu_experts.experts(*routed)
            counted = flops.get_total_flops()
            tolerance = 1e-4 if found.dtype == torch.float32 else 3e-2
            torch.testing.assert_close(
                self._runner._buffers.host_experts[self._rows(task)], found, rtol=tolerance, atol=tolerance
            )
        if seen:
            with counter() as flops:
                found = torch.stack([one.attend() for one in seen])
            counted = flops.get_total_flops()
            out = self._tensor(task.writes[-1].kind, task.micro_batches[0])
            tolerance = 1e-4 if out.dtype == torch.float32 else 3e-2
            torch.testing.assert_close(out.float(), found, rtol=tolerance, atol=tolerance)
        self._log.append(self._observe(task, counted, moved.num_bytes, seen))

    def _rows(self, task: Task) -> slice:
        """Of micro-batches that are neighbours."""
        rows = [self._runner._batches[j].rows for j in task.micro_batches]
        return slice(rows[0].start, rows[-1].stop)

    def _routed(self, task: Task) -> tuple[Any, ...]:
        """What the CPU's experts are about to compute."""
        buffers, rows, pages = self._runner._buffers, self._rows(task), self._runner._weights.pages
        some = (buffers.host_experts, buffers.host_topk_ids, buffers.host_topk_weights)
        return *(tensor[rows].clone() for tensor in some), pages.on_cpu(task.layer), PAGES

    def _observe(self, task: Task, flops: int, moved: int, seen: list[Seen]) -> Observed:
        if task.kind in COPIES:
            return Observed(task, Cost(flops, moved, moved, moved))
        if task.kind is TaskKind.KEEP_KV:  # read and written in one memory
            return Observed(task, Cost(flops, 2 * moved))
        if task.kind is TaskKind.LOAD_KV:
            (piece,) = self._runner._batches[task.micro_batches[0]].staged
            blocks = len(piece.host_blocks)
            staged = self._runner._buffers.kv_stage[task.writes[0].index][:blocks].nbytes
            needed = sum(t.nbytes for one in self._seen(task) for t in one.cached)
            return Observed(task, Cost(flops, needed, needed, needed), {"staged": staged})
        if task.kind in ATTENTION:
            return self._attention(task, flops, seen)
        if task.kind in EXPERTS:
            return self._experts(task, flops)
        if task.kind is TaskKind.ADD_OUTPUTS:
            copied = self._bytes(task, BufferKind.HOST_EXPERTS)
            touched = copied + self._bytes(task, BufferKind.HIDDEN) + copied  # read where it arrived
            return Observed(task, Cost(flops, touched, copied, copied))
        used = self._weights(task)
        if task.kind is TaskKind.SAMPLE:  # not all rows are sampled: those that were, and their logits
            touched = sum(t.nbytes for pair in self._logits for t in pair)
            self._logits.clear()
        else:
            kinds = (BufferKind.HIDDEN, BufferKind.QKV, BufferKind.ATTENTION_OUT, BufferKind.EXPERTS_IN)
            touched = self._bytes(task, *kinds)
        return Observed(task, Cost(flops, touched + sum(t.nbytes for t in used)))

    def _weights(self, task: Task) -> list[torch.Tensor]:
        weights = self._runner._weights
        layer = weights.layers[task.layer]
        match task.kind:
            case TaskKind.EMBED:
                return [weights.embed[self._runner._batches[task.micro_batches[0]].token_ids]]
            case TaskKind.PRE_ATTENTION:
                return [layer.input_norm, layer.qkv]
            case TaskKind.POST_ATTENTION:
                return [layer.o, layer.post_norm, *([] if layer.router is None else [layer.router])]
            case _:
                return [weights.final_norm, weights.lm_head]

    def _attention(self, task: Task, flops: int, seen: list[Seen]) -> Observed:
        cached = sum(t.nbytes for one in seen for t in one.cached)
        appended = sum(t.nbytes for one in seen for t in one.own)
        rows = self._bytes(task, BufferKind.HOST_QKV, BufferKind.HOST_OUT, BufferKind.ATTENTION_OUT)
        own = self._tensor(BufferKind.QKV, task.micro_batches[0]).nbytes  # earlier chunks' are left out
        if task.kind is TaskKind.ATTENTION:
            return Observed(task, Cost(flops, host_bytes=rows + cached + appended))
        if task.kind is TaskKind.PREFILL_ATTENTION:
            return Observed(task, Cost(flops, rows + own))
        grown = appended if task.kind is TaskKind.RESIDENT_ATTENTION else 0
        return Observed(task, Cost(flops, rows + own + cached + grown))

    def _experts(self, task: Task, flops: int) -> Observed:
        buffers, pages = self._runner._buffers, self._runner._weights.pages
        is_on_cpu = task.kind is TaskKind.CPU_EXPERTS
        rows = [self._runner._batches[j].rows for j in task.micro_batches]
        ids = torch.cat([(buffers.host_topk_ids if is_on_cpu else buffers.topk_ids)[mine] for mine in rows])
        reached = len(ids.unique())
        weights = reached * pages.layout.pages_per_expert * pages.frames[0].nbytes
        note = {"reached": reached, "weights": weights}
        if is_on_cpu:
            both = (buffers.host_topk_ids, buffers.host_topk_weights)
            routes = sum(tensor[mine].nbytes for tensor in both for mine in rows)
            touched = self._bytes(task, BufferKind.HOST_EXPERTS) + routes
            return Observed(task, Cost(flops, host_bytes=touched + weights), note)
        touched = self._bytes(task, BufferKind.HIDDEN, BufferKind.EXPERTS_IN)
        return Observed(task, Cost(flops, touched + weights), note)

    def _bytes(self, task: Task, *kinds: BufferKind) -> int:
        """Of the buffers that the task reads and of those that it writes, each as often as it is named."""
        named = [b for b in (*task.reads, *task.writes) if b.kind in kinds]
        return sum(self._tensor(b.kind, b.index).nbytes for b in named)

    def _tensor(self, kind: BufferKind, j: int) -> torch.Tensor:
        batch, whole = self._runner._batches[j], getattr(self._runner._buffers, kind.value)
        of_decode = kind in (BufferKind.HOST_QKV, BufferKind.HOST_OUT)
        return whole[batch.host_rows if of_decode else batch.rows]

    def _seen(self, task: Task) -> Iterator[Seen]:
        j = task.micro_batches[0]
        batch = self._runner._batches[j]
        window = self._runner._spec.attention.sliding_window or 10**9
        if batch.prefill is not None:
            q, k, v = self._runner._split(self._runner._buffers.qkv)
            for first, start, end in batch.prefill.segments:
                for row in range(start, end):
                    earlier = slice(max(first, row - window + 1), row)
                    yield Seen(q[row], [k[earlier], v[earlier]], [k[row : row + 1], v[row : row + 1]])
            return
        on_host = task.kind is TaskKind.ATTENTION
        q, k, v = self._runner._split(self._tensor(BufferKind.HOST_QKV if on_host else BufferKind.QKV, j))
        cache, size = self._runner._kv, self._runner._kv.block_size
        kv = (cache.kept if task.kind is TaskKind.RESIDENT_ATTENTION else cache.layer)(task.layer)
        for row, (table, length) in enumerate(
            zip(batch.block_tables, batch.context_lens.tolist(), strict=True)
        ):
            earlier = torch.arange(max(0, length - window), length - 1)
            blocks, offsets = table[earlier // size], earlier % size
            cached = [kv[blocks, which, :, offsets] for which in (0, 1)]
            yield Seen(q[row], cached, [k[row : row + 1], v[row : row + 1]])


def observe(architecture: str, dtype: str, way: str, parts: int = 1) -> list[Observed]:
    """What each task of one pass did."""
    schedule, kv_every, cpu_every = WAYS[way]
    torch.manual_seed(0)
    spec = spec_of(architecture)
    pages = spec.experts.num_experts * PAGES
    policy = tiny_policy(
        schedule=schedule,
        group_size=3,  # three micro-batches, then one of so few tokens that they cannot reach every expert
        pages_per_expert=PAGES,
        resident_pages=(1, 0, pages),
        num_frames=3 * pages,
        block_size=4,
        expert_parts=parts,
        kv_every=kv_every,
        cpu_every=cpu_every,
    )
    cpu = torch.device("cpu")
    worker = build_worker(spec, policy, getattr(torch, dtype), cpu, tensors=None, executor="serial")
    for cache in (worker._kv.arena.tensor, worker._kv.on_device):
        cache.normal_()  # the context of the sequences that decode
    log: list[Observed] = []
    worker._wrap = lambda runner: Watching(runner, log)
    worker.run(STEP)
    return log


# -- the comparison ----------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[(a, d, s) for a in ARCHITECTURES for d in ("float32", "bfloat16") for s in WAYS],
    ids="-".join,
)
def observed(request) -> tuple[list[Observed], PassWork]:
    architecture, dtype, way = request.param
    return observe(architecture, dtype, way), work_of(spec_of(architecture), dtype)


def test_every_family_has_a_tiny_config() -> None:
    assert CONFIGS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_these_ways_have_every_kind_of_task(architecture: str) -> None:
    assert {o.task.kind for way in WAYS for o in observe(architecture, "float32", way)} == set(TaskKind)


@pytest.mark.parametrize("parts", [2, 5])
def test_parts_of_experts_together_run_the_flops_that_are_counted(parts: int) -> None:
    """How many tokens a part has depends on the router: counted are even shares, rounded down."""
    spec = spec_of("MixtralForCausalLM")
    work = work_of(spec, "float32")
    in_parts = replace(work, expert_parts=parts)
    ran: Counter[tuple[int, tuple[int, ...]]] = Counter()
    counted: Counter[tuple[int, tuple[int, ...]]] = Counter()
    seen = set()
    for one in observe("MixtralForCausalLM", "float32", "cgopipe", parts):
        if one.task.kind is TaskKind.EXPERTS:
            sweep = one.task.layer, one.task.micro_batches
            ran[sweep] += one.cost.flops
            counted[sweep] += task_cost(one.task, in_parts).flops
            seen.add(one.task.part)
    assert seen == set(range(parts))
    of_a_slot = 2 * 3 * spec.hidden_size * spec.experts.intermediate_size
    for (layer, members), flops in ran.items():
        whole = Task(TaskKind.EXPERTS, Lane.GPU, layer, members, (), ())
        assert flops == task_cost(whole, work).flops
        assert 0 <= flops - counted[layer, members] < parts * of_a_slot


def test_flops_are_those_that_run(observed) -> None:
    log, work = observed
    for one in log:
        assert task_cost(one.task, work).flops == one.cost.flops, one.task


def test_bytes_are_those_of_the_tensors_that_a_task_touches(observed) -> None:
    log, work = observed
    for one in log:
        counted, touched = task_cost(one.task, work), one.cost
        if one.task.kind in EXPERTS:
            continue
        assert (counted.device_bytes, counted.host_bytes, counted.link_bytes) == (
            touched.device_bytes, touched.host_bytes, touched.link_bytes,
        ), one.task  # fmt: skip


def test_experts_bytes_are_those_touched_up_to_experts_that_no_token_happens_to_choose(observed) -> None:
    log, work = observed
    experts = [one for one in log if one.task.kind in EXPERTS]
    assert experts
    exact = 0
    for one in experts:
        tokens = sum(work.tokens[j] for j in one.task.micro_batches)
        most = min(work.spec.experts.num_experts, work.spec.experts.top_k * tokens)
        beyond = (most - one.note["reached"]) * one.note["weights"] // one.note["reached"]
        counted, touched = task_cost(one.task, work), one.cost
        assert counted.device_bytes + counted.host_bytes == touched.device_bytes + touched.host_bytes + beyond
        assert (counted.host_bytes > 0) == (one.task.kind is TaskKind.CPU_EXPERTS)
        exact += beyond == 0
    assert exact >= len(experts) / 2


def test_loading_kv_copies_whole_blocks_and_never_less_than_is_counted(observed) -> None:
    log, work = observed
    for one in (o for o in log if o.task.kind is TaskKind.LOAD_KV):
        assert task_cost(one.task, work).link_bytes <= one.note["staged"]
