"""Measures the kernels around the experts: norm, rotary embedding, router, prefill attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moe_lightning.bench.result import Measurement
from moe_lightning.bench.shapes import LayerShape
from moe_lightning.bench.timing import relative_error, seconds_of
from moe_lightning.kernels import ops, reference
from moe_lightning.kernels.prefill_plan import PrefillPlan
from moe_lightning.kernels.reference import Segment
from moe_lightning.models.spec import RopeSpec

_COLD_BYTES = 256 * 2**20  # more than any cache: buffers are rotated over as much memory
_PROMPT = 1024  # tokens of a prompt in the attention's chunk


def measure_layer(
    model: str, shape: LayerShape, num_tokens: int, dtype: torch.dtype
) -> Iterator[Measurement]:
    """One measurement for each kernel."""
    yield _norm(model, shape, num_tokens, dtype)
    yield _rotary(model, shape, num_tokens, dtype)
    yield _router(model, shape, num_tokens, dtype)
    yield _attention(model, shape, num_tokens, dtype)


def _copies(make: Callable[[], Tensor], most: int = 32) -> list[Tensor]:
    first = make()
    number = max(1, min(most, _COLD_BYTES // max(1, first.numel() * first.element_size())))
    return [first, *(make() for _ in range(number - 1))]


def _norm(model: str, shape: LayerShape, num_tokens: int, dtype: torch.dtype) -> Measurement:
    h = shape.hidden_size
    weight = torch.rand(h, device="cuda", dtype=dtype)
    rows = _copies(lambda: torch.randn(num_tokens, h, device="cuda", dtype=dtype))
    out = torch.full_like(rows[0], float("nan"))
    ops.rms_norm(rows[0], weight, 1e-5, out=out)
    error = relative_error(out, reference.rms_norm(rows[0].float(), weight.float(), 1e-5))
    seconds = seconds_of([lambda x=x: ops.rms_norm(x, weight, 1e-5, out=out) for x in rows])  # type: ignore[misc]
    peer = seconds_of([lambda x=x: F.rms_norm(x, (h,), weight, 1e-5) for x in rows])  # type: ignore[misc]
    num_bytes = 2 * num_tokens * h * dtype.itemsize
    return Measurement(
        "rms_norm", model, num_tokens, seconds, 4.0 * num_tokens * h, num_bytes, error, {"torch": peer}
    )


def _rotary(model: str, shape: LayerShape, num_tokens: int, dtype: torch.dtype) -> Measurement:
    a = shape.attention
    heads = a.num_heads + a.num_kv_heads
    inv_freq = reference.inverse_frequencies(RopeSpec(), a.head_dim).cuda()
    cos, sin = reference.rotary(torch.arange(num_tokens, device="cuda"), inv_freq, dtype)
    rows = _copies(lambda: torch.randn(num_tokens, a.qkv_size, device="cuda", dtype=dtype))
    turned = rows[0][:, : heads * a.head_dim].reshape(num_tokens, heads, a.head_dim).float()
    expected = reference.rotate(turned, cos.float(), sin.float()).flatten(1)
    ops.rotate_(rows[0], cos, sin, heads)
    error = relative_error(rows[0][:, : heads * a.head_dim], expected)
    seconds = seconds_of([lambda x=x: ops.rotate_(x, cos, sin, heads) for x in rows])  # type: ignore[misc]
    num_bytes = 2 * num_tokens * heads * a.head_dim * dtype.itemsize + 2 * cos.numel() * dtype.itemsize
    return Measurement(
        "rotate", model, num_tokens, seconds, 3.0 * num_tokens * heads * a.head_dim, num_bytes, error
    )


def _router(model: str, shape: LayerShape, num_tokens: int, dtype: torch.dtype) -> Measurement:
    e, k = shape.num_experts, shape.router.top_k
    logits = torch.randn(num_tokens, e, device="cuda", dtype=dtype)
    ids = torch.empty(num_tokens, k, device="cuda", dtype=torch.int64)
    weights = torch.empty(num_tokens, k, device="cuda")
    ops.route(logits, shape.router, ids, weights)
    expected = reference.route(logits, shape.router)[1]
    error = relative_error(weights, expected)
    seconds = seconds_of([lambda: ops.route(logits, shape.router, ids, weights)])
    peer = seconds_of([lambda: logits.float().softmax(dim=-1).topk(k, dim=-1)])
    num_bytes = num_tokens * (e * dtype.itemsize + k * 12)
    return Measurement(
        "route", model, num_tokens, seconds, 3.0 * num_tokens * e, num_bytes, error, {"softmax, topk": peer}
    )


def _attention(model: str, shape: LayerShape, num_tokens: int, dtype: torch.dtype) -> Measurement:
    a = shape.attention
    qkv = torch.randn(num_tokens, a.qkv_size, device="cuda", dtype=dtype).view(num_tokens, -1, a.head_dim)
    q, k, v = torch.split(qkv, [a.num_heads, a.num_kv_heads, a.num_kv_heads], dim=1)
    starts = range(0, num_tokens, _PROMPT)
    segments = [Segment(start, start, min(start + _PROMPT, num_tokens)) for start in starts]
    plan = PrefillPlan.of(segments, lambda values, dtype: torch.as_tensor(values, dtype=dtype, device="cuda"))
    out = torch.full((num_tokens, a.q_size), float("nan"), device="cuda", dtype=dtype)
    ops.prefill_attention(q, k, v, plan, None, out)
    expected = reference.prefill_attention(q.float(), k.float(), v.float(), segments, None).flatten(1)
    error = relative_error(out, expected)
    seconds = seconds_of([lambda: ops.prefill_attention(q, k, v, plan, None, out)])
    sdpa = seconds_of([lambda: reference.prefill_attention(q, k, v, segments, None)])
    pairs = sum((s.end - s.start) * (s.end - s.start + 1) / 2 for s in segments)
    num_bytes = (qkv.numel() + out.numel()) * dtype.itemsize
    return Measurement(
        "prefill_attention",
        model,
        num_tokens,
        seconds,
        4.0 * pairs * a.q_size,
        num_bytes,
        error,
        {"SDPA": sdpa},
    )
