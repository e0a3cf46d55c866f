"""The schedules that the paper compares CGOPipe with, over the same tasks and buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from moe_lightning.pipeline import cgopipe
from moe_lightning.pipeline.builder import PassBuilder
from moe_lightning.pipeline.cgopipe import LookAhead, close_group, pages_due, prefill
from moe_lightning.pipeline.task import PassShape, Schedule

_KV_SLOTS = 2  # one is attended to while the next is filled
# Schedules that attend to decode sequences on the GPU, and how many staging slots for KV each needs there.
STAGING_SLOTS = {"flexgen": _KV_SLOTS}


def _builder(shape: PassShape) -> PassBuilder:
    """A builder of passes that sweep whole layers and keep all KV in host memory, as all of these do."""
    return PassBuilder(replace(shape, part_pages=(), kv_every=0, cpu_every=0))


def no_overlap(shape: PassShape) -> Schedule:
    """One task at a time: each waits for the one launched before it."""
    builder = _builder(shape)
    for layer in range(shape.num_layers):
        builder.load_pages(builder.pages_before(layer + 1))
        for j in range(shape.num_micro_batches):
            _attend_on_cpu(builder, layer, j)
            builder.post_attention(layer, j)
            close_group(builder, layer, j)
    builder.load_pages(_all_pages(builder))
    return _serial(builder.finish("no_overlap"))


def _serial(schedule: Schedule) -> Schedule:
    tasks = schedule.tasks
    deps = tuple(
        (t - 1,) if t > 0 and tasks[t - 1].lane is not task.lane else () for t, task in enumerate(tasks)
    )
    return Schedule(schedule.name, schedule.shape, tasks, deps)


def flexgen(shape: PassShape) -> Schedule:
    """Decode attention on the GPU; the next micro-batch's KV and pages of the next layer come meanwhile."""
    builder = _builder(shape)
    prefetch = _KVPrefetch(builder)
    prefetch.launch(1)
    for layer in range(shape.num_layers):
        for j in range(shape.num_micro_batches):
            if j < shape.num_prefill:
                prefill(builder, layer, j)
            else:
                position = layer * shape.num_decode + j - shape.num_prefill
                prefetch.launch(position + _KV_SLOTS)
                builder.pre_attention(layer, j)
                builder.store_kv(layer, j)
                builder.gpu_attention(layer, j, position % _KV_SLOTS)
            builder.load_pages(pages_due(builder, layer, j))
            builder.post_attention(layer, j)
            close_group(builder, layer, j)
    return builder.finish("flexgen")


class _KVPrefetch:
    """Launches the KV loads of decode micro-batches, those of all layers being one sequence."""

    def __init__(self, builder: PassBuilder) -> None:
        self._builder = builder
        self._launched = 0

    def launch(self, target: int) -> None:
        """Launch until `target` micro-batches of the sequence are launched."""
        shape = self._builder.shape
        while self._launched < min(target, shape.num_layers * shape.num_decode):
            layer, decode = divmod(self._launched, shape.num_decode)
            self._builder.load_kv(layer, shape.num_prefill + decode, self._launched % _KV_SLOTS)
            self._launched += 1


def flexgen_cpu(shape: PassShape) -> Schedule:
    """Decode attention on the CPU, each micro-batch finished before the next begins; pages come meanwhile."""
    builder = _builder(shape)
    for layer in range(shape.num_layers):
        for j in range(shape.num_micro_batches):
            _attend_on_cpu(builder, layer, j)
            builder.load_pages(pages_due(builder, layer, j))
            builder.post_attention(layer, j)
            close_group(builder, layer, j)
    return builder.finish("flexgen_cpu")


def whole_layer(shape: PassShape) -> Schedule:
    """CGOPipe but for the weights: all pages of the next layer are copied at once.

    They go out at the start of a layer, so that its first attention output waits behind them. Where the ring
    has no room for a second layer, the rest follows when this layer is done with its own.
    """
    builder = _builder(shape)
    ahead = LookAhead(builder)
    ahead.launch(shape.look_ahead)
    for layer in range(shape.num_layers):
        is_last = layer == shape.num_layers - 1
        builder.load_pages(_all_pages(builder) if is_last else builder.pages_before(layer + 2))
        for j in range(shape.num_micro_batches):
            if j < shape.num_prefill:
                prefill(builder, layer, j)
            else:
                ahead.launch(ahead.position(layer, j) + 1)
                builder.load_hidden(layer, j)
            builder.post_attention(layer, j)
            close_group(builder, layer, j)
            if j >= shape.num_prefill:
                ahead.launch(ahead.position(layer, j) + 1 + shape.look_ahead)
    return builder.finish("whole_layer")


def _attend_on_cpu(builder: PassBuilder, layer: int, j: int) -> None:
    if j < builder.shape.num_prefill:
        prefill(builder, layer, j)
        return
    builder.pre_attention(layer, j)
    builder.offload_qkv(layer, j)
    builder.attention(layer, j)
    builder.load_hidden(layer, j)


def _all_pages(builder: PassBuilder) -> int:
    return builder.pages_before(builder.shape.num_layers) + builder.shape.pages_ahead


SCHEDULES: dict[str, Callable[[PassShape], Schedule]] = {
    "cgopipe": cgopipe.build,
    "flexgen": flexgen,
    "flexgen_cpu": flexgen_cpu,
    "no_overlap": no_overlap,
    "whole_layer": whole_layer,
}
