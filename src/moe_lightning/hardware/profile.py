"""What a machine was measured to do while its lanes run at once.

Plain values, read from and written to JSON. A model or geometry that was not measured takes the numbers of the
nearest one that was, scaled by what the work depends on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.curve import RateCurve, TimeCurve
from moe_lightning.hardware.kernel_times import (
    DecodeProfile,
    DenseProfile,
    ExpertsProfile,
    ModelShape,
    PrefillProfile,
    SmallKernels,
)
from moe_lightning.hardware.machine import Machine
from moe_lightning.hardware.spec import DeviceSpec, HardwareSpec
from moe_lightning.hardware.strict_json import decode

PROFILE_VERSION = 1
_OTHER_DTYPE = 100.0  # farther than any shape
_T = TypeVar("_T")


@dataclass(frozen=True)
class AttentionProfile:
    """Decode attention on the CPU: a call takes `call` and the bytes of K and V that it reads at `rate`.

    Attributes:
        num_heads: query heads.
        num_kv_heads: heads of keys and values.
        head_dim: elements of each.
        dtype: of K and V.
        rate: bytes of K and V a second by tokens that a sequence holds, nothing beside it.
        rate_under_copies: the same while copies to the GPU run at the link's rate.
        call: seconds of a call by sequences, when each holds its new token alone.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    rate: RateCurve
    rate_under_copies: RateCurve | None
    call: TimeCurve

    def seconds(
        self, num_seqs: int, context: float, kv_bytes: float, *, num_kv_heads: int, under_copies: bool
    ) -> float:
        """Seconds of a call over sequences of a mean context that reads so many bytes.

        A call is cut into sequences and KV heads: a sequence of a model that has more of these takes as many times
        what it takes here.
        """
        rate = self.rate_under_copies if under_copies and self.rate_under_copies else self.rate
        call = self.call.seconds_at(num_seqs * num_kv_heads / self.num_kv_heads)
        return call + kv_bytes / rate.rate_at(context)


@dataclass(frozen=True)
class HostProfile:
    """The CPU and its memory.

    Attributes:
        read: bytes/s that the attention's threads read.
        read_under_copies: the same while copies to the GPU run.
        flops: FLOP/s of a large product by dtype.
        attention: by geometry.
        experts: on the CPU, beside copies where there is a GPU; none where nobody measured.
    """

    read: float
    read_under_copies: float | None
    flops: dict[str, float] = field(hash=False)
    attention: tuple[AttentionProfile, ...]
    experts: tuple[ExpertsProfile, ...]

    def attention_like(
        self, num_heads: int, num_kv_heads: int, head_dim: int, dtype: str
    ) -> AttentionProfile:
        """The measured geometry nearest to this one: queries per KV head and head dimension count."""

        def distance(a: AttentionProfile) -> float:
            groups = _apart(a.num_heads / a.num_kv_heads, num_heads / num_kv_heads)
            return groups + _apart(a.head_dim, head_dim) + _OTHER_DTYPE * (a.dtype != dtype)

        return _nearest(self.attention, distance, "CPU attention")

    def experts_like(self, shape: ModelShape, dtype: str) -> ExpertsProfile:
        """The measured experts nearest to these."""
        return _experts_like(self.experts, shape, dtype)


@dataclass(frozen=True)
class LinkProfile:
    """Copies between host and GPU memory.

    Attributes:
        is_pinned: host memory could be page-locked; else all of this is through the driver's own buffer.
        h2d: seconds of a copy by bytes, one behind the other.
        d2h: the same the other way.
        h2d_beside_d2h: bytes/s to the GPU while copies run both ways.
        d2h_beside_h2d: bytes/s from the GPU meanwhile.
        h2d_beside_attention: bytes/s of pages to the GPU while the CPU attends, the GPU computes, and small copies
            go both ways.
        h2d_under_attention: the same without what the GPU computes and on average over attention and pauses of
            about its length, in profiles of earlier versions.
        kv_store: bytes/s of K and V that kernels write to host memory beside pages alone, in profiles of earlier
            versions; now `PrefillProfile.store`.
    """

    is_pinned: bool
    h2d: TimeCurve
    d2h: TimeCurve
    h2d_beside_d2h: float
    d2h_beside_h2d: float
    h2d_beside_attention: float | None = None
    h2d_under_attention: float | None = None
    kv_store: float | None = None

    @property
    def fastest_h2d(self) -> float:
        """Bytes/s of the largest copies to the GPU with nothing beside them."""
        return self.to_gpu.rate_at(self.h2d.sizes[-1])

    @cached_property
    def to_gpu(self) -> TimeCurve:
        """`h2d` without what disturbed larger copies more than smaller ones."""
        return self.h2d.never_slower()

    @cached_property
    def to_host(self) -> TimeCurve:
        """`d2h` likewise."""
        return self.d2h.never_slower()

    @property
    def slowest_h2d(self) -> float:
        """Bytes/s of the same while the CPU attends, as well as it is known."""
        return self.h2d_beside_attention or self.h2d_under_attention or self.fastest_h2d


