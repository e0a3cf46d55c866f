"""FLOPs and bytes of each task of a pass, and the least time a machine needs for them.

Counted are matrix products, weights read once, and activations as often as the task's buffers are read and
written. Left out: element-wise arithmetic, routing indices, and what a kernel spills between its own parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.spec import HardwareSpec
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.page_size import page_bytes
from moe_lightning.pipeline.shape import experts_in
from moe_lightning.pipeline.task import Lane, Task, TaskKind

_ROUTE_BYTES = 8 + 4  # of an expert's id and its weight
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Cost:
    """What a task uses: FLOPs where it runs, bytes of GPU memory, of host memory and over the link."""

    flops: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    link_bytes: int = 0


@dataclass(frozen=True)
class PassWork:
    """What the tasks of a pass work on; the sequences have an entry per micro-batch.

    Attributes:
        spec: the model.
        dtype: of weights, activations and KV.
        pages_per_expert: slices of an expert's intermediate dimension.
        tokens: tokens that go through the layers.
        context_tokens: keys attended to, summed over the tokens: a decode token attends to its sequence up to
            and with itself, the i-th of a prompt to i; no token to more than the sliding window.
        sampled_rows: tokens whose logits are computed.
        expert_parts: sweeps over a layer's experts; tokens are taken to reach all experts alike.
        unpacked_for: the micro-batch whose sweep comes first and unpacks pages for all; None: they are not packed.
        first_part_at_once: sweeps of the first of several parts come in the order of micro-batches.
        num_prefill: micro-batches of prompts, which come before those that decode; None where nobody says.
        streamed_pages: that come to the GPU in the pass; None where nobody says.
        kv_share: of the layers, those that have their KV on the GPU.
        cpu_share: of the layers, those whose experts the CPU computes.

    Raises:
        ConfigError: the dtype is not known, or the pages are not equal slices.
    """

    spec: ModelSpec
    dtype: str
    pages_per_expert: int
    tokens: tuple[int, ...]
    context_tokens: tuple[int, ...]
    sampled_rows: tuple[int, ...]
    expert_parts: int = 1
    unpacked_for: int | None = None
    first_part_at_once: bool = False
    num_prefill: int | None = None
    streamed_pages: int | None = None
    kv_share: float = 0.0
    cpu_share: float = 0.0

    def num_experts_in(self, part: int) -> int:
        """Experts that a part sweeps."""
        return len(experts_in(self.spec.experts.num_experts, self.expert_parts, part))

    def swept_first(self, part: int) -> int | None:
        """The micro-batch whose sweep over a part comes first; None where nobody asks, as pages are not packed."""
        is_at_once = self.first_part_at_once and part == 0 and self.expert_parts > 1
        return 0 if is_at_once else self.unpacked_for

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"dtype {self.dtype!r} has no known size; use {', '.join(DTYPE_BYTES)}")
        size = self.spec.experts.intermediate_size
        if self.pages_per_expert < 1 or size % self.pages_per_expert:
            raise ConfigError(
                f"pages_per_expert={self.pages_per_expert} does not divide the intermediate size {size}; "
                "give a divisor"
            )
        assert len(self.tokens) == len(self.context_tokens) == len(self.sampled_rows)


def task_cost(task: Task, work: PassWork) -> Cost:
    """FLOPs and bytes of one task."""
    return _COSTS[task.kind](work, task)


def task_seconds(cost: Cost, task: Task, hardware: HardwareSpec, dtype: str) -> float:
    """Seconds of a task that has its lane's resources to itself: those of the slowest, and the launch.

    Raises:
        ConfigError: the device that computes has no rate for the dtype.
    """
    gpu, cpu = hardware.gpu, hardware.cpu
    device_s, host_s = cost.device_bytes / gpu.bandwidth, cost.host_bytes / cpu.bandwidth
    if task.lane is Lane.GPU:
        slowest = max(cost.flops / gpu.peak_flops(dtype), device_s)
    elif task.lane is Lane.CPU:
        slowest = max(cost.flops / cpu.peak_flops(dtype), host_s)
    else:
        link = hardware.d2h if task.lane is Lane.D2H else hardware.h2d
        slowest = max(cost.link_bytes / link, device_s, host_s)
    return slowest + hardware.launch_s


def _tokens(work: PassWork, task: Task) -> int:
    return sum(work.tokens[j] for j in task.micro_batches)


def _context(work: PassWork, task: Task) -> int:
    return sum(work.context_tokens[j] for j in task.micro_batches)


def _gpu(work: PassWork, flops: int, elements: int) -> Cost:
    return Cost(flops=flops, device_bytes=elements * DTYPE_BYTES[work.dtype])


def _copy(work: PassWork, elements: int) -> Cost:
    size = elements * DTYPE_BYTES[work.dtype]
    return Cost(device_bytes=size, host_bytes=size, link_bytes=size)


def _embed(work: PassWork, task: Task) -> Cost:
    return _gpu(work, 0, 2 * _tokens(work, task) * work.spec.hidden_size)


def _pre_attention(work: PassWork, task: Task) -> Cost:
    t, h, qkv = _tokens(work, task), work.spec.hidden_size, work.spec.attention.qkv_size
    return _gpu(work, 2 * t * h * qkv, h + h * qkv + t * (h + qkv))


def _offload_qkv(work: PassWork, task: Task) -> Cost:
    return _copy(work, _tokens(work, task) * work.spec.attention.qkv_size)


def _load_hidden(work: PassWork, task: Task) -> Cost:
    return _copy(work, _tokens(work, task) * work.spec.attention.q_size)


def _store_kv(work: PassWork, task: Task) -> Cost:
    return _copy(work, _tokens(work, task) * 2 * work.spec.attention.kv_size)


def _load_kv(work: PassWork, task: Task) -> Cost:
    """The new token's own K and V are on the GPU already; what whole blocks hold beyond them is not counted."""
    return _copy(work, (_context(work, task) - _tokens(work, task)) * 2 * work.spec.attention.kv_size)


