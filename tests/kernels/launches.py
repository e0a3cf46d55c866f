"""What a pass launches, at the shapes of real models and of the tests' own, over tensors that have no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from moe_lightning.bench.shapes import MODELS, LayerShape
from moe_lightning.kernels import (
    experts,
    host_rows,
    norm,
    pack,
    paged_attention,
    rope,
    router,
    store_kv,
    unpack,
    varlen_attention,
)
from moe_lightning.kernels.expert_config import ExpertsConfig, Tile
from moe_lightning.models.spec import AttentionSpec, RouterSpec
from moe_lightning.perf.page_size import page_bytes, segment_bytes, segment_parts
from moe_lightning.pipeline.shape import experts_in

NUM_FRAMES = 40_000  # more elements than 32 bits can count
BLOCK_SIZE = 16
TINY = LayerShape(64, 96, 8, 2, RouterSpec(2), AttentionSpec(4, 2, 16))  # that of tests/checkpoints.py
ODD = LayerShape(200, 120, 20, 3, RouterSpec(3), AttentionSpec(9, 3, 80, sliding_window=20))
DENSE = LayerShape(8192, 28672, 1, 16, RouterSpec(1), AttentionSpec(64, 8, 128))
WIDE_HEADS = LayerShape(2048, 8192, 4, 1, RouterSpec(2), AttentionSpec(8, 1, 256))
SHAPES = {**MODELS, "dense": DENSE, "odd": ODD, "wide heads": WIDE_HEADS, "tiny": TINY}
TOKENS = (1, 8, 64, 130, 512, 2048, 8192)  # decode to prefill: each has tiles of its own
ROWS_ANYWHERE = "rows anywhere"
Launch = Callable[[], object]


def dtypes(arch: int) -> tuple[torch.dtype, ...]:
    """Of the models that a GPU runs; Turing has no bfloat16, elsewhere float16 compiles to the same."""
    return (torch.float16 if arch < 80 else torch.bfloat16), torch.float32


def few(arch: int) -> Iterator[tuple[str, Launch]]:
    """Each kernel, and the ways in which the experts' tiles are loaded."""
    dtype, shape = dtypes(arch)[0], SHAPES["mixtral-8x7b"]
    yield "decode", partial(small_kernels, shape, 64, dtype, arch)
    yield "one token", partial(moe, shape, 1, dtype)
    yield "prefill", partial(moe, shape, 8192, dtype, parts=2)
    yield "tiny", partial(moe, TINY, 9, torch.float32)
    if arch == 90:
        yield ROWS_ANYWHERE, rows_anywhere