@dataclass(frozen=True)
class LaneProfile:
    """What the executor adds to work, measured with tasks that do next to nothing.

    Attributes:
        gpu_launch_s: the launcher's seconds for a GPU task of one kernel.
        gpu_kernel_launch_s: for each further kernel of a task.
        h2d_launch_s: for a copy to the GPU.
        d2h_launch_s: for a copy to the host.
        cpu_launch_s: for a CPU task, its lane's thread included.
        gpu_gap_s: from the start of a GPU task to that of the next, all launched long before.
        h2d_gap_s: the same of copies to the GPU.
        d2h_gap_s: the same of copies to the host.
        stream_handover_s: from a task's start on a stream to the start of one on another stream that waits for it.
        cpu_round_trip_s: from the start of a copy to the host, through a CPU task that waits for it, to the start
            of the copy back that waits for that.
        h2d_hop: seconds by bytes from the start of a copy to the GPU to that of a GPU task that waits for it.
        d2h_hop: the same of a copy to the host.
    """

    gpu_launch_s: float
    gpu_kernel_launch_s: float
    h2d_launch_s: float
    d2h_launch_s: float
    cpu_launch_s: float
    gpu_gap_s: float
    h2d_gap_s: float
    d2h_gap_s: float
    stream_handover_s: float
    cpu_round_trip_s: float
    h2d_hop: TimeCurve
    d2h_hop: TimeCurve

    @property
    def mean_handover_s(self) -> float:
        """Mean over the four hops of a micro-batch's way through a layer: GPU, D2H, CPU, H2D, GPU."""
        return (2 * self.stream_handover_s + self.cpu_round_trip_s) / 4


@dataclass(frozen=True)
class GpuProfile:
    """The GPU, its link and the lanes.

    Attributes:
        memory: bytes/s of a large copy within its memory, read plus written.
        flops: FLOP/s of a large product by dtype.
        experts: through the page table.
        dense: projections and heads.
        prefill: attention of prompts.
        link: copies.
        lanes: launching and handing over.
        small: kernels beside the products; none where nobody measured.
        decode: attention over KV in its memory; none where nobody measured.
    """

    memory: float
    flops: dict[str, float] = field(hash=False)
    experts: tuple[ExpertsProfile, ...]
    dense: tuple[DenseProfile, ...]
    prefill: tuple[PrefillProfile, ...]
    link: LinkProfile
    lanes: LaneProfile
    small: tuple[SmallKernels, ...] = ()
    decode: tuple[DecodeProfile, ...] = ()

    def experts_like(self, shape: ModelShape, dtype: str) -> ExpertsProfile:
        """The measured experts nearest to these."""
        return _experts_like(self.experts, shape, dtype)

    def dense_like(self, inputs: int, outputs: int, dtype: str) -> DenseProfile:
        """The measured product nearest to this one."""

        def distance(d: DenseProfile) -> float:
            sizes = _apart(d.inputs, inputs) + _apart(d.outputs, outputs)
            return sizes + _OTHER_DTYPE * (d.dtype != dtype)

        return _nearest(self.dense, distance, "dense products")

    def small_like(self, hidden_size: int, num_experts: int) -> SmallKernels | None:
        """Those of the measured model nearest to this one."""

        def distance(s: SmallKernels) -> float:
            return _apart(s.shape.hidden_size, hidden_size) + _apart(s.shape.num_experts, num_experts)

        return min(self.small, key=distance, default=None)

    def prefill_like(self, num_heads: int, num_kv_heads: int, head_dim: int, dtype: str) -> PrefillProfile:
        """The measured geometry nearest to this one."""
        apart = _geometry_apart(num_heads, num_kv_heads, head_dim, dtype)
        return _nearest(self.prefill, apart, "prefill attention")

    def decode_like(
        self, num_heads: int, num_kv_heads: int, head_dim: int, dtype: str
    ) -> DecodeProfile | None:
        """The measured geometry nearest to this one."""
        apart = _geometry_apart(num_heads, num_kv_heads, head_dim, dtype)
        return min(self.decode, key=apart, default=None)


@dataclass(frozen=True)
class DiskProfile:
    """A disk's sequential reads, past the page cache."""

    path: str
    read: float


