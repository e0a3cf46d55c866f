"""From a policy to a worker: memory taken, weights in place."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from moe_lightning.engine.worker import Worker
from moe_lightning.errors import ConfigError
from moe_lightning.memory import checkpoint
from moe_lightning.memory.dummy import RandomWeights
from moe_lightning.memory.kv_cache import KVCache
from moe_lightning.memory.layout import PageLayout, Placement
from moe_lightning.memory.weights import Weights, allocate
from moe_lightning.models.spec import ModelSpec
from moe_lightning.policy import Policy
from moe_lightning.runtime.cuda_executor import CudaExecutor
from moe_lightning.runtime.executor import Executor, SerialExecutor, ThreadedExecutor

Progress = Callable[[int, int], None]  # bytes in place, bytes in all


def build_worker(
    spec: ModelSpec,
    policy: Policy,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tensors: checkpoint.Tensors | None,
    executor: str = "auto",
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Worker:
    """A worker that can run steps.

    Weights and KV are brought into memory and page-locked at once, while the weights are read into place.

    Args:
        spec: the model.
        policy: how it runs.
        dtype: of weights, activations and KV.
        device: what does the dense work.
        tensors: of the checkpoint; None for random weights.
        executor: ``serial``, or lanes at once.
        seed: of random weights.
        progress: told of the weights that are in place.

    Raises:
        CheckpointError: a file cannot be read.
        ConfigError: the system has no such memory.
    """
    lanes = make_executor(executor, device)
    _check_schedule(policy.schedule, lanes)
    layout = PageLayout.of(spec, policy.pages_per_expert)
    placement = Placement(layout.pages_per_layer, policy.resident_pages, policy.num_frames)
    weights = allocate(spec, layout, placement, dtype, device)
    kv = KVCache(spec.num_layers, spec.attention, policy.num_blocks, policy.block_size, dtype)
    _fill(weights, kv, tensors, seed, progress)
    return Worker(weights, policy, kv, lanes, device)


def _check_schedule(name: str, executor: Executor) -> None:
    if name == "flexgen" and isinstance(executor, CudaExecutor):
        raise ConfigError(
            "schedule='flexgen' does not run on CUDA streams yet; choose another schedule or executor='serial'"
        )


def make_executor(name: str, device: torch.device) -> Executor:
    """The executor of a setting's name on a device."""
    if device.type == "cuda":
        is_serial = name == "serial"
        return SerialExecutor(torch.cuda.synchronize) if is_serial else CudaExecutor(device)
    return ThreadedExecutor() if name == "threads" else SerialExecutor()


def _fill(
    weights: Weights, kv: KVCache, tensors: checkpoint.Tensors | None, seed: int, progress: Progress
) -> None:
    pin = weights.embed.is_cuda
    num_threads = os.cpu_count() or 1
    with ThreadPoolExecutor(2, thread_name_prefix="prepare") as background:
        if tensors is not None:
            arenas = (
                (weights.pages.arena, kv.arena) if pin else ()
            )  # without a GPU, memory comes as it is used
            ready = [background.submit(arena.prepare, pin=pin, num_threads=num_threads) for arena in arenas]
            checkpoint.load(tensors, weights, progress=progress)
        else:
            ready = [background.submit(kv.arena.prepare, pin=pin, num_threads=num_threads)] if pin else []
            _fill_randomly(weights, seed, pin, num_threads, progress)
        for future in ready:
            future.result()


def _fill_randomly(weights: Weights, seed: int, pin: bool, num_threads: int, progress: Progress) -> None:
    random = RandomWeights(weights, seed)
    random.fill_device()
    total, page_bytes = weights.num_bytes, weights.pages.host[:1].nbytes
    done = total - weights.pages.arena.num_bytes

    def fill_rows(start: int, stop: int) -> None:
        nonlocal done
        random.fill_rows(start, stop)
        done += (stop - start) * page_bytes
        progress(done, total)

    weights.pages.arena.prepare(pin=pin, num_threads=num_threads, on_rows=fill_rows)
