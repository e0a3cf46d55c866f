"""The data plane: weights, KV cache and executor, one pass at a time."""

from __future__ import annotations

from functools import lru_cache

import torch

from moe_lightning.kernels.cpu_attention import CpuAttention
from moe_lightning.memory.kv_cache import KVCache
from moe_lightning.memory.weights import Weights
from moe_lightning.pipeline.baselines import SCHEDULES
from moe_lightning.pipeline.task import PassShape, Schedule
from moe_lightning.pipeline.timeline import Timeline
from moe_lightning.policy import Policy
from moe_lightning.runtime.buffers import PassBuffers
from moe_lightning.runtime.executor import Runner, SerialExecutor, ThreadedExecutor
from moe_lightning.runtime.micro_batch import Step, build_micro_batches
from moe_lightning.runtime.runner import MicroBatchOutput, TaskRunner

Executor = SerialExecutor | ThreadedExecutor


class Worker:
    """Runs steps under one policy; remembers between passes only where the ring of frames stands."""

    def __init__(
        self, weights: Weights, policy: Policy, kv: KVCache, executor: Executor, device: torch.device
    ) -> None:
        self._weights = weights
        self._policy = policy
        self._kv = kv
        self._executor = executor
        self._device = device
        rows = policy.max_num_seqs + policy.prefill_tokens
        dtype = weights.embed.dtype
        self._buffers = PassBuffers.allocate(weights.spec, rows, policy.max_num_seqs, dtype, device)
        self._cpu_attention = CpuAttention()
        self._ring_offset = 0
        self._is_preloaded = False
        self.fullest_pass: Timeline | None = None
        self._fullness = (0, 0)  # of that pass: decode micro-batches, tasks

    def run(self, step: Step) -> list[MicroBatchOutput]:
        """One pass; its outputs by micro-batch, prefill first."""
        spec = self._weights.spec
        batches = build_micro_batches(step, self._policy.block_size, spec.vocab_size, self._device)
        schedule = self._schedule(len(step.prefill), len(step.decode))
        runner = TaskRunner(
            self._weights, self._kv, self._buffers, self._cpu_attention, batches, self._ring_offset
        )
        # Until the pass is whole, nothing is known of the ring.
        offset, self._ring_offset, self._is_preloaded = self._ring_offset, 0, False
        timeline = self._executor.run(schedule, self._wrap(runner))
        fullness = (len(step.decode), len(schedule.tasks))
        if fullness >= self._fullness:
            self._fullness, self.fullest_pass = fullness, timeline
        if schedule.shape.pages_ahead:
            loaded = sum(schedule.shape.streamed_pages)
            self._ring_offset = (offset + loaded) % self._policy.num_frames
            self._is_preloaded = True
        return [runner.outputs[j] for j in range(len(batches))]

    def _wrap(self, runner: TaskRunner) -> Runner:
        """A hook for tests that watch or delay tasks."""
        return runner

    def _schedule(self, num_prefill: int, num_decode: int) -> Schedule:
        shape = PassShape(
            num_layers=self._weights.spec.num_layers,
            num_prefill=num_prefill,
            num_decode=num_decode,
            group_size=self._policy.group_size,
            look_ahead=self._policy.look_ahead,
            streamed_pages=self._weights.pages.placement.streamed,
            num_frames=self._policy.num_frames,
            preloaded=self._is_preloaded,
        )
        return _build(self._policy.schedule, shape)


@lru_cache(maxsize=256)
def _build(name: str, shape: PassShape) -> Schedule:
    return SCHEDULES[name](shape)
