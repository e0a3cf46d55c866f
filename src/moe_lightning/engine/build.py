"""From a policy to a worker: memory taken, weights in place."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from moe_lightning.engine.worker import Worker
from moe_lightning.errors import GPUMemoryError
from moe_lightning.hardware.gpu_memory import pci_bus_id
from moe_lightning.hardware.numa import gpu_node
from moe_lightning.kernels import ops
from moe_lightning.memory import checkpoint
from moe_lightning.memory.arena import Arena, HostArena, OnRows
from moe_lightning.memory.dummy import RandomWeights
from moe_lightning.memory.kv_cache import KVCache
from moe_lightning.memory.layout import PageLayout, Placement
from moe_lightning.memory.shared_arena import SharedArena
from moe_lightning.memory.weights import Weights, allocate
from moe_lightning.models.spec import ModelSpec
from moe_lightning.pipeline.shape import layers_keeping_kv, layers_on_cpu, pages_of_largest_part
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
    shared: SharedArena | None = None,
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
        shared: host memory that earlier engines have used, with random weights; the last of them must be gone.

    Raises:
        CheckpointError: a file cannot be read.
        ConfigError: the system has no such memory; of GPU memory `GPUMemoryError`.
    """
    lanes = make_executor(executor, device)
    layout = PageLayout.of(spec, policy.pages_per_expert, packed=policy.packed)
    placement = Placement(
        layout.pages_per_layer, policy.resident_pages, policy.num_frames, layers_on_cpu(policy)
    )
    try:
        pages, blocks = (shared.pages, shared.blocks) if shared else (HostArena, HostArena)
        sweep = pages_of_largest_part(policy, spec.experts.num_experts)
        weights = allocate(spec, layout, placement, dtype, device, pages, sweep)
        kv = KVCache(
            spec.num_layers, spec.attention, policy.num_blocks, policy.block_size, dtype, blocks,
            kept=layers_keeping_kv(policy), device=device,
        )  # fmt: skip
        _fill_and_compile(weights, kv, policy, tensors, seed, progress)
        return Worker(weights, policy, kv, lanes, device)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise GPUMemoryError(
            f"the policy does not fit in GPU memory ({str(error).splitlines()[0]}); lower gpu_memory if other "
            "processes hold some of it, or give a policy with fewer resident_pages"
        ) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    """PyTorch's own refusal, or what the driver and its libraries say when they find no memory."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text


def make_executor(name: str, device: torch.device) -> Executor:
    """The executor of a setting's name on a device."""
    if device.type == "cuda":
        is_serial = name == "serial"
        return SerialExecutor(torch.cuda.synchronize) if is_serial else CudaExecutor(device)
    return ThreadedExecutor() if name == "threads" else SerialExecutor()


def _fill_and_compile(
    weights: Weights,
    kv: KVCache,
    policy: Policy,
    tensors: checkpoint.Tensors | None,
    seed: int,
    progress: Progress,
) -> None:
    """Weights come in, and the kernels that passes will need are compiled meanwhile."""
    stopped = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="compile") as background:
        compiled = background.submit(_compile, weights, policy, stopped)
        try:
            _fill(weights, kv, tensors, seed, progress)
        except BaseException:
            stopped.set()  # nobody waits for kernels after that
            raise
        compiled.result()
    if weights.embed.is_cuda:  # weights came, and kernels ran, on other streams than passes run on
        torch.cuda.synchronize()


def _compile(weights: Weights, policy: Policy, stopped: threading.Event) -> None:
    spec, pages, unpacked = weights.spec, weights.pages, weights.pages.unpacked
    layers = (layer for layer in range(spec.num_layers) if layer not in pages.placement.on_cpu)
    layer = next(layers, None)
    if layer is None:  # the GPU computes no experts and has no page
        return
    rows, table = (unpacked.pages, unpacked.table) if unpacked else (pages.frames, pages.page_table[layer])
    sweeps = {policy.expert_parts: range(1, policy.max_num_seqs + policy.prefill_tokens + 1)}
    ops.compile_experts(
        rows, table, policy.pages_per_expert, spec.hidden_size, spec.experts.top_k, sweeps, stopped=stopped
    )


def _fill(
    weights: Weights, kv: KVCache, tensors: checkpoint.Tensors | None, seed: int, progress: Progress
) -> None:
    device = weights.embed.device
    has_gpu = device.type == "cuda"
    node = gpu_node(pci_bus_id(device.index)) if has_gpu else None

    def bring_in(arena: Arena, on_rows: OnRows | None = None, *, pin: bool = has_gpu) -> None:
        arena.prepare(pin=pin, num_threads=os.cpu_count() or 1, node=node, on_rows=on_rows)

    with ThreadPoolExecutor(2, thread_name_prefix="prepare") as background:
        # Without a GPU, memory comes as it is used.
        ready = [background.submit(bring_in, kv.arena)] if has_gpu else []
        if tensors is None:
            random = RandomWeights(weights, seed)
            random.fill_device()
            fill, fill_of_cpu = _with_progress(random, weights, progress)
            bring_in(weights.pages.arena, fill)
            if weights.pages.cpu_arena.num_bytes:
                bring_in(weights.pages.cpu_arena, fill_of_cpu, pin=False)
        else:
            if has_gpu:
                ready.append(background.submit(bring_in, weights.pages.arena))
                if weights.pages.cpu_arena.num_bytes:
                    ready.append(background.submit(bring_in, weights.pages.cpu_arena, pin=False))
            checkpoint.load(tensors, weights, progress=progress)
        for future in ready:
            future.result()


def _with_progress(random: RandomWeights, weights: Weights, progress: Progress) -> tuple[OnRows, OnRows]:
    """Fill rows of the streamed pages, and of the CPU's, and count them; the others are in place already."""
    pages, mutex = weights.pages, threading.Lock()
    total = weights.num_bytes
    done = total - pages.arena.num_bytes - pages.cpu_arena.num_bytes

    def counted(fill_rows: OnRows, page_bytes: int) -> OnRows:
        def fill(start: int, stop: int) -> None:
            nonlocal done
            fill_rows(start, stop)
            with mutex:
                done += (stop - start) * page_bytes
                progress(done, total)

        return fill

    return (
        counted(random.fill_rows, pages.host[:1].nbytes),
        counted(random.fill_cpu_rows, pages.cpu_arena.tensor[:1].nbytes),
    )
