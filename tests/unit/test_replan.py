"""Plans that a running engine can change to."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.hardware.presets import preset
from moe_lightning.models.registry import resolve
from moe_lightning.perf.default_policy import Memory
from moe_lightning.perf.outlook import Outlook
from moe_lightning.perf.planner import search
from moe_lightning.perf.rates import DatasheetRates
from moe_lightning.perf.refit import Refitted
from moe_lightning.perf.replan import LIMITS, Bounds, changes, only_limits_differ, replan, smaller
from moe_lightning.perf.workload import Workload
from moe_lightning.pipeline.task import TaskKind
from moe_lightning.units import GIB

SPEC = replace(resolve("mixtral-8x7b"), num_layers=3)
RATES = DatasheetRates(preset("l4"))
WORK = Workload((40, 77, 120), 32)
PLANNED = search(SPEC, "bfloat16", Memory(14 * GIB, 6 * GIB), RATES, WORK).policy
BOUNDS = Bounds(PLANNED, 200)


@settings(max_examples=4, deadline=None)
@given(
    factors=st.dictionaries(st.sampled_from(TaskKind), st.floats(0.1, 20)),
    micro_batch_size=st.integers(1, PLANNED.micro_batch_size),
    prefill=st.integers(200, PLANNED.prefill_tokens),
)
def test_a_new_plan_keeps_within_bounds_takes_the_same_memory_and_is_not_slower(
    factors, micro_batch_size, prefill
):
    # Micro-batches no smaller than a sixteenth: schedules of more take long to build.
    size = max(micro_batch_size, PLANNED.max_num_seqs // 16)
    now = replace(PLANNED, micro_batch_size=size, prefill_tokens=prefill)
    rates = Refitted(RATES, factors)
    found, predicted = replan(SPEC, "bfloat16", now, BOUNDS, rates, WORK)
    assert only_limits_differ(found, PLANNED)
    for name in ("max_num_seqs", "micro_batch_size", "prefill_tokens", "chunk_tokens"):
        assert 1 <= getattr(found, name) <= getattr(PLANNED, name)
    assert found.prefill_tokens >= BOUNDS.least_prefill
    was = Outlook(SPEC, "bfloat16", now, rates, WORK).prediction
    assert predicted.tokens_per_s >= was.tokens_per_s
    if found != now:
        assert predicted.tokens_per_s >= 1.03 * was.tokens_per_s
    assert predicted == Outlook(SPEC, "bfloat16", found, rates, WORK).prediction


def test_the_planners_policy_stays_while_rates_are_what_they_were():
    assert replan(SPEC, "bfloat16", PLANNED, BOUNDS, RATES, WORK)[0] == PLANNED


def test_where_attention_takes_longer_than_the_gpu_experts_sweep_for_part_of_the_sequences_at_a_time():
    whole = replace(PLANNED, expert_parts=1, num_frames=SPEC.experts.num_experts * PLANNED.pages_per_expert)
    lanes = Outlook(SPEC, "bfloat16", whole, RATES, WORK).prediction.lane_s
    rates = Refitted(RATES, {TaskKind.ATTENTION: 1.5 * lanes["gpu"] / lanes["cpu"]})
    found, _ = replan(SPEC, "bfloat16", whole, Bounds(whole, BOUNDS.least_prefill), rates, WORK)
    assert found.group_size < whole.group_size


def test_micro_batches_that_did_not_fit_are_not_tried_again_however_fast_they_would_be():
    small = replace(PLANNED, micro_batch_size=PLANNED.micro_batch_size // 4)
    assert replan(SPEC, "bfloat16", small, BOUNDS, RATES, WORK)[0].micro_batch_size > small.micro_batch_size
    bounds = Bounds(small, BOUNDS.least_prefill)
    assert replan(SPEC, "bfloat16", small, bounds, RATES, WORK)[0].micro_batch_size == small.micro_batch_size


@pytest.mark.parametrize("name", ["num_frames", "num_blocks", "block_size", "pages_per_expert"])
def test_what_takes_other_memory_is_told(name):
    assert not only_limits_differ(replace(PLANNED, **{name: getattr(PLANNED, name) + 1}), PLANNED)
    changed = replace(PLANNED, **{limit: getattr(PLANNED, limit) + 1 for limit in LIMITS})
    assert only_limits_differ(changed, PLANNED)


def test_a_policy_that_did_not_fit_is_made_finer_first_and_then_smaller_until_nothing_is_left():
    finer = smaller(PLANNED, PLANNED.max_num_seqs, 0)
    half = PLANNED.micro_batch_size // 2
    assert changes(PLANNED, finer) == (
        f"micro_batch_size {PLANNED.micro_batch_size} -> {half}, "
        f"chunk_tokens {PLANNED.chunk_tokens} -> {PLANNED.chunk_tokens // 2}"
    )
    policy, num_failures = finer, 1
    while (next_one := smaller(policy, 0, num_failures)) is not None:
        assert only_limits_differ(next_one, PLANNED)
        assert next_one.max_num_seqs == max(1, policy.max_num_seqs // 2)
        assert next_one.prefill_tokens == max(1, policy.prefill_tokens // 2)
        policy, num_failures = next_one, num_failures + 1
    assert (policy.max_num_seqs, policy.micro_batch_size, policy.prefill_tokens) == (1, 1, 1)


def test_what_ran_counts_where_it_was_less_than_might_have_run():
    assert smaller(PLANNED, 10, 0).micro_batch_size == 5
    # Of larger ones as many rows have logits at once as of this one.
    assert (
        smaller(replace(PLANNED, max_num_seqs=4000, micro_batch_size=2000), 4000, 0).micro_batch_size == 256
    )
    assert smaller(PLANNED, 10, 1).max_num_seqs == 5
