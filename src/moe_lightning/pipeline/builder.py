"""The tasks of a pass, appended one launch at a time."""

from __future__ import annotations

from itertools import accumulate

from moe_lightning.errors import ScheduleError
from moe_lightning.pipeline import common, hazards
from moe_lightning.pipeline.common import buffer, own
from moe_lightning.pipeline.task import Buffer, Lane, PassShape, Schedule, Task, TaskKind
from moe_lightning.pipeline.task import BufferKind as B


class PassBuilder:
    """Appends tasks in launch order with the buffers they touch; `finish` derives what waits for what.

    The streamed pages of a pass are one sequence, layer by layer, followed by the first pages of the next
    pass. Page k of it goes to frame k mod num_frames.

    Raises:
        ScheduleError: the ring cannot hold the pages that one sweep reads, or the shape is not a pass.
    """

    def __init__(self, shape: PassShape) -> None:
        _check(shape)
        self.shape = shape
        self._tasks: list[Task] = []
        layers = range(shape.num_layers)
        self._pages = [(layer, page) for layer in layers for page in range(shape.streamed_pages[layer])]
        self._first_page = [0, *accumulate(shape.streamed_pages)]
        self._next_page = shape.pages_ahead if shape.preloaded else 0
        self._groups_done: list[list[set[int]]] = [[set() for _ in shape.parts_of(layer)] for layer in layers]
        self._num_swept = 0  # pages that all their readers are launched for, from the first on
        # That are not whole, the first one last.
        self._sweeps = [(layer, part) for layer in layers for part in shape.parts_of(layer)]
        self._sweeps.reverse()
        self._frames: dict[tuple[int, int], tuple[Buffer, ...]] = {}  # that a sweep reads
        self._group_of = {j: g for g, members in enumerate(shape.groups) for j in members}

    # What each task does to buffers.

    def embed(self, j: int) -> None:
        """Token ids of j to hidden states."""
        self._tasks.append(own(TaskKind.EMBED, Lane.GPU, -1, j))

    def pre_attention(self, layer: int, j: int) -> None:
        """Norm, QKV projection and RoPE; the first layer's comes with the embedding."""
        if layer == 0:
            self.embed(j)
        self._tasks.append(own(TaskKind.PRE_ATTENTION, Lane.GPU, layer, j))

    def offload_qkv(self, layer: int, j: int) -> None:
        """Queries, keys and values of a decode micro-batch to the host."""
        self._tasks.append(own(TaskKind.OFFLOAD_QKV, Lane.D2H, layer, j))

    def attention(self, layer: int, j: int) -> None:
        """Decode attention on the CPU, which also appends k and v to the cache."""
        self._tasks.append(common.attention(layer, j, self._kv(layer, j)))

    def resident_attention(self, layer: int, j: int) -> None:
        """Decode attention on the GPU over a cache that is there, to which it appends."""
        self._tasks.append(common.resident_attention(layer, j, self._kv(layer, j)))

    def load_hidden(self, layer: int, j: int, lane: Lane = Lane.H2D) -> None:
        """The attention output back to the GPU."""
        self._tasks.append(own(TaskKind.LOAD_HIDDEN, lane, layer, j))

    def prefill_attention(self, layer: int, j: int) -> None:
        """Causal attention of a chunk over itself and the chunks before it."""
        self._tasks.append(common.prefill_attention(layer, j))

    def store_kv(self, layer: int, j: int) -> None:
        """Keys and values to the cache in host memory."""
        self._tasks.append(common.store_kv(layer, j, self._kv(layer, j)))

    def keep_kv(self, layer: int, j: int) -> None:
        """Keys and values to the cache on the GPU."""
        self._tasks.append(common.keep_kv(layer, j, self._kv(layer, j)))

    def load_kv(self, layer: int, j: int, slot: int) -> None:
        """The cache of a decode micro-batch to a staging slot on the GPU."""
        self._add(TaskKind.LOAD_KV, Lane.H2D, layer, (j,), (self._kv(layer, j),), (buffer(B.KV_STAGE, slot),))

    def gpu_attention(self, layer: int, j: int, slot: int) -> None:
        """Decode attention on the GPU over a staging slot and the new k and v."""
        reads = (buffer(B.QKV, j), buffer(B.KV_STAGE, slot))
        self._add(TaskKind.GPU_ATTENTION, Lane.GPU, layer, (j,), reads, (buffer(B.ATTENTION_OUT, j),))

    def post_attention(self, layer: int, j: int) -> None:
        """Output projection, norm and router."""
        self._tasks.append(own(TaskKind.POST_ATTENTION, Lane.GPU, layer, j))

    def experts(self, layer: int, group: int, part: int = 0) -> None:
        """One sweep over a part of a layer's experts for a group, once all its pages are launched."""
        first, streamed = self.pages_before(layer), self.shape.streamed_in(layer, part)
        self.load_pages(first + streamed.stop)
        members = self.shape.groups[group]
        hidden, inputs = common.swept(members)
        if (layer, part) not in self._frames:
            n = self.shape.num_frames
            self._frames[layer, part] = tuple(buffer(B.FRAME, (first + page) % n) for page in streamed)
        reads = inputs + self._frames[layer, part]
        self._add(TaskKind.EXPERTS, Lane.GPU, layer, members, reads, hidden, part)
        self._groups_done[layer][part].add(group)
        self._count_swept()

    def cpu_experts(self, layer: int, group: int) -> None:
        """A layer's experts for a group on the CPU, and the ways there and back."""
        members = self.shape.groups[group]
        hidden, inputs = common.swept(members)
        held, inputs = common.held_on_host(members), inputs[len(members) :]
        self._add(TaskKind.OFFLOAD_INPUTS, Lane.D2H, layer, members, inputs, held)
        self._add(TaskKind.CPU_EXPERTS, Lane.CPU, layer, members, held, held)
        # On their way they come to where the inputs were.
        self._add(TaskKind.ADD_OUTPUTS, Lane.BACK, layer, members, hidden + held, hidden + inputs)
        self._groups_done[layer][-1].add(group)
        self._count_swept()

    def sample(self, j: int) -> None:
        """Final norm, head and sampling."""
        self._tasks.append(own(TaskKind.SAMPLE, Lane.GPU, -1, j))

    # Streamed pages.

    def pages_before(self, layer: int) -> int:
        """Streamed pages of the layers below `layer`."""
        return self._first_page[layer]

    def load_pages(self, target: int) -> None:
        """Launch page copies until `target` pages of the pass are launched or no frame is free.

        Pages past the last layer's are the next pass's first.
        """
        num_pages, num_frames = len(self._pages), self.shape.num_frames
        stop = min(target, num_pages + self.shape.pages_ahead, self._num_swept + num_frames)
        for page in range(self._next_page, stop):
            layer, of_layer = self._pages[page % num_pages]
            self._tasks.append(common.load_page(layer, of_layer, page % num_frames, page >= num_pages))
        self._next_page = max(self._next_page, stop)

    def _count_swept(self) -> None:
        """A frame is free once every reader of the page that it holds is launched."""
        while self._sweeps:
            layer, part = self._sweeps[-1]
            if len(self._groups_done[layer][part]) < len(self.shape.groups):
                return
            self._num_swept = self._first_page[layer] + self.shape.streamed_in(layer, part).stop
            self._sweeps.pop()

    # Reading the state.

    def is_group_done(self, layer: int, j: int) -> bool:
        """Whether the experts of the layer are launched for j."""
        return self._group_of[j] in self._groups_done[layer][-1]

    def group_ending_at(self, j: int) -> int | None:
        """The group whose last member is j."""
        group = self._group_of[j]
        return group if self.shape.groups[group][-1] == j else None

    def tasks(self) -> tuple[Task, ...]:
        """All of the pass."""
        if self.shape.part_pages:
            self.load_pages(len(self._pages) + self.shape.pages_ahead)
        return tuple(self._tasks)

    def finish(self, name: str) -> Schedule:
        """The schedule, with derived dependencies."""
        tasks = self.tasks()
        return Schedule(name, self.shape, tasks, hazards.derive(tasks))

    def _kv(self, layer: int, j: int) -> Buffer:
        return buffer(B.KV, layer * self.shape.num_micro_batches + j)

    def _add(
        self,
        kind: TaskKind,
        lane: Lane,
        layer: int,
        micro_batches: tuple[int, ...],
        reads: tuple[Buffer, ...] = (),
        writes: tuple[Buffer, ...] = (),
        part: int = 0,
    ) -> None:
        self._tasks.append(Task(kind, lane, layer, micro_batches, reads, writes, part=part))


def _check(shape: PassShape) -> None:
    if shape.num_layers < 1 or shape.num_micro_batches < 1 or shape.group_size < 1 or shape.look_ahead < 0:
        raise ScheduleError(
            f"{shape} is no pass: it needs a layer, a micro-batch and a group size of 1 or more"
        )
    if len(shape.streamed_pages) != shape.num_layers:
        raise ScheduleError(
            f"streamed_pages has {len(shape.streamed_pages)} entries for {shape.num_layers} layers"
        )
    if any(pages and shape.is_on_cpu(layer) for layer, pages in enumerate(shape.streamed_pages)):
        raise ScheduleError(f"{shape} streams pages of a layer whose experts the CPU computes")
    if shape.part_pages and sum(shape.part_pages) < max(shape.streamed_pages):
        raise ScheduleError(
            f"part_pages={shape.part_pages} for a layer that streams {max(shape.streamed_pages)} pages; give the "
            "pages of all its experts"
        )
    if shape.num_frames < shape.least_frames:
        raise ScheduleError(
            f"a ring of {shape.num_frames} frames cannot hold the {shape.least_frames} streamed pages that one "
            f"sweep over experts reads; give it {shape.least_frames} frames or keep more pages resident"
        )
