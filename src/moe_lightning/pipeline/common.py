"""Tasks and buffers that passes of many shapes have: made anew they took most of a schedule's time and memory."""

from __future__ import annotations

from functools import lru_cache

from moe_lightning.pipeline.task import Buffer, Lane, Task, TaskKind
from moe_lightning.pipeline.task import BufferKind as B

buffer = lru_cache(maxsize=2**16)(Buffer)

# What tasks of one micro-batch read and write of it alone.
_TOUCHED: dict[TaskKind, tuple[tuple[B, ...], tuple[B, ...]]] = {
    TaskKind.EMBED: ((), (B.HIDDEN,)),
    TaskKind.PRE_ATTENTION: ((B.HIDDEN,), (B.QKV,)),
    TaskKind.OFFLOAD_QKV: ((B.QKV,), (B.HOST_QKV,)),
    TaskKind.LOAD_HIDDEN: ((B.HOST_OUT,), (B.ATTENTION_OUT,)),
    TaskKind.POST_ATTENTION: ((B.ATTENTION_OUT, B.HIDDEN), (B.HIDDEN, B.EXPERTS_IN)),
    TaskKind.SAMPLE: ((B.HIDDEN,), (B.TOKENS,)),
}


@lru_cache(maxsize=2**16)
def own(kind: TaskKind, lane: Lane, layer: int, j: int) -> Task:
    """A task that touches buffers of its micro-batch alone."""
    reads, writes = (tuple(buffer(each, j) for each in kinds) for kinds in _TOUCHED[kind])
    return Task(kind, lane, layer, (j,), reads, writes)


@lru_cache(maxsize=2**16)
def attention(layer: int, j: int, kv: Buffer) -> Task:
    """Decode attention on the CPU, which appends to its cache."""
    reads, writes = (buffer(B.HOST_QKV, j), kv), (kv, buffer(B.HOST_OUT, j))
    return Task(TaskKind.ATTENTION, Lane.CPU, layer, (j,), reads, writes)


@lru_cache(maxsize=2**16)
def resident_attention(layer: int, j: int, kv: Buffer) -> Task:
    """Decode attention on the GPU over a cache that is there, to which it appends."""
    reads, writes = (buffer(B.QKV, j), kv), (kv, buffer(B.ATTENTION_OUT, j))
    return Task(TaskKind.RESIDENT_ATTENTION, Lane.GPU, layer, (j,), reads, writes)


@lru_cache(maxsize=2**16)
def prefill_attention(layer: int, j: int) -> Task:
    """Causal attention of a chunk over itself and the chunks before it."""
    chunks = tuple(buffer(B.QKV, chunk) for chunk in range(j + 1))
    into = (buffer(B.ATTENTION_OUT, j),)
    return Task(TaskKind.PREFILL_ATTENTION, Lane.GPU, layer, (j,), chunks, into)


@lru_cache(maxsize=2**16)
def store_kv(layer: int, j: int, kv: Buffer) -> Task:
    """Keys and values of a chunk to its cache in host memory."""
    return Task(TaskKind.STORE_KV, Lane.D2H, layer, (j,), (buffer(B.QKV, j),), (kv,))


@lru_cache(maxsize=2**16)
def keep_kv(layer: int, j: int, kv: Buffer) -> Task:
    """Keys and values of a chunk to its cache on the GPU."""
    return Task(TaskKind.KEEP_KV, Lane.GPU, layer, (j,), (buffer(B.QKV, j),), (kv,))


@lru_cache(maxsize=2**12)
def swept(members: tuple[int, ...]) -> tuple[tuple[Buffer, ...], tuple[Buffer, ...]]:
    """What sweeps over experts write of a group, and what they read of it."""
    hidden = tuple(buffer(B.HIDDEN, j) for j in members)
    return hidden, hidden + tuple(buffer(B.EXPERTS_IN, j) for j in members)


@lru_cache(maxsize=2**12)
def held_on_host(members: tuple[int, ...]) -> tuple[Buffer, ...]:
    """Where the CPU's experts find what they work on, and leave what they made."""
    return tuple(buffer(B.HOST_EXPERTS, j) for j in members)


@lru_cache(maxsize=2**16)
def load_page(layer: int, page: int, frame: int, next_pass: bool) -> Task:
    """A page of a layer, of the next pass perhaps, to a place in the ring."""
    into = (buffer(B.FRAME, frame),)
    return Task(
        TaskKind.LOAD_PAGE, Lane.H2D, layer, (), (), into, page=page, frame=frame, next_pass=next_pass
    )
