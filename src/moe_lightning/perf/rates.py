"""How long each task of a pass takes: from datasheets, or from what a machine was measured to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.profile import GpuProfile, Profile
from moe_lightning.hardware.spec import HardwareSpec
from moe_lightning.perf.cost import (
    DTYPE_BYTES,
    PassWork,
    streamed_page_bytes,
    task_cost,
    task_seconds,
    unpack_bytes,
)
from moe_lightning.perf.memory import CPU_EXPERTS_AT_ONCE, EXPERTS_AT_ONCE
from moe_lightning.perf.shape import shape_of
from moe_lightning.pipeline.task import Lane, Task, TaskKind


class Rates(Protocol):
    """A machine as the simulation sees it."""

    def seconds(self, work: PassWork) -> Callable[[Task], float]:
        """A function that says how long each task of such a pass takes while the other lanes work."""

    @property
    def h2d(self) -> float:
        """Bytes/s of large copies to the GPU with nothing beside them."""

    @property
    def knows_cpu_experts(self) -> bool:
        """Whether it is known what experts take on the CPU."""


@dataclass(frozen=True)
class DatasheetRates:
    """Peaks times a share that is usually reached: on an H100, in the middle of 177 recorded steady states.

    Attributes:
        hardware: the machine.
        attention: share of host memory's rate that CPU attention reads at.
        products: share of the GPU's FLOP/s that products reach, with what else a sweep over experts takes.
        memory: share of the GPU memory's rate.
        to_gpu: share of the link's rate while the CPU reads host memory too. Copies of FlexGen's schedule, beside
            which the GPU attends, are taken to be as slow; on an H100 they reached 0.87.
        to_host: the same of what goes back, always beside pages.
    """

    hardware: HardwareSpec
    attention: float = 0.8
    products: float = 0.55
    memory: float = 0.65
    to_gpu: float = 0.82
    to_host: float = 0.77

    @property
    def h2d(self) -> float:
        """Bytes/s of large copies to the GPU."""
        return self.hardware.h2d

    @property
    def knows_cpu_experts(self) -> bool:
        """The CPU's peaks are."""
        return True

    def seconds(self, work: PassWork) -> Callable[[Task], float]:
        """Each task as slow as the slowest resource that it uses, and a launch.

        Pages come slower for as long as the CPU reads host memory, where a pass's work says how long that is.
        """
        alone = self.hardware.scaled(self.attention, self.products, self.memory)
        beside = replace(alone, h2d=self.to_gpu * alone.h2d, d2h=self.to_host * alone.d2h)

        def of(task: Task, machine: HardwareSpec = beside) -> float:
            return task_seconds(task_cost(task, work), task, machine, work.dtype)

        page, everyone = Task(TaskKind.LOAD_PAGE, Lane.H2D, 0, (), (), ()), tuple(range(len(work.tokens)))
        page_s = of(page)
        if work.streamed_pages is not None and work.num_prefill is not None:
            reads_s = _cpu_reads_s(
                work,
                lambda j: of(Task(TaskKind.ATTENTION, Lane.CPU, 0, (j,), (), ())),
                lambda: of(Task(TaskKind.CPU_EXPERTS, Lane.CPU, 0, everyone, (), ())),
            )
            longer = max(reads_s, work.streamed_pages * page_s)
            # Bytes come at one rate in about this share of the time, and at the other in the rest.
            reads = reads_s / longer if longer else 0.0
            page_s = 1 / (reads / page_s + (1 - reads) / of(page, alone))
        return lambda task: page_s if task.kind is TaskKind.LOAD_PAGE else of(task)


def _cpu_reads_s(work: PassWork, attends: Callable[[int], float], computes: Callable[[], float]) -> float:
    """Seconds of a pass in which the CPU reads K and V, or experts.

    Args:
        work: says which micro-batches decode.
        attends: seconds of a layer's attention of one of them.
        computes: seconds of a layer's experts for all.
    """
    sizes = list(zip(work.tokens, work.context_tokens, strict=True))
    counts = Counter(sizes[work.num_prefill or 0 :])
    found = (1 - work.kv_share) * sum(
        count * attends(sizes.index(size, work.num_prefill or 0)) for size, count in counts.items()
    )
    if work.cpu_share:
        found += work.cpu_share * computes()
    return work.spec.num_layers * found


