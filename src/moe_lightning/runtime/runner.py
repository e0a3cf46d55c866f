"""What each task of a schedule does to the buffers it names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moe_lightning.kernels import ops, reference
from moe_lightning.kernels.cpu_kernels import CpuKernels
from moe_lightning.memory.kv_cache import KVCache
from moe_lightning.memory.weights import Weights
from moe_lightning.perf.memory import CPU_EXPERTS_AT_ONCE, HEAD_ROWS
from moe_lightning.pipeline.shape import experts_in
from moe_lightning.pipeline.task import BufferKind, Task
from moe_lightning.runtime.buffers import PassBuffers
from moe_lightning.runtime.kv_staging import PlacedBlocks, stage
from moe_lightning.runtime.micro_batch import MicroBatch
from moe_lightning.runtime.sampler import SampleOutput, joined, prompt_logprobs, sample


class MicroBatchOutput(NamedTuple):
    """Sampled tokens of a micro-batch, and the scores of its prompt tokens."""

    sampled: SampleOutput | None
    scored: list[SampleOutput]


class _Rows(NamedTuple):
    """A micro-batch's rows of the pass's buffers, cut once: it takes microseconds, and every layer needs them."""

    hidden: Tensor
    qkv: Tensor
    attention_out: Tensor
    experts_in: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    router_logits: Tensor
    host_qkv: Tensor
    host_out: Tensor

    @classmethod
    def of(cls, buffers: PassBuffers, batch: MicroBatch) -> _Rows:
        b, rows, host_rows = buffers, batch.rows, batch.host_rows
        return cls(
            b.hidden[rows], b.qkv[rows], b.attention_out[rows], b.experts_in[rows],
            b.topk_ids[rows], b.topk_weights[rows], b.router_logits[rows],
            b.host_qkv[host_rows], b.host_out[host_rows],
        )  # fmt: skip


class TaskRunner:
    """Runs the tasks of one pass over given micro-batches.

    Knows nothing of lanes, order or concurrency: the schedule's dependencies make each call safe.
    `ring_offset` turns the schedule's frame numbers into places in the ring, which goes on where the previous
    pass left it. `expert_parts` are the sweeps that the schedule makes over a layer's experts.
    """

    def __init__(
        self,
        weights: Weights,
        kv: KVCache,
        buffers: PassBuffers,
        cpu_kernels: CpuKernels,
        inv_freq: Tensor,
        micro_batches: Sequence[MicroBatch],
        ring_offset: int = 0,
        expert_parts: int = 1,
    ) -> None:
        self._weights = weights
        self._spec = weights.spec
        self._kv = kv
        self._buffers = buffers
        self._cpu_kernels = cpu_kernels
        self._batches = micro_batches
        self._cut = [_Rows.of(buffers, batch) for batch in micro_batches]
        self._ring_offset = ring_offset
        self._expert_parts = expert_parts
        self._inv_freq = inv_freq
        self._rotary: dict[int, tuple[Tensor, Tensor]] = {}
        self.outputs: dict[int, MicroBatchOutput] = {}

    def run(self, task: Task) -> None:
        """Do one task; its dependencies are done. Call it in `torch.inference_mode`."""
        # By name: with bound methods in it, a runner and all tensors of its pass would live until the garbage
        # collector comes, which in a server is rare.
        getattr(self, f"_{task.kind.value}")(task)

    def _batch(self, task: Task) -> MicroBatch:
        return self._batches[task.micro_batches[0]]

    def _rows_of(self, task: Task) -> _Rows:
        return self._cut[task.micro_batches[0]]

    def _embed(self, task: Task) -> None:
        batch = self._batch(task)
        weights, dtype = self._weights.embed, self._buffers.hidden.dtype
        torch.index_select(weights, 0, batch.token_ids, out=self._rows_of(task).hidden)
        self._rotary[task.micro_batches[0]] = reference.rotary(batch.positions, self._inv_freq, dtype)

    def _pre_attention(self, task: Task) -> None:
        rows, layer, a = self._rows_of(task), self._weights.layers[task.layer], self._spec.attention
        # The experts' input is not in use yet: `_post_attention` fills it.
        ops.rms_norm(rows.hidden, layer.input_norm, self._spec.norm_eps, out=rows.experts_in)
        torch.mm(rows.experts_in, layer.qkv_turned, out=rows.qkv)
        ops.rotate_(rows.qkv, *self._rotary[task.micro_batches[0]], a.num_heads + a.num_kv_heads)

    def _offload_qkv(self, task: Task) -> None:
        rows = self._rows_of(task)
        rows.host_qkv.copy_(rows.qkv, non_blocking=True)

    def _attention(self, task: Task) -> None:
        batch, rows, kv = self._batch(task), self._rows_of(task), self._kv.layer(task.layer)
        q, k, v = self._split(rows.host_qkv)
        assert batch.block_tables is not None
        assert batch.context_lens is not None
        self._cpu_kernels.attend(
            rows.host_out, q, k, v, kv, batch.block_tables, batch.context_lens,
            sliding_window=self._spec.attention.sliding_window,
        )  # fmt: skip

    def _load_hidden(self, task: Task) -> None:
        b = self._buffers
        _bring(
            b.host_out, b.host_out_on_device, self._batch(task).host_rows, self._rows_of(task).attention_out
        )

    def _prefill_attention(self, task: Task) -> None:
        batch = self._batch(task)
        assert batch.prefill is not None
        q, k, v = self._split(self._buffers.qkv)
        window, out = self._spec.attention.sliding_window, self._rows_of(task).attention_out
        ops.prefill_attention(q, k, v, batch.prefill, window, out)

    def _store_kv(self, task: Task) -> None:
        batch = self._batch(task)
        _, k, v = self._split(self._rows_of(task).qkv)
        if k.is_cuda and not self._kv.arena.is_pinned:  # then kernels cannot reach it, and the launcher waits
            reference.store_kv(self._kv.layer(task.layer), k.cpu(), v.cpu(), batch.slots.cpu())
            return
        ops.store_kv(self._kv.layer_on(k.device, task.layer), k, v, batch.slots)

    def _load_kv(self, task: Task) -> None:
        batch, slot = self._batch(task), task.writes[0].index
        stage(self._kv, task.layer, batch.staged[0], self._buffers.kv_stage[slot])

    def _gpu_attention(self, task: Task) -> None:
        """Over the staged blocks, which new tokens join here; what the slot had no room for comes after these."""
        batch, kv = self._batch(task), self._buffers.kv_stage[task.reads[1].index]
        for piece in batch.staged:
            if piece.rows.start:
                stage(self._kv, task.layer, piece, kv)
            start = batch.rows.start
            self._attend(slice(start + piece.rows.start, start + piece.rows.stop), kv, piece.placed)

    def _resident_attention(self, task: Task) -> None:
        batch = self._batch(task)
        assert batch.kept is not None
        self._attend(batch.rows, self._kv.kept(task.layer), batch.kept)

    def _attend(self, rows: slice, kv: Tensor, placed: PlacedBlocks) -> None:
        """Append the new k and v of some rows to blocks on the device, and attend to them."""
        q, k, v = self._split(self._buffers.qkv[rows])
        window, out = self._spec.attention.sliding_window, self._buffers.attention_out[rows]
        ops.store_kv(kv, k, v, placed.slots)
        ops.decode_attention(q, kv, placed.tables, placed.first, placed.context_lens, window, out)

    def _keep_kv(self, task: Task) -> None:
        batch = self._batch(task)
        _, k, v = self._split(self._rows_of(task).qkv)
        ops.store_kv(self._kv.kept(task.layer), k, v, batch.slots)

    def _post_attention(self, task: Task) -> None:
        rows, layer = self._rows_of(task), self._weights.layers[task.layer]
        rows.hidden.addmm_(rows.attention_out, layer.o_turned)
        ops.rms_norm(rows.hidden, layer.post_norm, self._spec.norm_eps, out=rows.experts_in)
        router = self._spec.experts.router
        if router is None or layer.router_turned is None:
            rows.topk_ids.zero_()
            rows.topk_weights.fill_(1.0)
            return
        torch.mm(rows.experts_in, layer.router_turned, out=rows.router_logits)
        ops.route(rows.router_logits, router, rows.topk_ids, rows.topk_weights)

    def _load_page(self, task: Task) -> None:
        placement = self._weights.pages.placement
        page = placement.resident[task.layer] + task.page
        self._weights.pages.load(task.layer, page, self._ring_frame(task.frame))

    def _ring_frame(self, frame: int) -> int:
        return (frame + self._ring_offset) % self._weights.pages.placement.num_ring_frames

    def _experts(self, task: Task) -> None:
        pages, b, n = self._weights.pages, self._buffers, self._expert_parts
        frames = (buffer.index for buffer in task.reads if buffer.kind is BufferKind.FRAME)
        pages_per_expert = pages.layout.pages_per_expert
        experts = experts_in(pages.layout.num_experts, n, task.part)
        pages.check(
            task.layer, experts.start * pages_per_expert, [self._ring_frame(frame) for frame in frames]
        )
        rows = self._rows(task)
        weights, table = pages.swept(task.layer, experts)
        ops.experts_(
            b.hidden[rows], b.experts_in[rows], b.topk_ids[rows], b.topk_weights[rows], weights, table,
            pages_per_expert, b.experts, experts if n > 1 else None,
        )  # fmt: skip

    def _rows(self, task: Task) -> slice:
        """Of a group, whose micro-batches are neighbours."""
        first, last = task.micro_batches[0], task.micro_batches[-1]
        return slice(self._batches[first].rows.start, self._batches[last].rows.stop)

    def _offload_inputs(self, task: Task) -> None:
        b, rows = self._buffers, self._rows(task)
        b.host_experts[rows].copy_(b.experts_in[rows], non_blocking=True)
        b.host_topk_ids[rows].copy_(b.topk_ids[rows], non_blocking=True)
        b.host_topk_weights[rows].copy_(b.topk_weights[rows], non_blocking=True)

    def _cpu_experts(self, task: Task) -> None:
        b, rows, pages = self._buffers, self._rows(task), self._weights.pages
        weights, pages_per_expert = pages.on_cpu(task.layer), pages.layout.pages_per_expert
        whole = (b.host_experts[rows], b.host_topk_ids[rows], b.host_topk_weights[rows])
        pieces = (tensor.split(CPU_EXPERTS_AT_ONCE) for tensor in whole)
        for x, topk_ids, topk_weights in zip(*pieces, strict=True):
            self._cpu_kernels.experts(x, x, topk_ids, topk_weights, weights, pages_per_expert)

    def _add_outputs(self, task: Task) -> None:
        b, rows = self._buffers, self._rows(task)
        into = b.experts_in[rows]
        _bring(b.host_experts, b.host_experts_on_device, rows, into)
        b.hidden[rows].add_(into)

    def _sample(self, task: Task) -> None:
        batch = self._batch(task)
        hidden = self._rows_of(task).hidden
        scored = [
            prompt_logprobs(self._logits(hidden[rows]), ids, batch.num_prompt_logprobs)
            for rows, ids in zip(
                torch.split(batch.score_rows, HEAD_ROWS),
                torch.split(batch.score_ids, HEAD_ROWS),
                strict=True,
            )
            if len(rows)
        ]
        sampled = [
            sample(self._logits(hidden[rows]), sampling)
            for rows, sampling in zip(
                batch.sample_rows.split([part.num_rows for part in batch.sampling]),
                batch.sampling,
                strict=True,
            )
        ]
        self.outputs[task.micro_batches[0]] = MicroBatchOutput(joined(sampled) if sampled else None, scored)

    def _logits(self, hidden: Tensor) -> Tensor:
        normed = ops.rms_norm(hidden, self._weights.final_norm, self._spec.norm_eps)
        return F.linear(normed, self._weights.lm_head)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [T, heads, D] of rows [T, q_size + 2 kv_size]; views."""
        a = self._spec.attention
        heads = qkv.view(len(qkv), -1, a.head_dim)
        first_v = a.num_heads + a.num_kv_heads
        return heads[:, : a.num_heads], heads[:, a.num_heads : first_v], heads[:, first_v:]


def _bring(host: Tensor, on_device: Tensor | None, rows: slice, into: Tensor) -> None:
    """Rows of page-locked memory to the device: by a kernel where it reaches them, past the copies of pages."""
    if on_device is not None:
        ops.load_host_rows(on_device[rows], into)
    else:
        into.copy_(host[rows], non_blocking=True)
