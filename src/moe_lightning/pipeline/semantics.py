"""What tasks compute, as symbols: the meaning of each kind, and the model as plain nested loops over them."""

from __future__ import annotations

from typing import NamedTuple

from moe_lightning.pipeline.symbols import Symbol, Symbols
from moe_lightning.pipeline.task import Buffer, Lane, PassShape, Task, TaskKind
from moe_lightning.pipeline.task import BufferKind as B
from moe_lightning.pipeline.task import TaskKind as T

_COPY = ""


class Rule(NamedTuple):
    """`writes` becomes function `name` of `reads`, for each micro-batch of a task; no name is a copy."""

    writes: B
    name: str
    reads: tuple[B, ...] = ()


# Attention is one function wherever it is computed; so are the ways by which k and v get into the cache.
RULES: dict[TaskKind, tuple[Rule, ...]] = {
    T.EMBED: (Rule(B.HIDDEN, "embed"),),
    T.PRE_ATTENTION: (Rule(B.QKV, "qkv", (B.HIDDEN,)),),
    T.OFFLOAD_QKV: (Rule(B.HOST_QKV, _COPY, (B.QKV,)),),
    T.ATTENTION: (
        Rule(B.HOST_OUT, "attention", (B.HOST_QKV, B.KV)),
        Rule(B.KV, "append", (B.KV, B.HOST_QKV)),
    ),
    T.LOAD_HIDDEN: (Rule(B.ATTENTION_OUT, _COPY, (B.HOST_OUT,)),),
    T.PREFILL_ATTENTION: (Rule(B.ATTENTION_OUT, "prefill_attention", (B.QKV,)),),
    T.STORE_KV: (Rule(B.KV, "append", (B.KV, B.QKV)),),
    T.LOAD_KV: (Rule(B.KV_STAGE, _COPY, (B.KV,)),),
    T.GPU_ATTENTION: (Rule(B.ATTENTION_OUT, "attention", (B.QKV, B.KV_STAGE)),),
    T.RESIDENT_ATTENTION: (
        Rule(B.ATTENTION_OUT, "attention", (B.QKV, B.KV)),
        Rule(B.KV, "append", (B.KV, B.QKV)),
    ),
    T.KEEP_KV: (Rule(B.KV, "append", (B.KV, B.QKV)),),
    T.POST_ATTENTION: (
        Rule(B.HIDDEN, "post_attention", (B.ATTENTION_OUT, B.HIDDEN)),
        Rule(B.EXPERTS_IN, "routed", (B.ATTENTION_OUT, B.HIDDEN)),
    ),
    T.LOAD_PAGE: (Rule(B.FRAME, "page"),),
    T.EXPERTS: (Rule(B.HIDDEN, "experts", (B.HIDDEN, B.EXPERTS_IN, B.FRAME)),),
    T.OFFLOAD_INPUTS: (Rule(B.HOST_EXPERTS, _COPY, (B.EXPERTS_IN,)),),
    T.CPU_EXPERTS: (Rule(B.HOST_EXPERTS, "experts", (B.HOST_EXPERTS,)),),
    T.ADD_OUTPUTS: (
        Rule(B.HIDDEN, "add", (B.HIDDEN, B.HOST_EXPERTS)),
        Rule(B.EXPERTS_IN, _COPY, (B.HOST_EXPERTS,)),
    ),
    T.SAMPLE: (Rule(B.TOKENS, "sample", (B.HIDDEN,)),),
}


class Write(NamedTuple):
    """A symbol that a task leaves in a buffer for micro-batch `j`; -1 for a page."""

    j: int
    buffer: Buffer
    symbol: Symbol


def kv_buffer(shape: PassShape, layer: int, j: int) -> Buffer:
    """The KV cache of a layer and micro-batch."""
    return Buffer(B.KV, layer * shape.num_micro_batches + j)


def touched(shape: PassShape, task: Task) -> tuple[set[Buffer], set[Buffer]]:
    """The buffers that a task of this kind has to touch, and those of them that it writes."""
    members = task.micro_batches or (-1,)
    writes = {b for rule in RULES[task.kind] for j in members for b in _places(shape, task, j, rule.writes)}
    reads = {
        b
        for rule in RULES[task.kind]
        for kind in rule.reads
        for j in members
        for b in _places(shape, task, j, kind)
    }
    return reads | writes, writes


def _places(shape: PassShape, task: Task, j: int, kind: B) -> tuple[Buffer, ...]:
    if kind is B.KV:
        return (kv_buffer(shape, task.layer, j),)
    if kind is B.FRAME and task.kind is T.LOAD_PAGE:
        return (Buffer(kind, task.frame),)
    if kind in (B.FRAME, B.KV_STAGE):  # which of them is the builder's choice
        return tuple(buffer for buffer in task.reads + task.writes if buffer.kind is kind)
    if kind is B.QKV and task.kind is T.PREFILL_ATTENTION:
        return tuple(Buffer(kind, chunk) for chunk in range(j + 1))
    return (Buffer(kind, j),)


