"""Tasks, the buffers they touch, and the schedule they form."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple


class Lane(StrEnum):
    """A resource that runs one task at a time, in launch order."""

    GPU = "gpu"
    H2D = "h2d"  # pages, and what the baselines copy beside them
    BACK = "back"  # attention outputs back to the GPU, which need not queue behind pages
    D2H = "d2h"
    CPU = "cpu"


class TaskKind(StrEnum):
    """What a task does; `j` is a micro-batch, `g` a group of them."""

    EMBED = "embed"  # token ids of j -> hidden states
    PRE_ATTENTION = "pre_attention"  # norm, QKV projection, RoPE of j
    OFFLOAD_QKV = "offload_qkv"  # q, k, v of decode j -> host
    ATTENTION = "attention"  # decode attention of j where its KV lies: on the CPU
    LOAD_HIDDEN = "load_hidden"  # attention output of decode j -> GPU
    PREFILL_ATTENTION = "prefill_attention"  # causal attention of prefill j on the GPU
    STORE_KV = "store_kv"  # k, v of j -> KV cache in host memory
    LOAD_KV = "load_kv"  # KV cache of decode j -> GPU (baselines with attention on the GPU)
    GPU_ATTENTION = "gpu_attention"  # decode attention of j over KV loaded to the GPU (baselines)
    RESIDENT_ATTENTION = "resident_attention"  # decode attention of j over KV that stays on the GPU
    KEEP_KV = "keep_kv"  # k, v of prefill j -> KV cache that stays on the GPU
    POST_ATTENTION = "post_attention"  # output projection, norm, router of j
    LOAD_PAGE = "load_page"  # one page of expert weights -> frame
    EXPERTS = "experts"  # a part of one layer's experts for all micro-batches of g
    OFFLOAD_INPUTS = "offload_inputs"  # what the experts of g work on, routing among it -> host
    CPU_EXPERTS = "cpu_experts"  # one layer's experts for all micro-batches of g, where they lie: on the CPU
    ADD_OUTPUTS = "add_outputs"  # what these computed -> GPU, added to the hidden states of g
    SAMPLE = "sample"  # final norm, head, sampling of j


class BufferKind(StrEnum):
    """What a buffer holds; its index is a micro-batch, but for FRAME (a frame) and KV (layer, micro-batch)."""

    HIDDEN = "hidden"  # residual stream, GPU
    QKV = "qkv"  # q, k, v, GPU; a later prefill chunk of the same prompt reads k and v of an earlier one
    HOST_QKV = "host_qkv"  # q, k, v, host
    HOST_OUT = "host_out"  # attention output, host
    ATTENTION_OUT = "attention_out"  # attention output, GPU
    EXPERTS_IN = "experts_in"  # normed hidden states with routing, GPU
    HOST_EXPERTS = "host_experts"  # the same, host, and then what the experts make of it
    FRAME = "frame"  # a page's place on the GPU
    KV = "kv"  # KV cache of one layer and micro-batch, wherever that layer has it
    KV_STAGE = "kv_stage"  # KV loaded for one micro-batch, GPU; the index is a staging slot
    TOKENS = "tokens"  # sampled ids


class Buffer(NamedTuple):
    """A piece of memory whose readers and writers order tasks."""

    kind: BufferKind
    index: int  # type: ignore[assignment]  # tuple.index is hidden: nobody searches a buffer


@dataclass(slots=True, unsafe_hash=True)
class Task:
    """One launch on one lane, to be read only: if frozen, the thousands of a pass took five times as long to make.

    `layer` is -1 outside the layers; `micro_batches` are those it works on; `page` counts the streamed pages of
    its layer and `frame` is the place in the ring (LOAD_PAGE only). A page may belong to the next pass: then
    `layer` is the layer of that pass and `next_pass` is set. `part` is that of the layer's experts (EXPERTS only).
    """

    kind: TaskKind
    lane: Lane
    layer: int
    micro_batches: tuple[int, ...]
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    page: int = -1
    frame: int = -1
    next_pass: bool = False
    part: int = 0

    def __str__(self) -> str:
        """Short name such as ``experts L3 mb0-7`` or ``load_page L4 p2>f5``."""
        layer = f" L{self.layer}" if self.layer >= 0 else ""
        if self.kind is TaskKind.LOAD_PAGE:
            return f"{self.kind}{layer}{'+' if self.next_pass else ''} p{self.page}>f{self.frame}"
        first, last = self.micro_batches[0], self.micro_batches[-1]
        part = f" part{self.part}" if self.part else ""
        return f"{self.kind}{layer}{part} mb{first}" + (f"-{last}" if last != first else "")


@dataclass(frozen=True)
class PassShape:
    """What a schedule is built for: all that decides which tasks a pass has, and nothing else.

    Micro-batches 0 .. num_prefill - 1 are prefill chunks, the following num_decode ones are decode. Chunks of
    one prompt are consecutive. `streamed_pages[l]` pages of layer l go through the ring of `num_frames` frames;
    the others are resident. `preloaded` says that the previous pass has loaded this pass's first pages.

    Where a layer's experts are swept in parts, `part_pages` has the pages of each; the first of them are resident.
    So frames are free again before the whole layer is done, and the ring may be smaller than a layer. With
    `first_part_at_once` groups have the first part as soon as their attention is in.

    The last of every `kv_every` layers keeps its KV on the GPU; 0: none does. The last of every `cpu_every` has its
    experts computed on the CPU, streams no page and is swept as one; 0: none is.
    """

    num_layers: int
    num_prefill: int
    num_decode: int
    group_size: int
    look_ahead: int
    streamed_pages: tuple[int, ...]
    num_frames: int
    preloaded: bool = False
    part_pages: tuple[int, ...] = ()
    first_part_at_once: bool = False
    kv_every: int = 0
    cpu_every: int = 0

    def keeps_kv(self, layer: int) -> bool:
        """Whether the layer has its KV on the GPU."""
        return self.kv_every > 0 and (layer + 1) % self.kv_every == 0

    def is_on_cpu(self, layer: int) -> bool:
        """Whether the CPU computes the layer's experts."""
        return self.cpu_every > 0 and (layer + 1) % self.cpu_every == 0

    @property
    def num_on_cpu(self) -> int:
        """Layers whose experts the CPU computes."""
        return self.num_layers // self.cpu_every if self.cpu_every else 0

    def parts_of(self, layer: int) -> range:
        """Sweeps over the layer's experts."""
        return range(1 if self.is_on_cpu(layer) else self.num_parts)

    def parts_at_once(self, layer: int) -> range:
        """Those of the sweeps that do not wait for all of the layer's attention; the last one always does."""
        return range(int(self.first_part_at_once and len(self.parts_of(layer)) > 1))

    @property
    def num_keeping_kv(self) -> int:
        """Layers that have their KV on the GPU."""
        return self.num_layers // self.kv_every if self.kv_every else 0

    @property
    def num_parts(self) -> int:
        """Sweeps over a layer's experts, each over some of them."""
        return max(1, len(self.part_pages))

    def streamed_in(self, layer: int, part: int) -> range:
        """Which of the layer's streamed pages a part of its experts has."""
        streamed = self.streamed_pages[layer]
        if not self.part_pages:
            return range(streamed)
        resident = sum(self.part_pages) - streamed
        start = sum(self.part_pages[:part]) - resident
        return range(max(0, start), max(0, start + self.part_pages[part]))

    @cached_property
    def least_frames(self) -> int:
        """Frames without which a ring does not turn: those of the largest part."""
        sweeps = ((layer, part) for layer in range(self.num_layers) for part in self.parts_of(layer))
        return max((len(self.streamed_in(layer, part)) for layer, part in sweeps), default=0)

    @property
    def num_micro_batches(self) -> int:
        """Prefill and decode together."""
        return self.num_prefill + self.num_decode

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Micro-batches of each experts group; none has chunks and decode micro-batches.

        So decode sequences can go on to their next attention before the experts sweep for the prompts.
        """
        n, g = self.num_micro_batches, self.group_size
        parts = (range(self.num_prefill), range(self.num_prefill, n))
        return tuple(
            tuple(range(start, min(start + g, part.stop)))
            for part in parts
            for start in range(part.start, part.stop, g)
        )

    @cached_property
    def pages_ahead(self) -> int:
        """First pages of the next pass that this pass loads in its tail: as many as the ring holds.

        Where a layer is one part, as in the paper, only those for which the last layer's own pages leave frames.
        """
        held = 0 if self.part_pages else max(self.streamed_pages, default=0)
        return min(self.num_frames - held, sum(self.streamed_pages))


@dataclass(frozen=True)
class Schedule:
    """Tasks in launch order; `deps[t]` are the indices of the tasks that task t waits for beyond its lane's order.

    A dependency always points to an earlier task, so launch order is a valid order of execution.
    """

    name: str
    shape: PassShape
    tasks: tuple[Task, ...]
    deps: tuple[tuple[int, ...], ...]
