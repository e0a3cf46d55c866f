"""What the planner is told of a pass is what the pass computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import tiny_policy
from moe_lightning.engine.facts import mean_context, pass_work
from moe_lightning.models.registry import resolve
from moe_lightning.runtime.micro_batch import DecodeRow, PrefillPiece, Step

SPEC = resolve("mixtral-8x7b")
POLICY = tiny_policy(pages_per_expert=2)
pieces = st.builds(
    PrefillPiece,
    token_ids=st.integers(1, 9).map(lambda n: tuple(range(n))),
    start=st.integers(0, 12),
    block_table=st.just((0,)),
    sampling=st.sampled_from([None, "sampling"]),
    next_ids=st.integers(0, 4).map(lambda n: (1,) * n),
)
rows = st.builds(DecodeRow, st.just(1), st.integers(0, 30), st.just((0,)), st.none())


def batches(of):
    return st.lists(st.lists(of, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple)


@given(step=st.builds(Step, batches(pieces), batches(rows)), window=st.none() | st.integers(1, 16))
def test_tokens_keys_and_rows_are_those_of_each_token_of_each_micro_batch(step, window):
    spec = replace(SPEC, attention=replace(SPEC.attention, sliding_window=window))
    work = pass_work(spec, "bfloat16", POLICY, step, streamed_pages=7)
    assert (work.num_prefill, work.streamed_pages, work.kv_share) == (len(step.prefill), 7, 0.0)
    at_once = replace(POLICY, packed=True, first_part_at_once=True)
    in_parts = pass_work(spec, "bfloat16", at_once, step, expert_parts=2)
    first = in_parts.num_prefill if step.decode else 0
    assert (in_parts.swept_first(0), in_parts.swept_first(1)) == (0, first)
    three_layers = replace(spec, num_layers=3)
    assert pass_work(three_layers, "bfloat16", replace(POLICY, kv_every=2), step).kv_share == 1 / 3
    starts = [[(p.start, len(p.token_ids)) for p in chunk] for chunk in step.prefill]
    starts += [[(row.position, 1) for row in members] for members in step.decode]
    seen = [[start + i + 1 for start, count in part for i in range(count)] for part in starts]
    assert work.tokens == tuple(map(len, seen))
    assert work.context_tokens == tuple(sum(min(keys, window or keys) for keys in part) for part in seen)
    sampled = [sum((p.sampling is not None) + len(p.next_ids) for p in chunk) for chunk in step.prefill]
    assert work.sampled_rows == (*sampled, *map(len, step.decode))
    contexts = [row.position + 1 for members in step.decode for row in members]
    assert mean_context(step) == pytest.approx(sum(contexts) / len(contexts) if contexts else 1.0)
