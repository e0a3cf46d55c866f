"""What a job's lines tell the planner before a model is loaded."""

from __future__ import annotations

import json
from dataclasses import astuple
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.jobs.lengths import Lengths
from moe_lightning.jobs.lines import parse_line
from moe_lightning.perf.filling import kinds_of_passes
from moe_lightning.perf.workload import Workload
from moe_lightning.policy import Policy


class Words:
    """A tokenizer with a token for every four characters."""

    chat_template = "there is one"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [7] * -(-len(text) // 4)}

    def apply_chat_template(self, messages, **_):
        return "".join(m["content"] for m in messages)


def line(number, **body):
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    record = {"custom_id": str(number), "method": "POST", "url": url, "body": body}
    return parse_line(json.dumps(record).encode(), number)


def lengths_of(*bodies):
    lengths = Lengths()
    for number, body in enumerate(bodies):
        lengths.add(line(number, **body))
    return lengths


def test_prompts_are_counted_by_a_sample_and_answers_by_what_they_may_be():
    bodies = [{"prompt": "x" * 40 * (1 + i % 3), "max_tokens": 10 * (1 + i % 2)} for i in range(3000)]
    work = lengths_of(*bodies).workload(Words())
    assert work.num_requests == 3000
    assert work.gen_len == 15
    assert set(work.prompt_lens) == {10, 20, 30}
    assert set(zip(work.prompt_lens, work.answers, strict=True)) >= {(10, 10), (30, 20)}
    assert work.mean_prompt == pytest.approx(20, abs=0.2)
    assert len(work.prompt_lens) <= 600


def test_no_request_is_longer_than_the_longest():
    lengths = lengths_of(
        {"prompt": "é" * 100, "max_tokens": 5},
        {"prompt": [1] * 300, "max_tokens": 7},
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20},
    )
    assert lengths.longest >= 307
    assert lengths_of({"prompt": "é" * 100, "max_tokens": 5}).longest >= 205, "a token may be a single byte"


def test_a_request_without_a_limit_may_have_a_long_answer_and_is_expected_to_have_a_usual_one():
    lengths = lengths_of({"messages": [{"role": "user", "content": "hello you"}]})
    assert lengths.longest > 8192
    assert lengths.workload(Words()).gen_len == 256


def test_requests_that_the_tokenizer_refuses_are_left_out_of_the_rate():
    class Refusing(Words):
        chat_template = None

    lengths = lengths_of({"messages": [{"role": "user", "content": "x" * 400}]}, {"prompt": "x" * 80})
    assert max(lengths.workload(Refusing()).prompt_lens) <= 110


def test_several_answers_to_a_prompt_count_as_several():
    lengths = lengths_of(*[{"prompt": "x" * 40, "max_tokens": 8, "n": 6}] * 10)
    assert lengths.workload(Words()).num_requests == 60


def test_answers_count_as_often_in_their_mean_as_they_are_given():
    lengths = lengths_of({"prompt": "x", "max_tokens": 1000, "n": 9}, {"prompt": "x", "max_tokens": 100})
    work = lengths.workload(Words())
    assert (work.num_requests, work.gen_len) == (10, 910)


def test_answers_of_two_lengths_stay_apart_and_with_their_prompts():
    bodies = [{"prompt": "x" * 40, "max_tokens": 16}, {"prompt": "x" * 400, "max_tokens": 1000}]
    work = lengths_of(*bodies * 1000).workload(Words())
    assert set(zip(work.prompt_lens, work.answers, strict=True)) == {(10, 16), (100, 1000)}
    assert work.mean_answer == 508 and work.num_requests == 2000


@pytest.mark.parametrize("rare", [(1024, 1112), (1024, 600), (300, 7)])
def test_rare_long_answers_count_in_all_tokens_and_in_the_time_that_a_job_takes(rare):
    answer, every = rare
    limits = [answer if i % every == 5 else 1 for i in range(10_000)]
    work = lengths_of(*({"prompt": "x" * 240, "max_tokens": limit} for limit in limits)).workload(Words())
    assert work.num_requests * work.mean_answer == pytest.approx(sum(limits), rel=0.01)
    assert work.longest_answer == answer
    policy = Policy(
        max_num_seqs=2000, micro_batch_size=64, group_size=2**16, look_ahead=8, prefill_tokens=20_000,
        chunk_tokens=2048, pages_per_expert=1, resident_pages=(0,), num_frames=1, num_blocks=20_000, block_size=16,
    )  # fmt: skip
    assert sum(astuple(kinds_of_passes(policy, work))) > answer - 1


@given(
    st.lists(
        st.tuples(st.integers(1, 400), st.integers(1, 1024), st.integers(1, 9)), min_size=1, max_size=40
    ),
    st.integers(1, 60),
)
@settings(max_examples=30)
def test_lengths_are_those_of_all_lines_together(kinds, times):
    bodies = [{"prompt": "x" * 4 * size, "max_tokens": limit, "n": n} for size, limit, n in kinds * times]
    work = lengths_of(*bodies).workload(Words())
    count = times * sum(n for *_, n in kinds)
    assert work.num_requests == count and len(work.prompt_lens) == min(512, count)
    assert work.mean_answer * count == pytest.approx(
        times * sum(limit * n for _, limit, n in kinds), rel=0.01
    )
    assert work.mean_prompt * count == pytest.approx(times * sum(size * n for size, _, n in kinds), rel=0.05)


def test_prompts_are_as_spread_as_those_of_all_lines_whatever_their_answers_are():
    draw = Random(0)
    pairs = [(draw.choice((10, 10, 10, 400)), draw.randint(1, 1000)) for _ in range(20_000)]
    work = lengths_of(*({"prompt": [1] * size, "max_tokens": limit} for size, limit in pairs)).workload(
        Words()
    )
    true = Workload(tuple(size for size, _ in pairs), 1)
    assert work.mean_prompt == pytest.approx(true.mean_prompt, rel=0.01)
    assert work.token_prompt == pytest.approx(true.token_prompt, rel=0.1), (
        "of means alone it would be a third"
    )


def test_a_limit_that_nobody_means_does_not_shape_the_plan():
    lengths = lengths_of({"prompt": "x", "max_tokens": 2_000_000_000}, {"prompt": "x", "max_tokens": 100})
    assert lengths.workload(Words()).gen_len < 1000
    assert lengths.longest < 2**17
