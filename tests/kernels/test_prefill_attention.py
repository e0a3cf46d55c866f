"""Prefill attention against the reference: chunks that go on, windows, grouped heads."""

from __future__ import annotations

import pytest
import torch

from moe_lightning.kernels import reference
from moe_lightning.kernels.prefill_plan import PrefillPlan
from moe_lightning.kernels.reference import Segment

pytest.importorskip("triton")
from moe_lightning.kernels import prefill_attention as kernel
from moe_lightning.kernels import varlen_attention as varlen

_CHUNKS = {
    "one token": [Segment(0, 0, 1)],
    "several": [Segment(3, 3, 4), Segment(4, 4, 69), Segment(69, 69, 75)],
    "goes on": [Segment(2, 70, 140), Segment(140, 140, 143)],
    "two go on": [Segment(0, 20, 30), Segment(4, 30, 33)],  # rows that no batcher makes, but the plan allows
}


def plan_of(segments, device):
    return PrefillPlan.of(segments, lambda values, dtype: torch.as_tensor(values, dtype=dtype, device=device))


def _inputs(segments, heads, kv_heads, head_dim, dtype, device):
    torch.manual_seed(0)
    first, last = min(s.first for s in segments), segments[-1].end
    rows = torch.full((last + 5, (heads + 2 * kv_heads) * head_dim), float("nan"))
    rows[first:last] = torch.randn(last - first, rows.shape[1])
    rows = rows.to(dtype).view(len(rows), -1, head_dim)
    wide = [part.double() for part in rows.split((heads, kv_heads, kv_heads), dim=1)]
    return rows.to(device).split((heads, kv_heads, kv_heads), dim=1), wide


def _expected(segments, wide, window):
    q, k, v = wide
    rows = slice(segments[0].start, segments[-1].end)
    return reference.prefill_attention(q[rows], k, v, segments, window).flatten(1)


@pytest.mark.parametrize("chunk", _CHUNKS)
@pytest.mark.parametrize("window", [None, 1, 9])
def test_kernel_gives_the_reference(device, dot_dtype, chunk, window, assert_close):
    segments = _CHUNKS[chunk]
    (q, k, v), wide = _inputs(segments, 4, 2, 16, dot_dtype, device)
    expected = _expected(segments, wide, window)
    out = torch.full(expected.shape, float("nan"), dtype=dot_dtype, device=device)
    plan = plan_of(segments, device)
    varlen.varlen_attention(q, k, v, plan.blocks, segments[0].start, window, out)
    assert_close(out, expected, dot_dtype)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 8), (3, 1, 24), (2, 2, 80)])
def test_kernel_serves_any_heads(device, heads, kv_heads, head_dim, assert_close):
    segments = _CHUNKS["several"]
    (q, k, v), wide = _inputs(segments, heads, kv_heads, head_dim, torch.float32, device)
    expected = _expected(segments, wide, None)
    out = torch.full(expected.shape, float("nan"), device=device)
    plan = plan_of(segments, device)
    varlen.varlen_attention(q, k, v, plan.blocks, segments[0].start, None, out)
    assert_close(out, expected, torch.float32)


@pytest.mark.parametrize("chunk", _CHUNKS)
@pytest.mark.parametrize("window", [None, 1, 9])
def test_dispatch_gives_the_reference(device, dot_dtype, chunk, window, assert_close):
    """On a GPU this is the library's kernel where it serves the dtype."""
    segments = _CHUNKS[chunk]
    (q, k, v), wide = _inputs(segments, 8, 2, 64, dot_dtype, device)
    expected = _expected(segments, wide, window)
    out = torch.full(expected.shape, float("nan"), dtype=dot_dtype, device=device)
    kernel.prefill_attention(q, k, v, plan_of(segments, device), window, out)
    assert_close(out, expected, dot_dtype)


def test_segments_with_consecutive_keys_share_a_run():
    segments = [Segment(0, 8, 10), Segment(10, 10, 13), Segment(11, 13, 14)]
    plan = plan_of(segments, torch.device("cpu"))
    assert [run.rows for run in plan.runs] == [slice(8, 13), slice(13, 14)]
    assert plan.runs[0].cu_seqlens_q.tolist() == [0, 2, 5]
    assert plan.runs[0].cu_seqlens_k.tolist() == [0, 10, 13]
    assert (plan.runs[0].max_q, plan.runs[0].max_k) == (3, 10)