@dataclass(frozen=True)
class MeasuredRates:
    """A profile's curves, at the sizes that tasks have.

    Raises:
        ConfigError: the profile is of a machine without a GPU.
    """

    profile: Profile

    def __post_init__(self) -> None:
        if self.profile.gpu is None:
            raise ConfigError(
                f"the profile is of a machine without a GPU ({self.profile.machine.cpu}); plan with one of a "
                "machine that has a GPU, or name a preset such as l4"
            )

    @property
    def _gpu(self) -> GpuProfile:
        assert self.profile.gpu is not None
        return self.profile.gpu

    @property
    def h2d(self) -> float:
        """Bytes/s of large copies to the GPU."""
        return self._gpu.link.fastest_h2d

    @property
    def hardware(self) -> HardwareSpec:
        """The machine's peaks, as they were measured."""
        return self.profile.hardware_spec()

    @property
    def knows_cpu_experts(self) -> bool:
        """Whether the profile has them; those of earlier versions do not, where there is a GPU."""
        return bool(self.profile.host.experts)

    def seconds(self, work: PassWork) -> Callable[[Task], float]:
        """Curves of the shapes nearest to the model's."""
        return _Measured(self.profile, self._gpu, work).of


@dataclass(frozen=True)
class LighterPages:
    """Another machine's rates for a model whose pages have a share of the bytes, with the same FLOPs."""

    rates: Rates
    share: float

    @property
    def h2d(self) -> float:
        """Bytes/s of large copies to the GPU."""
        return self.rates.h2d

    @property
    def knows_cpu_experts(self) -> bool:
        """As the rates: the CPU's experts keep their format."""
        return self.rates.knows_cpu_experts

    def seconds(self, work: PassWork) -> Callable[[Task], float]:
        """Copies of pages take that share of the time, all else as long as it did."""
        seconds = self.rates.seconds(work)
        return lambda task: seconds(task) * (self.share if task.kind is TaskKind.LOAD_PAGE else 1.0)


UNPACKING = 1.0  # of the rate at which the GPU copies its memory
_ATTENDING = 0.4  # of the same, for attention over KV in it
# Pages in passes take so much longer than profiles' beside the same lanes, in the middle of 119 recorded steady
# states: a profile's second meets fewer slow moments.
_IN_PASSES = 1.09
# What comes back from attention begins behind pages that are under way, and then takes so much longer beside them;
# in the middle of 120 recorded steady states with 2 to 13 MB at a time.
_BACK_S, _BACK_BESIDE = 45e-6, 0.45
# Kernels of a task beside products, and beside those that were measured one behind the other.
_EMBED_KERNELS, _PREFILL_KERNELS, _SAMPLE_KERNELS = 8, 2, 8


