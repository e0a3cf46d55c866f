"""Admission looks ahead: what it lets in has room until it ends."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_batcher import Run, policy_of

from moe_lightning.engine.forecast import AnswerLengths, Forecast

lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 25)), max_size=8)


@given(lengths, st.tuples(st.integers(1, 40), st.integers(1, 25)), st.integers(1, 30), st.integers(1, 8))
def test_a_sequence_is_taken_if_and_only_if_all_fit_at_all_times(running, new, num_blocks, block_size):
    def demand(sequences, time):
        return sum(-(-(held + time) // block_size) for held, left in sequences if left >= time)

    held, left = [r[0] for r in running], [r[1] for r in running]
    forecast = Forecast(num_blocks, block_size, held, left, horizon=25)
    fits = all(demand([*running, new], time) <= num_blocks for time in range(26))
    assert forecast.take(*new) == fits


def test_answers_are_expected_to_be_as_long_as_they_may_be_until_some_were_shorter():
    lengths = AnswerLengths()
    assert lengths.share(growing=500) == 1.0
    for _ in range(10):
        lengths.count(25, 100)
    assert lengths.share(growing=0) == 0.25
    assert lengths.share(growing=2500) == 1.0, "the short ones end first and do not speak for those that grow"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=20))
@example([(1, 1), (3, 7), (11, 7), (11, 7)])  # the first ends long before the others are longest
def test_answers_of_full_length_are_never_put_back(arrivals):
    run = Run(policy_of(max_num_seqs=16, num_blocks=12, block_size=4), longest=32)
    for num_prompt, num_new in arrivals:
        run.arrive(num_prompt, num_new)
    while run.batcher.has_work:
        run.run_pass()
    assert run.batcher.num_preemptions == 0


def test_room_that_old_sequences_will_leave_is_used():
    """Held back for its full length at once, the third would wait until another ends."""
    run = Run(policy_of(max_num_seqs=16, num_blocks=10, block_size=4, prefill_tokens=64), longest=32)
    old = [run.arrive(4, 12) for _ in range(2)]
    for _ in range(9):
        run.run_pass()
    young = run.arrive(4, 12)
    run.run_pass()
    assert run.batcher.running == [*old, young]


def test_answers_of_many_tokens_are_not_put_back_either():
    run = Run(policy_of(max_num_seqs=64, num_blocks=160, block_size=16, prefill_tokens=256), longest=1500)
    for number in range(40):
        run.arrive(1 + 5 * number % 90, 300 + 37 * number % 700)
    while run.batcher.has_work:
        run.run_pass()
    assert run.batcher.num_preemptions == 0


def test_answers_without_a_limit_do_not_starve_the_batch():
    """Taken for as long as the context allows, a few of them would fill the cache on paper."""
    run = Run(policy_of(max_num_seqs=64, num_blocks=1000, block_size=16, prefill_tokens=4096), longest=16000)
    for number in range(60):
        sequence = run.arrive(50, None)
        sequence.max_new_tokens = 40 + number  # it will stop by itself
    run.run_pass()
    run.run_pass()
    assert len(run.batcher.running) > 20
