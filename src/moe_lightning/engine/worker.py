"""The data plane: weights, KV cache and executor, one pass at a time."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from moe_lightning.engine.facts import pass_work
from moe_lightning.kernels.cpu_kernels import CpuKernels
from moe_lightning.kernels.reference import inverse_frequencies
from moe_lightning.memory.kv_cache import KVCache
from moe_lightning.memory.weights import Weights
from moe_lightning.perf.facts import PassFacts
from moe_lightning.perf.replan import only_limits_differ
from moe_lightning.pipeline.baselines import SCHEDULES
from moe_lightning.pipeline.shape import layers_keeping_kv, pass_shape
from moe_lightning.pipeline.task import PassShape, Schedule
from moe_lightning.pipeline.timeline import Timeline
from moe_lightning.policy import Policy
from moe_lightning.runtime.buffers import PassBuffers
from moe_lightning.runtime.device_errors import explain
from moe_lightning.runtime.executor import Executor, Runner
from moe_lightning.runtime.micro_batch import Step, build_micro_batches
from moe_lightning.runtime.runner import MicroBatchOutput, TaskRunner
from moe_lightning.runtime.upload import Uploader

_RECORD_EVERY = 16  # passes as full as the fullest: recording one makes its launches slower


@dataclass(frozen=True)
class RecordedPass:
    """A pass whose tasks were timed; `timeline` waits for those that still run."""

    facts: PassFacts
    timeline: Callable[[], Timeline]


class Worker:
    """Runs steps under one policy; remembers between passes only where the ring of frames stands.

    Attributes:
        fullest: the last recorded pass with the most decode micro-batches so far, then the most chunks.
        recorded: the last pass, if it was.
        record_next: record the next pass, whatever it is.
        records_fullest: record passes fuller than all before, and now and then one that is as full.
    """

    def __init__(
        self, weights: Weights, policy: Policy, kv: KVCache, executor: Executor, device: torch.device
    ) -> None:
        self._weights = weights
        self._policy = policy
        self._kv = kv
        self._executor = executor
        self._uploader = Uploader(device)
        self._buffers = PassBuffers.allocate(weights.spec, policy, weights.embed.dtype, device)
        inv_freq = inverse_frequencies(weights.spec.rope, weights.spec.attention.head_dim)
        self._inv_freq = inv_freq.to(device)
        self._cpu_kernels = CpuKernels(cpu_lane_threads(device))
        self._ring_offset = 0
        self._is_preloaded = False
        self.fullest: RecordedPass | None = None
        self.recorded: RecordedPass | None = None
        self.record_next = False
        self.records_fullest = True
        self._num_unrecorded = 0
        self._fullness = (0, 0)  # of that pass: decode micro-batches, chunks

    @property
    def weights(self) -> Weights:
        """What it computes with."""
        return self._weights

    @property
    def kv(self) -> KVCache:
        """Where keys and values are."""
        return self._kv

    def keep_to(self, policy: Policy) -> None:
        """Run the next passes under other limits: no more than this worker was made for."""
        assert only_limits_differ(policy, self._policy), f"{policy} takes other memory than {self._policy}"
        self._policy = policy

    def run(self, step: Step) -> list[MicroBatchOutput]:
        """One pass; its outputs by micro-batch, prefill first."""
        spec, stage = self._weights.spec, self._buffers.kv_stage
        with self._executor.scope():
            self._uploader.clear()
            batches = build_micro_batches(
                step, self._policy.block_size, spec.vocab_size, self._uploader,
                staging_blocks=len(stage[0]) if stage else 0, keeps_kv=bool(layers_keeping_kv(self._policy)),
            )  # fmt: skip
            self._uploader.send()
            self._weights.pages.place_ring(self._ring_offset)
        schedule = self._schedule(len(step.prefill), len(step.decode))
        runner = TaskRunner(
            self._weights,
            self._kv,
            self._buffers,
            self._cpu_kernels,
            self._inv_freq,
            batches,
            self._ring_offset,
            schedule.shape.num_parts,
        )
        # Until the pass is whole, nothing is known of the ring.
        offset, self._ring_offset, self._is_preloaded = self._ring_offset, 0, False
        fullness = (len(step.decode), len(step.prefill))
        is_fullest = self._is_fullest(fullness)
        record, self.record_next = is_fullest or self.record_next, False
        timeline = self._run(schedule, self._wrap(runner), record)
        self.recorded = RecordedPass(self._facts(step, schedule), timeline) if record else None
        if is_fullest:
            self._fullness, self.fullest, self._num_unrecorded = fullness, self.recorded, 0
        if schedule.shape.pages_ahead:
            loaded = sum(schedule.shape.streamed_pages)
            self._ring_offset = (offset + loaded) % self._policy.num_frames
            self._is_preloaded = True
        return [runner.outputs[j] for j in range(len(batches))]

    def _facts(self, step: Step, schedule: Schedule) -> PassFacts:
        dtype = str(self._weights.embed.dtype).removeprefix("torch.")
        shape = schedule.shape
        work = pass_work(
            self._weights.spec, dtype, self._policy, step, shape.num_parts, sum(shape.streamed_pages)
        )
        return PassFacts(schedule.name, shape, work)

    def _is_fullest(self, fullness: tuple[int, int]) -> bool:
        """Whether this pass is to be kept: one fuller than all before, and now and then one that is as full."""
        self._num_unrecorded += 1
        is_due = fullness == self._fullness and self._num_unrecorded >= _RECORD_EVERY
        return self.records_fullest and (fullness > self._fullness or is_due)

    def _run(self, schedule: Schedule, runner: Runner, record: bool) -> Callable[[], Timeline]:
        try:
            return self._executor.run(schedule, runner, record=record)
        except RuntimeError as error:
            explained = explain(error)
            if explained is None:
                raise
            raise explained from error

    def give_back(self) -> None:
        """Return memory that no tensor holds, so that what failed to fit may fit next time."""
        gc.collect()
        if self._buffers.hidden.is_cuda:
            torch.cuda.empty_cache()

    def _wrap(self, runner: TaskRunner) -> Runner:
        """A hook for tests that watch or delay tasks."""
        return runner

    def _schedule(self, num_prefill: int, num_decode: int) -> Schedule:
        num_experts = self._weights.spec.experts.num_experts
        shape = pass_shape(self._policy, num_experts, num_prefill, num_decode, preloaded=self._is_preloaded)
        return _build(self._policy.schedule, shape)


def cpu_lane_threads(device: torch.device) -> int:
    """All cores, but for one that launches and one that waits for the GPU where there is one."""
    cores = len(os.sched_getaffinity(0))
    return cores if device.type == "cpu" else max(1, cores - 2)


@lru_cache(maxsize=96)  # some thousand tasks each, a megabyte
def _build(name: str, shape: PassShape) -> Schedule:
    return SCHEDULES[name](shape)
