from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lightning.engine.balance import balance, spread

LENGTHS = st.lists(st.integers(0, 60), max_size=50)
COUNTS = st.integers(1, 6)


def algorithm_2(lengths, num_micro_batches, micro_batch_size, cache_tokens, gen_len):
    """The paper's words, one by one, over plain lists."""
    members = [[] for _ in range(num_micro_batches)]
    sums = [0] * num_micro_batches
    deferred = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        still_open = [b for b in range(num_micro_batches) if len(members[b]) < micro_batch_size]
        target = min(still_open, key=lambda b: (sums[b], b), default=None)
        if (
            target is None
            or sums[target] + lengths[index] + (len(members[target]) + 1) * gen_len > cache_tokens
        ):
            deferred.append(index)
        else:
            members[target].append(index)
            sums[target] += lengths[index]
    return members, sorted(deferred)


@given(LENGTHS, COUNTS, st.integers(1, 8), st.integers(0, 300), st.integers(0, 20))
def test_balance_is_algorithm_2(lengths, num, size, cache_tokens, gen_len):
    result = balance(lengths, num, size, cache_tokens, gen_len)
    assert tuple(result) == algorithm_2(lengths, num, size, cache_tokens, gen_len)


@given(LENGTHS, COUNTS, st.integers(1, 8), st.integers(0, 300), st.integers(0, 20))
def test_balance_loses_no_sequence_and_stays_within_size_and_cache(lengths, num, size, cache_tokens, gen_len):
    micro_batches, deferred = balance(lengths, num, size, cache_tokens, gen_len)
    assert sorted([i for members in micro_batches for i in members] + deferred) == list(range(len(lengths)))
    for members in micro_batches:
        assert len(members) <= size
        # Without members nothing is held; cache_tokens bounds what the members hold at their end.
        assert sum(lengths[i] + gen_len for i in members) <= cache_tokens


def test_balance_defers_what_the_cache_cannot_hold_and_takes_a_shorter_one_in_its_place():
    assert balance([50, 10], 1, 4, cache_tokens=30, gen_len=5) == ([[1]], [0])


def test_generated_tokens_of_all_members_count_against_the_cache():
    assert balance([10, 10, 10], 1, 4, cache_tokens=30, gen_len=5) == ([[0, 1]], [2])


@given(LENGTHS, COUNTS)
def test_spread_puts_every_sequence_in_exactly_one_micro_batch_of_allowed_size(lengths, num):
    size = max(1, -(-len(lengths) // num))
    micro_batches = spread(lengths, num, size)
    assert len(micro_batches) == num
    assert sorted(i for members in micro_batches for i in members) == list(range(len(lengths)))
    assert max(map(len, micro_batches)) <= size


@given(LENGTHS, COUNTS)
def test_spread_keeps_sums_within_one_longest_sequence_when_no_micro_batch_fills_up(lengths, num):
    micro_batches = spread(lengths, num, len(lengths) + 1)
    sums = [sum(lengths[i] for i in members) for members in micro_batches]
    assert max(sums) - min(sums) <= max(lengths, default=0)


@given(LENGTHS, COUNTS)
def test_spread_is_algorithm_2_without_a_cache_limit(lengths, num):
    size = max(1, -(-len(lengths) // num))
    assert spread(lengths, num, size) == algorithm_2(lengths, num, size, float("inf"), 0)[0]


def test_ties_go_to_the_lowest_index():
    assert spread([5, 5, 5, 5], 2, 2) == [[0, 2], [1, 3]]


def test_spread_refuses_more_sequences_than_there_are_places():
    with pytest.raises(ValueError, match="5 sequences do not fit 2 micro-batches of 2; admit 4"):
        spread([1] * 5, 2, 2)


@pytest.mark.parametrize(("num", "size"), [(0, 1), (1, 0)])
def test_micro_batches_without_places_are_refused(num, size):
    with pytest.raises(ValueError, match="1 or more"):
        balance([1], num, size, 100, 1)


def test_no_sequences_give_empty_micro_batches():
    assert spread([], 3, 2) == [[], [], []]
    assert balance([], 2, 2, 10, 1) == ([[], []], [])
