"""What is said of lengths together, beside the same by counting every token of every sequence."""

from __future__ import annotations

from collections import Counter
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lightning.bench.workloads import as_met, sequences, workload
from moe_lightning.errors import ConfigError
from moe_lightning.perf.workload import Workload

PAIRS = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 200)), min_size=1, max_size=30)


@given(PAIRS, st.sampled_from([1, 4, 16, 32]))
def test_what_a_decoding_sequence_holds_is_the_mean_over_all_tokens_that_are_generated(pairs, block_size):
    work = Workload.of(pairs, 7)
    held = [prompt + age for prompt, answer in pairs for age in range(1, answer + 1)]
    assert work.mean_context == pytest.approx(sum(held) / len(held))
    blocks = sum(ceil(tokens / block_size) for tokens in held)
    assert work.mean_blocks(block_size) == pytest.approx(blocks / len(held))
    assert work.longest == max(map(sum, pairs))
    assert work.mean_answer == pytest.approx(len(held) / len(pairs))
    assert abs(work.gen_len - work.mean_answer) <= 0.5
    assert work.num_requests == 7


def test_answers_of_one_length_are_no_others_than_those_of_a_workload_that_has_one():
    assert Workload.of([(3, 8), (5, 8)], 4) == Workload((3, 5), 8, 4)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (((), 1), "prompts of 1 token or more"),
        (((0,), 1), "prompts of 1 token or more"),
        (((1,), 0), "gen_len=0: answers have 1 token or more"),
        (((1, 1), 3, None, (6, 0)), "answers have 1 token or more"),
        (((1, 1), 3, None, (3,)), "2 prompts with 1 answers; give one for each"),
    ],
)
def test_lengths_that_nothing_has_are_refused(lengths, message):
    with pytest.raises(ConfigError, match=message):
        Workload(*lengths)


def test_in_the_middle_of_a_job_those_with_long_answers_are_met_more_often():
    work = Workload.of([(10, 10), (20, 30), (30, 60)])
    found = Counter(zip(as_met(work).prompt_lens, as_met(work).answers, strict=True))
    total = sum(found.values())
    assert {pair: round(count / total, 2) for pair, count in found.items()} == {
        (10, 10): 0.1, (20, 30): 0.3, (30, 60): 0.6,
    }  # fmt: skip
    assert as_met(workload("mtbench")) == workload("mtbench")


def test_prompts_keep_their_answers():
    work = Workload.of([(10, 1), (20, 2), (30, 3)])
    assert Counter((len(prompt), answer) for prompt, answer in sequences(work, 6, 100)) == {
        (10, 1): 2, (20, 2): 2, (30, 3): 2,
    }  # fmt: skip