def _attention_flops(work: PassWork, task: Task) -> int:
    """Each query head has two products with each key: q k and p v."""
    return 4 * _context(work, task) * work.spec.attention.q_size


def _decode_elements(work: PassWork, task: Task) -> int:
    """The cache without the new token, q, k and v of the new token, and the output."""
    a, t = work.spec.attention, _tokens(work, task)
    return (_context(work, task) - t) * 2 * a.kv_size + t * (a.qkv_size + a.q_size)


def _attention(work: PassWork, task: Task) -> Cost:
    """On the CPU, which also appends the new K and V to the cache."""
    appended = _tokens(work, task) * 2 * work.spec.attention.kv_size
    size = (_decode_elements(work, task) + appended) * DTYPE_BYTES[work.dtype]
    return Cost(flops=_attention_flops(work, task), host_bytes=size)


def _gpu_attention(work: PassWork, task: Task) -> Cost:
    return _gpu(work, _attention_flops(work, task), _decode_elements(work, task))


def _resident_attention(work: PassWork, task: Task) -> Cost:
    """The same, and the new K and V appended."""
    appended = _tokens(work, task) * 2 * work.spec.attention.kv_size
    return _gpu(work, _attention_flops(work, task), _decode_elements(work, task) + appended)


def _keep_kv(work: PassWork, task: Task) -> Cost:
    """Read where they were computed, and written to the cache."""
    return _gpu(work, 0, 2 * _tokens(work, task) * 2 * work.spec.attention.kv_size)


def _prefill_attention(work: PassWork, task: Task) -> Cost:
    """Keys of earlier chunks are not counted as bytes: the products outweigh them by far."""
    a = work.spec.attention
    return _gpu(work, _attention_flops(work, task), _tokens(work, task) * (a.qkv_size + a.q_size))


def _post_attention(work: PassWork, task: Task) -> Cost:
    t, h, q = _tokens(work, task), work.spec.hidden_size, work.spec.attention.q_size
    experts = work.spec.experts
    router = experts.num_experts if experts.router else 0
    # The residual stream is read and written, the input of the experts written.
    return _gpu(work, 2 * t * h * (q + router), h * (q + router) + h + t * (q + 3 * h))


def _load_page(work: PassWork, _: Task) -> Cost:
    size = streamed_page_bytes(work)
    return Cost(device_bytes=size, host_bytes=size, link_bytes=size)


