"""The operators of a model as points of the Hierarchical Roofline Model, from the costs of their tasks."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lightning.errors import ConfigError
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.cost import PassWork, task_cost
from moe_lightning.pipeline.task import Lane, Task, TaskKind


@dataclass(frozen=True)
class Operator:
    """A computation of one layer.

    Attributes:
        name: what it is.
        size: what it is drawn for: its context length or micro-batch size, in tokens.
        flops: FLOPs.
        gpu_bytes: bytes of GPU memory that it reads and writes where the GPU computes it.
        host_bytes: bytes of host memory that it takes: where the CPU computes it, or to bring them to the GPU.
    """

    name: str
    size: int
    flops: int
    gpu_bytes: int
    host_bytes: int

    @property
    def gpu_intensity(self) -> float:
        """I_x^i: FLOPs per byte of GPU memory."""
        return self.flops / self.gpu_bytes

    @property
    def host_intensity(self) -> float:
        """I_x^j: FLOPs per byte of host memory."""
        return self.flops / self.host_bytes


def decode_attention(spec: ModelSpec, dtype: str, context_len: int) -> Operator:
    """Attention of one new token over a context that includes it; more sequences change no intensity.

    Raises:
        ConfigError: the context holds no token.
    """
    _check_positive("context_len", context_len)
    keys = min(context_len, spec.attention.sliding_window or context_len)
    work = PassWork(spec, dtype, 1, (1,), (keys,), (1,))
    on_gpu = task_cost(_task(TaskKind.GPU_ATTENTION, Lane.GPU), work)
    on_cpu = task_cost(_task(TaskKind.ATTENTION, Lane.CPU), work)
    return Operator("decode attention", context_len, on_cpu.flops, on_gpu.device_bytes, on_cpu.host_bytes)


def experts(
    spec: ModelSpec, dtype: str, micro_batch_size: int, num_tokens: int | None = None, streamed: float = 1.0
) -> Operator:
    """The experts of one layer over a pass, in micro-batches that each read them from GPU memory.

    Args:
        spec: the model.
        dtype: of the weights.
        micro_batch_size: tokens that share one reading from GPU memory.
        num_tokens: of the pass, which share one transfer from host memory; a multiple of the micro-batch size.
            Default: one micro-batch.
        streamed: share of the weights that is not resident (the paper's 1 - r_w).

    Raises:
        ConfigError: a number is out of range.
    """
    _check_positive("micro_batch_size", micro_batch_size)
    num_tokens = micro_batch_size if num_tokens is None else num_tokens
    if num_tokens < micro_batch_size or num_tokens % micro_batch_size:
        raise ConfigError(f"num_tokens={num_tokens}: give a multiple of micro_batch_size={micro_batch_size}")
    if not 0 < streamed <= 1:
        raise ConfigError(f"streamed={streamed}: give a share above 0 and up to 1")
    count = num_tokens // micro_batch_size
    work = PassWork(spec, dtype, 1, (micro_batch_size,), (micro_batch_size,), (0,))
    sweep = task_cost(_task(TaskKind.EXPERTS, Lane.GPU), work)
    page = task_cost(Task(TaskKind.LOAD_PAGE, Lane.H2D, 0, (), (), ()), work)  # a whole expert
    layer_bytes = page.host_bytes * spec.experts.num_experts
    return Operator(
        "experts",
        micro_batch_size,
        count * sweep.flops,
        count * sweep.device_bytes,
        round(layer_bytes * streamed),
    )


def _task(kind: TaskKind, lane: Lane) -> Task:
    return Task(kind, lane, 0, (0,), (), ())


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name}={value}: give 1 or more")