class Machine:
    """Buffers that hold symbols."""

    def __init__(self, shape: PassShape, terms: Symbols) -> None:
        self._shape = shape
        self._terms = terms
        self._held: dict[Buffer, Symbol] = {}
        if shape.preloaded:
            for k, (layer, page) in enumerate(streamed(shape)[: shape.pages_ahead]):
                self._held[Buffer(B.FRAME, k % shape.num_frames)] = self.page(layer, page)

    def page(self, layer: int, page: int) -> Symbol:
        """The weights of one streamed page; they are the same in every pass."""
        return self._terms.term(f"page L{layer} p{page}")

    def value(self, buffer: Buffer) -> Symbol:
        """What a buffer holds; before its first write, what an earlier pass left there."""
        if buffer not in self._held:
            self._held[buffer] = self._terms.term(f"{buffer.kind}[{buffer.index}] of an earlier pass")
        return self._held[buffer]

    def effects(self, task: Task) -> list[Write]:
        """What a task would write; nothing is changed."""
        if task.kind is T.LOAD_PAGE:
            return [Write(-1, Buffer(B.FRAME, task.frame), self.page(task.layer, task.page))]
        return [
            Write(j, buffer, self._result(task, j, rule))
            for j in task.micro_batches
            for rule in RULES[task.kind]
            for buffer in _places(self._shape, task, j, rule.writes)
        ]

    def run(self, task: Task) -> list[Write]:
        """What a task writes, done."""
        writes = self.effects(task)
        self._held.update((write.buffer, write.symbol) for write in writes)
        return writes

    def _result(self, task: Task, j: int, rule: Rule) -> Symbol:
        args = [self.value(b) for kind in rule.reads for b in _places(self._shape, task, j, kind)]
        if rule.name == _COPY:
            return args[0]
        layer = f" L{task.layer}" if task.layer >= 0 else ""
        layer += f" part{task.part}" if task.part else ""
        return self._terms.term(f"{rule.name}{layer} mb{j}", *args)


def streamed(shape: PassShape) -> list[tuple[int, int]]:
    """The streamed (layer, page) of a pass, in order."""
    return [(layer, page) for layer, pages in enumerate(shape.streamed_pages) for page in range(pages)]


Place = tuple[TaskKind, int, int, int, B]  # kind, layer, part of the experts, micro-batch, kind of buffer


def reference(shape: PassShape, terms: Symbols) -> dict[Place, Symbol]:
    """What each task must leave in each buffer: the model layer by layer, micro-batch by micro-batch."""
    loops = _PlainLoops(shape, terms)
    for j in range(shape.num_micro_batches):
        loops.run(T.EMBED, -1, j)
    for layer, num_pages in enumerate(shape.streamed_pages):
        frames = tuple(Buffer(B.FRAME, page) for page in range(num_pages))
        loops.load(layer, frames)
        for j in range(shape.num_micro_batches):
            loops.run(T.PRE_ATTENTION, layer, j)
            loops.attend(layer, j)
            loops.run(T.POST_ATTENTION, layer, j)
            if shape.is_on_cpu(layer):
                for kind in (T.OFFLOAD_INPUTS, T.CPU_EXPERTS, T.ADD_OUTPUTS):
                    loops.run(kind, layer, j)
                continue
            for part in shape.parts_of(layer):
                pages = shape.streamed_in(layer, part)
                loops.run(T.EXPERTS, layer, j, frames[pages.start : pages.stop], part)
    for j in range(shape.num_micro_batches):
        loops.run(T.SAMPLE, -1, j)
    return loops.expected


class _PlainLoops:
    """Runs tasks one by one and keeps what they wrote."""

    def __init__(self, shape: PassShape, terms: Symbols) -> None:
        self.expected: dict[Place, Symbol] = {}
        self._shape = shape
        self._machine = Machine(shape, terms)

    def run(self, kind: TaskKind, layer: int, j: int, reads: tuple[Buffer, ...] = (), part: int = 0) -> None:
        task = Task(kind, Lane.GPU, layer, (j,), reads, (), part=part)
        self._keep(task, self._machine.run(task))

    def load(self, layer: int, frames: tuple[Buffer, ...]) -> None:
        for page, frame in enumerate(frames):
            self._machine.run(Task(T.LOAD_PAGE, Lane.H2D, layer, (), (), (frame,), page, frame.index))

    def attend(self, layer: int, j: int) -> None:
        """All ways that a micro-batch may go in such a layer; k and v are appended once, as the last thing."""
        keeps_kv = self._shape.keeps_kv(layer)
        store = Task(T.KEEP_KV if keeps_kv else T.STORE_KV, Lane.D2H, layer, (j,), (), ())
        if j < self._shape.num_prefill:
            self.run(T.PREFILL_ATTENTION, layer, j)
            self._keep(store, self._machine.run(store))
            return
        if keeps_kv:
            self.run(T.RESIDENT_ATTENTION, layer, j)
            return
        self._keep(store, self._machine.effects(store))
        for kind in (T.LOAD_KV, T.GPU_ATTENTION, T.OFFLOAD_QKV, T.ATTENTION, T.LOAD_HIDDEN):
            self.run(kind, layer, j, (Buffer(B.KV_STAGE, 0),))

    def _keep(self, task: Task, writes: list[Write]) -> None:
        for j, buffer, symbol in writes:
            self.expected[task.kind, task.layer, task.part, j, buffer.kind] = symbol