@dataclass(frozen=True)
class Profile:
    """A machine and what it was measured to do.

    Attributes:
        machine: on which these numbers hold.
        created: when, in ISO format.
        took_s: seconds of measuring.
        host: CPU and memory.
        gpu: None where there is none.
        disk: None where none was asked for.
    """

    machine: Machine
    created: str
    took_s: float
    host: HostProfile
    gpu: GpuProfile | None = None
    disk: DiskProfile | None = None

    def __post_init__(self) -> None:
        if (self.gpu is None) != (self.machine.gpu is None):
            raise ConfigError("gpu and machine.gpu must be there both or neither")
        if "float32" not in self.host.flops:
            raise ConfigError(
                f"host.flops has {', '.join(self.host.flops) or 'nothing'}; it must have float32"
            )

    @property
    def shapes(self) -> tuple[ModelShape, ...]:
        """The models whose experts were measured."""
        experts = self.gpu.experts if self.gpu else self.host.experts
        return tuple(dict.fromkeys(e.shape for e in experts))

    def has(self, shape: ModelShape) -> bool:
        """Whether a model was measured."""
        return any(shape.is_like(mine) for mine in self.shapes)

    @property
    def is_complete(self) -> bool:
        """Whether all was measured that this version measures; earlier ones left some of the GPU's numbers out."""
        if self.gpu is None:
            return True
        link = self.gpu.link
        has_link = bool(link.h2d_beside_attention) and all(found.store for found in self.gpu.prefill)
        return (
            (has_link or not link.is_pinned)
            and bool(self.host.experts)
            and bool(self.gpu.small)
            and bool(self.gpu.decode)
            and all(found.is_whole for found in self.gpu.small)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, read back by `from_json`."""
        return {"version": PROFILE_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, values: Any, source: str = "profile") -> Profile:
        """The inverse of `to_json`.

        Raises:
            ConfigError: the values are no profile, or of another version; the message names `source` and the value.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"{source} holds no JSON object; {REMEDY}")
        version = values.get("version")
        if type(version) is not int or version != PROFILE_VERSION:
            raise ConfigError(f"{source}: version is {version!r}, not {PROFILE_VERSION}; {REMEDY}")
        rest = {name: value for name, value in values.items() if name != "version"}
        try:
            return decode(cls, rest)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}; {REMEDY}") from error

    def hardware_spec(self) -> HardwareSpec:
        """The machine as its datasheets would describe it, with what was measured in place of peaks.

        Raises:
            ConfigError: it has no GPU.
        """
        if self.gpu is None or self.machine.gpu is None:
            raise ConfigError(
                f"this profile is of a machine without a GPU ({self.machine.cpu}); profile one that has a GPU, or "
                "name a preset such as l4"
            )
        g, m, h, source = self.gpu, self.machine, self.host, f"measured {self.created}"
        # The attention kernel computes in float32 whatever the dtype of K and V.
        cpu_flops = dict.fromkeys(("bfloat16", "float16", "float32"), h.flops["float32"])
        return HardwareSpec(
            DeviceSpec(self.machine.gpu.name, self.machine.gpu.memory_bytes, g.memory, g.flops),
            DeviceSpec(m.cpu, m.host_memory_bytes, h.read_under_copies or h.read, cpu_flops, m.cores),
            g.link.fastest_h2d,
            g.link.to_host.rate_at(g.link.d2h.sizes[-1]),
            g.lanes.mean_handover_s,
            tuple(f"{part}: {source}" for part in ("GPU", "host", "link")),
        )


REMEDY = "give a file that `moe-lightning profile --json PATH` of this version wrote"


def _experts_like(experts: tuple[ExpertsProfile, ...], shape: ModelShape, dtype: str) -> ExpertsProfile:
    def distance(e: ExpertsProfile) -> float:
        names = ("hidden_size", "intermediate_size", "num_experts", "top_k")
        sizes = sum(_apart(getattr(e.shape, name), getattr(shape, name)) for name in names)
        return sizes + _OTHER_DTYPE * (e.dtype != dtype)

    return _nearest(experts, distance, "experts")


def _apart(a: float, b: float) -> float:
    return abs(math.log(a / b))


def _geometry_apart(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: str
) -> Callable[[PrefillProfile | DecodeProfile], float]:
    """How far a measured geometry is from this one."""

    def distance(p: PrefillProfile | DecodeProfile) -> float:
        heads = _apart(p.num_heads, num_heads) + _apart(p.num_kv_heads, num_kv_heads)
        return heads + 2 * _apart(p.head_dim, head_dim) + _OTHER_DTYPE * (p.dtype != dtype)

    return distance


def _nearest(candidates: Iterable[_T], distance: Callable[[_T], float], what: str) -> _T:
    found = min(candidates, key=distance, default=None)
    if found is None:
        raise ConfigError(f"this profile has no measurement of {what}; measure again on the machine itself")
    return found
