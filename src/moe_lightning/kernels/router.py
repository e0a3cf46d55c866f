"""Triton: the experts of each token and their weights."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_lightning.models.spec import RouterSpec

_ROWS = 4  # tokens of one program


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["ids_ptr", "weights_ptr"])
def _route_kernel(
    logits_ptr, ids_ptr, weights_ptr, num_tokens, num_experts,
    SCORING: tl.constexpr, NORMALIZE: tl.constexpr, TOP_K: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, EXPERTS)
    slots = tl.arange(0, SLOTS)
    inside = (rows < num_tokens)[:, None] & (experts < num_experts)[None, :]
    pointers = logits_ptr + rows.to(tl.int64)[:, None] * num_experts + experts[None, :]
    logits = tl.load(pointers, mask=inside, other=float("-inf")).to(tl.float32)
    largest = tl.max(logits, axis=1)[:, None]
    if SCORING == "softmax_topk":
        likelihoods = tl.where(inside, tl.exp(logits - largest), 0.0)
        scores = likelihoods / tl.sum(likelihoods, axis=1)[:, None]
        keys = logits
    else:
        tl.static_assert(False, "a scoring that has no branch here")

    ids = tl.zeros((ROWS, SLOTS), tl.int32)
    weights = tl.zeros((ROWS, SLOTS), tl.float32)
    taken = ~inside
    for k in tl.static_range(TOP_K):
        free = tl.where(taken, float("-inf"), keys)
        best = tl.max(free, axis=1)[:, None]
        # Of equal ones the lowest id. Logits that are not numbers equal nothing: the last id stands for them.
        chosen = tl.min(tl.where((free == best) & ~taken, experts[None, :], num_experts - 1), axis=1)[:, None]
        mine = experts[None, :] == chosen
        score = tl.sum(tl.where(mine, scores, 0.0), axis=1)[:, None]
        ids = tl.where(slots[None, :] == k, chosen, ids)
        weights = tl.where(slots[None, :] == k, score, weights)
        taken = taken | mine
    if NORMALIZE:
        weights /= tl.sum(weights, axis=1)[:, None]
    place = rows[:, None] * TOP_K + slots[None, :]
    kept = (rows < num_tokens)[:, None] & (slots < TOP_K)[None, :]
    tl.store(ids_ptr + place, ids.to(ids_ptr.dtype.element_ty), mask=kept)
    tl.store(weights_ptr + place, weights, mask=kept)


def route(logits: Tensor, router: RouterSpec, topk_ids: Tensor, topk_weights: Tensor) -> None:
    """Each token's experts, best first; of equal logits the lower id.

    Args:
        logits: [T, E], contiguous.
        router: scoring and number of experts.
        topk_ids: [T, K], any integer type, written.
        topk_weights: [T, K] float32, written.
    """
    num_tokens, num_experts = logits.shape
    if num_tokens == 0:
        return
    _route_kernel[(triton.cdiv(num_tokens, _ROWS),)](
        logits, topk_ids, topk_weights, num_tokens, num_experts,
        SCORING=router.scoring.value, NORMALIZE=router.normalize, TOP_K=router.top_k, ROWS=_ROWS,
        EXPERTS=triton.next_power_of_2(num_experts), SLOTS=triton.next_power_of_2(router.top_k),
    )  # fmt: skip