class _Measured:
    def __init__(self, profile: Profile, gpu: GpuProfile, work: PassWork) -> None:
        self._gpu, self._host, self._work = gpu, profile.host, work
        spec, a, dtype = work.spec, work.spec.attention, work.dtype
        self._size = DTYPE_BYTES[dtype]
        self._shape = shape_of(spec, "", self._size)
        self._attention = profile.host.attention_like(a.num_heads, a.num_kv_heads, a.head_dim, dtype)
        self._experts = gpu.experts_like(self._shape, dtype)
        self._qkv = gpu.dense_like(spec.hidden_size, a.qkv_size, dtype)
        self._output = gpu.dense_like(a.q_size, spec.hidden_size, dtype)
        self._head = gpu.dense_like(spec.hidden_size, spec.vocab_size, dtype)
        self._prefill = gpu.prefill_like(a.num_heads, a.num_kv_heads, a.head_dim, dtype)
        self._decode = gpu.decode_like(a.num_heads, a.num_kv_heads, a.head_dim, dtype)
        self._small = small = gpu.small_like(spec.hidden_size, spec.experts.num_experts)
        if small:
            like, hidden = small.shape, small.shape.hidden_size
            self._products = {
                TaskKind.PRE_ATTENTION: (
                    small.pre_attention, gpu.dense_like(hidden, like.qkv_size, small.dtype), hidden, like.qkv_size
                ),
                TaskKind.POST_ATTENTION: (
                    small.post_attention, gpu.dense_like(like.q_size, hidden, small.dtype), like.q_size, hidden
                ),
            }  # fmt: skip
        link = gpu.link
        self._slowed = link.fastest_h2d / link.slowest_h2d
        self._page_slowed, self._beside_pages = self._together()
        # Copies to the host run beside both: pages, as was measured, and attention, which slows all copies alike.
        self._d2h_slowed = self._slowed * link.to_host.rate_at(link.d2h.sizes[-1]) / link.d2h_beside_h2d

    def _together(self) -> tuple[float, float]:
        """How many times as long pages take as alone, and in what share of the time they come.

        Beside attention, its copies and what the GPU computes pages come as slowly as was measured; in the rest of
        a pass as if alone. How long that is, is what is left when the slower of both never waits; where nobody says
        what a pass has, both never end.
        """
        work = self._work
        if work.streamed_pages is None or work.num_prefill is None:
            return _IN_PASSES * self._slowed, 1.0
        reads_s = _cpu_reads_s(
            work,
            lambda j: self._attends(work.tokens[j], work.context_tokens[j]),
            lambda: self._on_cpu(sum(work.tokens)),
        )
        page_s = _IN_PASSES * self._gpu.link.to_gpu.seconds_at(streamed_page_bytes(work)) * self._slowed
        pages_s = work.streamed_pages * page_s
        longer = max(reads_s, pages_s)
        if not longer:
            return _IN_PASSES * self._slowed, 0.0
        # Bytes come at one rate in this share of the time, and at the other in the rest.
        reads = reads_s / longer
        return _IN_PASSES / (reads / self._slowed + 1 - reads), pages_s / longer

    def _attends(self, tokens: int, context: int) -> float:
        a = self._work.spec.attention
        kv_bytes, heads = context * 2 * a.kv_size * self._size, a.num_kv_heads
        mean = context / max(tokens, 1)
        seconds = self._attention.seconds(tokens, mean, kv_bytes, num_kv_heads=heads, under_copies=True)
        return seconds + self._between_lanes

    def _on_cpu(self, tokens: int) -> float:
        """Seconds of a layer's experts on the CPU."""
        experts = self._host.experts_like(self._shape, self._work.dtype)
        turns, rest = divmod(tokens, CPU_EXPERTS_AT_ONCE)
        seconds = turns * experts.seconds(self._shape, CPU_EXPERTS_AT_ONCE) if turns else 0.0
        return seconds + (experts.seconds(self._shape, rest) if rest else 0.0)

    def of(self, task: Task) -> float:
        work = self._work
        tokens = sum(work.tokens[j] for j in task.micro_batches)
        if task.kind is TaskKind.ATTENTION:
            return self._attends(tokens, sum(work.context_tokens[j] for j in task.micro_batches))
        if task.kind is TaskKind.CPU_EXPERTS:
            return self._on_cpu(tokens) + self._between_lanes
        if task.lane is Lane.GPU:
            return self._on_gpu(task, tokens)
        return self._copied(task, task_cost(task, work).link_bytes)

    def _copied(self, task: Task, size: int) -> float:
        link, store = self._gpu.link, self._prefill.store
        if task.kind is TaskKind.STORE_KV:  # by kernels, to places that are apart
            return store.seconds_at(size) if store else size / (link.kv_store or link.d2h_beside_h2d)
        if task.lane is Lane.D2H:
            return link.to_host.seconds_at(size) * self._d2h_slowed
        seconds = link.to_gpu.seconds_at(size)
        if task.kind is TaskKind.LOAD_PAGE:
            return max(seconds * self._page_slowed, self._gpu.lanes.h2d_gap_s)
        seconds *= self._slowed
        if task.lane is Lane.BACK:  # what it takes from pages is in their rate
            return seconds + self._beside_pages * (_BACK_S + _BACK_BESIDE * seconds)
        return seconds

    def _on_gpu(self, task: Task, tokens: int) -> float:
        work, lanes = self._work, self._gpu.lanes
        spec, a, gap = work.spec, work.spec.attention, lanes.gpu_gap_s
        match task.kind:
            case TaskKind.EMBED:  # the launcher has no lead when a pass begins
                launches = lanes.gpu_launch_s + (_EMBED_KERNELS - 1) * lanes.gpu_kernel_launch_s
                return max(self._touched_s(task) + _EMBED_KERNELS * gap, launches)
            case TaskKind.PRE_ATTENTION:
                return (
                    self._qkv.seconds(spec.hidden_size, a.qkv_size, tokens) + self._beside(task, tokens) + gap
                )
            case TaskKind.POST_ATTENTION:
                return (
                    self._output.seconds(a.q_size, spec.hidden_size, tokens)
                    + self._beside(task, tokens)
                    + gap
                )
            case TaskKind.PREFILL_ATTENTION:
                mean = work.context_tokens[task.micro_batches[0]] * 2 / max(tokens, 1)
                flops = task_cost(task, work).flops
                return self._prefill.seconds(max(mean, 1.0), flops) + _PREFILL_KERNELS * gap
            case TaskKind.RESIDENT_ATTENTION | TaskKind.GPU_ATTENTION:
                return self._attends_on_gpu(task, tokens) + gap
            case TaskKind.EXPERTS:
                share = work.num_experts_in(task.part) / spec.experts.num_experts
                return self._unpacked(task) + self._swept(tokens, share) + gap
            case TaskKind.SAMPLE:
                rows = max(sum(work.sampled_rows[j] for j in task.micro_batches), 1)
                product = self._head.seconds(spec.hidden_size, spec.vocab_size, rows)
                return product + self._moved_s(task, tokens) + _SAMPLE_KERNELS * gap
        return self._touched_s(task) + gap

    def _touched_s(self, task: Task) -> float:
        """What all bytes of a task in GPU memory take."""
        return task_cost(task, self._work).device_bytes / self._gpu.memory

    def _attends_on_gpu(self, task: Task, tokens: int) -> float:
        """Seconds of attention over KV that stays there; by a guess where nobody measured it."""
        a, context = self._work.spec.attention, sum(self._work.context_tokens[j] for j in task.micro_batches)
        if self._decode is None:
            rate = _ATTENDING * self._gpu.memory
        else:
            rate = self._decode.rate.rate_at(context / max(tokens, 1))
        return context * 2 * a.kv_size * self._size / rate

    def _swept(self, tokens: int, share: float) -> float:
        """Seconds of a sweep: of several where there are more tokens than are computed at once."""
        turns, rest = divmod(tokens, EXPERTS_AT_ONCE)
        seconds = turns * self._experts.seconds(self._shape, EXPERTS_AT_ONCE, share) if turns else 0.0
        return seconds + (self._experts.seconds(self._shape, rest, share) if rest or not turns else 0.0)

    def _unpacked(self, task: Task) -> float:
        size = unpack_bytes(self._work, task)
        return size / (UNPACKING * self._gpu.memory) + self._gpu.lanes.gpu_gap_s if size else 0.0

    @property
    def _between_lanes(self) -> float:
        """From the copy of queries to attention and on to the copy of its outputs."""
        return self._gpu.lanes.cpu_round_trip_s / 2

    def _beside(self, task: Task, tokens: int) -> float:
        """What a task takes beyond its product: as measured, else what its bytes take."""
        if self._small is None:
            return self._moved_s(task, tokens)
        rows = self._small.rows_of(self._work.spec.hidden_size, tokens)
        times, dense, inputs, outputs = self._products[task.kind]
        if not self._small.is_whole:
            return times.seconds_at(rows)
        return max(0.0, times.seconds_at(rows) - dense.seconds(inputs, outputs, rows))

    def _moved_s(self, task: Task, tokens: int) -> float:
        """What small kernels take to read and write in GPU memory: norms, rotation, copies, logits."""
        spec, a, work = self._work.spec, self._work.spec.attention, self._work
        if task.kind is TaskKind.PRE_ATTENTION:
            elements = tokens * (2 * spec.hidden_size + 2 * a.qkv_size)
        elif task.kind is TaskKind.POST_ATTENTION:
            elements = tokens * 4 * spec.hidden_size
        else:
            rows = sum(work.sampled_rows[j] for j in task.micro_batches)
            elements = rows * (2 * spec.hidden_size + 6 * spec.vocab_size)
        return elements * self._size / self._gpu.memory
