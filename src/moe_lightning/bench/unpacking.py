"""Measures the unpacking of packed pages."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from moe_lightning.bench.experts import WrongResultError
from moe_lightning.bench.result import Measurement
from moe_lightning.bench.shapes import LayerShape
from moe_lightning.bench.timing import seconds_of
from moe_lightning.kernels import ops
from moe_lightning.perf.page_size import page_bytes, segment_bytes

_BYTES = 2**28  # of packed pages in one call: more than any cache


def measure_unpacking(model: str, shape: LayerShape) -> Measurement:
    """Pages of random weights in shuffled frames, in one call; its tokens are 0.

    Raises:
        WrongResultError: a bit is not what it was.
    """
    values, h = shape.page_rows * shape.hidden_size, shape.hidden_size
    row_bytes = page_bytes(h, shape.page_rows, 2, packed=True)
    count = min(max(1, _BYTES // row_bytes), shape.num_experts * shape.pages_per_expert)
    pages = torch.empty(count, 3 * values, dtype=torch.bfloat16, device="cuda").normal_(std=h**-0.5)
    table = torch.randperm(count, device="cuda").int()
    packed = torch.zeros(count, row_bytes, dtype=torch.uint8, device="cuda")
    for page, frame in enumerate(table.tolist()):
        _pack(pages[page], packed[frame], values)
    out = torch.full_like(pages, float("nan"))
    work = partial(ops.unpack_pages, packed, table, 0, count, out, values)
    work()
    if not torch.equal(out.view(torch.int16), pages.view(torch.int16)):
        raise WrongResultError(f"unpacked pages of {model} are not what was packed")
    num_bytes = count * 3 * segment_bytes(values) + pages.nbytes
    return Measurement("unpack_pages", model, 0, seconds_of([work]), 0.0, num_bytes, 0.0)


def _pack(page: Tensor, row: Tensor, values: int) -> None:
    size = segment_bytes(values)
    for segment in range(3):
        ops.pack(page[segment * values :][:values], row[segment * size :][:size])