def every(arch: int) -> Iterator[tuple[str, Launch]]:
    """All shapes in all dtypes, and with them all tiles that the table and the rules give."""
    for name, shape in SHAPES.items():
        for dtype in dtypes(arch):
            for tokens in TOKENS:
                label = f"{name} {str(dtype).removeprefix('torch.')} {tokens} tokens"
                yield label, partial(small_kernels, shape, tokens, dtype, arch)
                yield label, partial(moe, shape, tokens, dtype)
                yield f"{label}, parts", partial(moe, shape, tokens, dtype, parts=2)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def small_kernels(shape: LayerShape, tokens: int, dtype: torch.dtype, arch: int) -> None:
    """What surrounds the experts. Rows are slices of a pass's buffers."""
    a, h, e = shape.attention, shape.hidden_size, shape.num_experts
    hidden, normed = (empty(tokens, h, dtype=dtype) for _ in range(2))
    norm.rms_norm(hidden, empty(h, dtype=dtype), 1e-5, normed)
    qkv = empty(tokens + 7, a.qkv_size, dtype=dtype)
    cos, sin = (empty(tokens, 1, a.head_dim, dtype=dtype) for _ in range(2))
    rope.rotate_(qkv[:tokens], cos, sin, a.num_heads + a.num_kv_heads)
    out = empty(tokens, a.q_size, dtype=dtype)
    host_rows.load_host_rows(empty(tokens, a.q_size, dtype=dtype), out)
    host_rows.load_host_rows(empty(4096 * tokens, dtype=torch.uint8), empty(4096 * tokens, dtype=torch.uint8))
    kv = empty(NUM_FRAMES, 2, a.num_kv_heads, BLOCK_SIZE, a.head_dim, dtype=dtype)
    host_rows.load_host_blocks(kv, empty(9, dtype=torch.int64), empty(9, *kv.shape[1:], dtype=dtype))
    q, k, v = qkv.view(len(qkv), -1, a.head_dim).split((a.num_heads, a.num_kv_heads, a.num_kv_heads), dim=1)
    store_kv.store_kv(kv, k[:tokens], v[:tokens], empty(tokens, dtype=torch.int64))
    if arch >= 80:  # on Turing PyTorch attends
        blocks = empty(-(-tokens // 64), 4, dtype=torch.int32)
        varlen_attention.varlen_attention(q, k, v, blocks, 3, a.sliding_window, out)
    tables, lens = empty(tokens, 33, dtype=torch.int64), empty(tokens, dtype=torch.int64)
    first = torch.zeros_like(lens)
    paged_attention.paged_attention(q[:tokens], kv, tables.view(-1), first, lens, a.sliding_window, out)
    ids, weights = routed(shape, tokens)
    router.route(empty(tokens, e, dtype=dtype), shape.router, ids, weights)
    unpacking(shape)


def unpacking(shape: LayerShape) -> None:
    """Packed pages of a layer, some and all."""
    values, pages = shape.page_rows * shape.hidden_size, shape.num_experts * shape.pages_per_expert
    packed = empty(
        NUM_FRAMES, page_bytes(shape.hidden_size, shape.page_rows, 2, packed=True), dtype=torch.uint8
    )
    table, out = empty(pages, dtype=torch.int32), empty(pages, 3 * values, dtype=torch.bfloat16)
    parts, segment = segment_parts(values), packed[0, : segment_bytes(values)]
    pack.pack_tiles(out[0, :values].view(torch.int16), segment, parts)
    pack.write_escapes(out[0, :values].view(torch.int16), segment, parts)
    for first, count in ((0, pages), (pages - 1, 1)):
        unpack.unpack_pages(packed, table, first, count, out, values)


def moe(
    shape: LayerShape, tokens: int, dtype: torch.dtype, parts: int = 1, config: ExpertsConfig | None = None
) -> None:
    """The experts of a layer, all at once or part by part."""
    h, e, p, k = shape.hidden_size, shape.num_experts, shape.pages_per_expert, shape.router.top_k
    workspace = experts.Workspace.allocate(
        tokens, k, e, h, shape.intermediate_size, dtype, torch.device("meta")
    )
    hidden, x = (empty(tokens, h, dtype=dtype) for _ in range(2))
    frames, table = empty(NUM_FRAMES, 3 * shape.page_rows * h, dtype=dtype), empty(e * p, dtype=torch.int32)
    for part in range(min(parts, e)):
        only = experts_in(e, parts, part) if parts > 1 else None
        experts.experts_(hidden, x, *routed(shape, tokens), frames, table, p, workspace, config, only)


def rows_anywhere() -> None:
    """Some of a pass's rows after others, their pointers those of real memory; experts in parts."""
    shape, experts_, rows, dtype = TINY, TINY.num_experts, 64, torch.bfloat16
    h, k, cpu = shape.hidden_size, shape.router.top_k, torch.device("cpu")
    ids, weights = torch.zeros(rows, k, dtype=torch.int64, device=cpu), torch.zeros(rows, k, device=cpu)
    logits = torch.zeros(rows, experts_, dtype=dtype, device=cpu)
    hidden, x = (torch.zeros(rows, h, dtype=dtype, device=cpu) for _ in range(2))
    frames = torch.zeros(experts_, 3 * shape.intermediate_size * h, dtype=dtype, device=cpu)
    table = torch.zeros(experts_, dtype=torch.int32, device=cpu)
    workspace = experts.Workspace.allocate(rows, k, experts_, h, shape.intermediate_size, dtype, cpu)
    tile = Tile(16, 16, 4, 2)
    for some in (slice(0, 5), slice(1, 6), slice(2, 18), slice(3, 19), slice(16, 17)):
        router.route(logits[some], shape.router, ids[some], weights[some])
        for part in range(3):
            experts.experts_(
                hidden[some], x[some], ids[some], weights[some], frames, table, 1, workspace,
                ExpertsConfig(16, 2, tile, tile), experts_in(experts_, 3, part),
            )  # fmt: skip


def routed(shape: LayerShape, tokens: int) -> tuple[Tensor, Tensor]:
    k = shape.router.top_k
    return empty(tokens, k, dtype=torch.int64), empty(tokens, k, dtype=torch.float32)