def streamed_page_bytes(work: PassWork) -> int:
    """Of a page as it comes over the link."""
    return _page_bytes(work, packed=work.unpacked_for is not None)


def _page_bytes(work: PassWork, *, packed: bool) -> int:
    rows = work.spec.experts.intermediate_size // work.pages_per_expert
    return page_bytes(work.spec.hidden_size, rows, DTYPE_BYTES[work.dtype], packed=packed)


def unpack_bytes(work: PassWork, task: Task) -> int:
    """GPU memory that a sweep reads and writes to unpack its pages; 0 if another did, or pages are not packed."""
    if work.unpacked_for is None or work.swept_first(task.part) not in task.micro_batches:
        return 0
    pages = work.num_experts_in(task.part) * work.pages_per_expert
    return pages * (_page_bytes(work, packed=True) + _page_bytes(work, packed=False))


def _experts(work: PassWork, task: Task) -> Cost:
    """One sweep over a part of the experts, of which t tokens reach no more than top_k t."""
    t, h, e = _tokens(work, task), work.spec.hidden_size, work.spec.experts
    weights = 3 * h * e.intermediate_size  # of one expert
    swept = work.num_experts_in(task.part)
    slots = e.top_k * t * swept // e.num_experts
    reached = min(swept, e.top_k * t)
    # The experts' input is read, the residual stream read and written.
    swept_once = _gpu(work, 2 * slots * weights, reached * weights + 3 * t * h)
    return replace(swept_once, device_bytes=swept_once.device_bytes + unpack_bytes(work, task))


def _offload_inputs(work: PassWork, task: Task) -> Cost:
    """Rows, with the ids and weights of the experts that each goes to."""
    t, e = _tokens(work, task), work.spec.experts
    size = t * (work.spec.hidden_size * DTYPE_BYTES[work.dtype] + e.top_k * _ROUTE_BYTES)
    return Cost(device_bytes=size, host_bytes=size, link_bytes=size)


def _cpu_experts(work: PassWork, task: Task) -> Cost:
    """All experts of the layer, which are not packed; rows are read and written in place."""
    t, h, e = _tokens(work, task), work.spec.hidden_size, work.spec.experts
    weights, slots = 3 * h * e.intermediate_size, e.top_k * t
    size = (min(e.num_experts, slots) * weights + 2 * t * h) * DTYPE_BYTES[work.dtype]
    return Cost(flops=2 * slots * weights, host_bytes=size + slots * _ROUTE_BYTES)


def _add_outputs(work: PassWork, task: Task) -> Cost:
    """Copied to the GPU, read there again, and added to what is read and written."""
    copied = _copy(work, _tokens(work, task) * work.spec.hidden_size)
    return replace(copied, device_bytes=4 * copied.device_bytes)


def _sample(work: PassWork, task: Task) -> Cost:
    rows = sum(work.sampled_rows[j] for j in task.micro_batches)
    h, vocab = work.spec.hidden_size, work.spec.vocab_size
    return _gpu(work, 2 * rows * h * vocab, h + h * vocab + rows * (h + vocab) if rows else 0)


_COSTS: dict[TaskKind, Callable[[PassWork, Task], Cost]] = {
    TaskKind.EMBED: _embed,
    TaskKind.PRE_ATTENTION: _pre_attention,
    TaskKind.OFFLOAD_QKV: _offload_qkv,
    TaskKind.ATTENTION: _attention,
    TaskKind.LOAD_HIDDEN: _load_hidden,
    TaskKind.PREFILL_ATTENTION: _prefill_attention,
    TaskKind.STORE_KV: _store_kv,
    TaskKind.LOAD_KV: _load_kv,
    TaskKind.GPU_ATTENTION: _gpu_attention,
    TaskKind.RESIDENT_ATTENTION: _resident_attention,
    TaskKind.KEEP_KV: _keep_kv,
    TaskKind.POST_ATTENTION: _post_attention,
    TaskKind.LOAD_PAGE: _load_page,
    TaskKind.EXPERTS: _experts,
    TaskKind.OFFLOAD_INPUTS: _offload_inputs,
    TaskKind.CPU_EXPERTS: _cpu_experts,
    TaskKind.ADD_OUTPUTS: _add_outputs,
    TaskKind.SAMPLE: _sample,
}
