"""Engines for measurements: one after the other over the same host memory, where weights are random."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_lightning.bench.peaks import PeakWatch, resident_bytes
from moe_lightning.config import EngineConfig
from moe_lightning.engine.build import build_worker
from moe_lightning.engine.engine import Engine
from moe_lightning.engine.garbage import collect_rarely
from moe_lightning.engine.gpu_budget import cap_gpu_memory
from moe_lightning.engine.plan import Plan, checkpoint_directory, make_plan, usable_host_memory
from moe_lightning.engine.tokenizer import dummy_tokenizer, load_tokenizer
from moe_lightning.engine.waiting import Turns
from moe_lightning.engine.worker import Worker
from moe_lightning.hardware.host import available_memory
from moe_lightning.memory import checkpoint
from moe_lightning.memory.shared_arena import SharedArena
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.memory import ENGINE_BYTES, GPU_CODE_BYTES, memory_use
from moe_lightning.perf.workload import Workload
from moe_lightning.pipeline.shape import layers_on_cpu


@dataclass(frozen=True)
class Loaded:
    """A model in place, under a plan.

    Attributes:
        plan: policy and prediction.
        worker: runs its passes.
        tokenizer: the model's, or a stand-in.
        ready_s: seconds from memory asked for to weights in place.
    """

    plan: Plan
    worker: Worker
    tokenizer: Any
    ready_s: float

    def engine(self, *, in_batches: bool = False) -> Engine:
        """An engine that has no requests yet; one at a time."""
        plan = self.plan
        return Engine(
            self.worker, plan.policy, self.tokenizer, plan.spec.eos_token_ids, plan.max_model_len,
            turns=Turns() if in_batches else Turns.of_job(plan.policy, plan.device), in_batches=in_batches,
        )  # fmt: skip


class Session:
    """Plans and loads a model under one policy after the other; `unload` comes in between.

    Args:
        config: settings; those of memory may change from plan to plan.
        spec: the model.
        shares_memory: whether engines use the same host memory; by default where weights are random and a GPU
            makes bringing them in expensive.

    Attributes:
        host_memory: bytes for weights and KV, where a plan's settings do not say.
        limit_host_memory: what the hardware's limit counts with then: what was allowed, or all that was free.
    """

    def __init__(self, config: EngineConfig, spec: ModelSpec, *, shares_memory: bool | None = None) -> None:
        self._has_gpu = torch.cuda.is_available() and config.device != "cpu"
        self.config, self.spec = config, spec
        self.limit_host_memory = config.host_memory or available_memory()
        device = torch.device("cuda" if self._has_gpu else "cpu")
        self.host_memory = config.host_memory or usable_host_memory(device)
        is_dummy = config.load_format == "dummy"
        self._shares = is_dummy and (self._has_gpu if shares_memory is None else shares_memory)
        self._host_before: int | None = None
        self._plans: dict[tuple[Workload | None, EngineConfig], Plan] = {}
        self._shared: SharedArena | None = None
        self._tokenizer: Any = None

    def plan(self, workload: Workload | None, config: EngineConfig | None = None) -> Plan:
        """The plan for a workload, under the session's settings or others; made once.

        Raises:
            ConfigError, NoFeasiblePolicyError: the model cannot run in that memory.
        """
        config = config or self.config
        config = replace(config, host_memory=config.host_memory or self.host_memory)
        if (workload, config) not in self._plans:
            self._plans[workload, config] = make_plan(config, workload=workload, spec=self.spec)
        return self._plans[workload, config]

    def load(self, plan: Plan, gpu_memory: int | None = None) -> Loaded:
        """Bring the model into place; whatever was loaded before must be gone.

        Raises:
            CheckpointError, ConfigError: it cannot be loaded.
        """
        start = time.perf_counter()
        if plan.device.type == "cuda":  # another plan may have set another cap since
            cap_gpu_memory(plan.device, gpu_memory or self.config.gpu_memory)
        directory = checkpoint_directory(self.config)
        worker = build_worker(
            plan.spec, plan.policy, plan.dtype, plan.device,
            tensors=None if directory is None else checkpoint.open_model(directory, plan.spec),
            executor=self.config.executor, seed=self.config.seed, shared=self._arena(plan),
        )  # fmt: skip
        if self._tokenizer is None:
            path = self.config.tokenizer or (str(directory) if directory else None)
            self._tokenizer = load_tokenizer(path) if path else dummy_tokenizer(plan.spec.vocab_size)
        if self._has_gpu:
            collect_rarely()
        return Loaded(plan, worker, self._tokenizer, time.perf_counter() - start)

    def watch(self) -> PeakWatch:
        """Begin to watch memory, once there is a plan: what is held then, the GPU's context too, no plan speaks of.

        Of engines that share memory, what was there before the first counts.
        """
        if self._host_before is None or not self._shares:
            self._host_before = resident_bytes()
        return PeakWatch(self._host_before)

    @contextmanager
    def between_engines(self) -> Iterator[None]:
        """What the work inside leaves in memory, such as libraries, is no later engine's.

        Nor is what it freed and the process kept, though a later engine may use that.
        """
        before = resident_bytes()
        try:
            yield
        finally:
            if self._host_before is not None:
                self._host_before += max(0, resident_bytes() - before)

    def planned_host_bytes(self, plan: Plan) -> int:
        """Host memory that may come to what there was: what the plan takes, or all that engines share."""
        return self.host_memory if self._shares else host_bytes(plan)

    def gpu_budget(self, device: torch.device) -> int:
        """Bytes of GPU memory that tensors may take under the configuration's limit."""
        if device.type == "cuda":
            return cap_gpu_memory(device, self.config.gpu_memory)
        assert self.config.gpu_memory is not None, "the CPU plays a GPU of some size"
        return self.config.gpu_memory

    def fill_kv(self, loaded: Loaded) -> None:
        """Fill the cache with some weights' numbers: zeros might be faster than what a model computes.

        Memory that earlier engines used holds numbers already.
        """
        kv, some = loaded.worker.kv, loaded.worker.weights.embed.view(-1)[: 2**24]
        on_host = kv.arena.tensor.view(-1)
        if self._shared and len(on_host):
            on_host = on_host[self._shared.filled_before(on_host) :]
        _repeat(some, kv.on_device.view(-1))
        # By the CPU: a copy by the GPU may not cross pieces of host memory that are locked apart.
        _repeat(some.cpu(), on_host)

    def unload(self) -> None:
        """Give GPU memory back, once the caller has dropped what was loaded."""
        if self._has_gpu:
            torch.cuda.synchronize()  # copies for a next pass may still read what is given back
        gc.unfreeze()
        gc.collect()
        if self._has_gpu:
            torch.cuda.empty_cache()

    def _arena(self, plan: Plan) -> SharedArena | None:
        if layers_on_cpu(plan.policy):
            self._shared = None  # its rows are of one size, and it takes all memory
            return None
        if self._shares and self._shared is None:
            size = self.host_memory - ENGINE_BYTES - (GPU_CODE_BYTES if self._has_gpu else 0)
            self._shared = SharedArena(max(size, 1))
        return self._shared


def _repeat(some: Tensor, into: Tensor) -> None:
    for start in range(0, len(into), len(some)):
        piece = into[start : start + len(some)]
        piece.copy_(some[: len(piece)])


def host_bytes(plan: Plan) -> int:
    """Host memory that a plan takes: streamed pages, KV, and what the engine keeps of requests."""
    on_cpu = plan.device.type == "cpu"  # which plays the GPU, over host memory
    use = memory_use(plan.spec, plan.dtype.itemsize, plan.policy, has_gpu=not on_cpu)
    return use.host_bytes + (use.gpu_bytes if on_cpu else 0)
