"""How full the passes of a job are foreseen to be, beside the passes of the batcher itself."""

from __future__ import annotations

from collections import deque
from dataclasses import astuple, replace
from math import ceil

import numpy as np
import pytest
import torch

from moe_lightning.bench.workloads import workload
from moe_lightning.engine.batcher import Batcher
from moe_lightning.engine.request import Request, SamplingParams
from moe_lightning.engine.sequence import Sequence
from moe_lightning.engine.stopping import Finish
from moe_lightning.engine.waiting import Turns
from moe_lightning.perf.filling import QUEUE, kinds_of_passes, most_prompts
from moe_lightning.perf.sizing import ROOM
from moe_lightning.perf.workload import Workload, num_decoding
from moe_lightning.policy import Policy


def policy_for(work, num_seqs, prefill):
    """KV memory for so many sequences, and room for `prefill` times the prompts of a steady pass."""
    return Policy(
        max_num_seqs=ceil(ROOM * num_seqs), micro_batch_size=64, group_size=2**16, look_ahead=8,
        prefill_tokens=max(work.longest, ceil(prefill * num_seqs * work.mean_prompt / work.mean_answer)),
        chunk_tokens=2048, pages_per_expert=1, resident_pages=(0,), num_frames=1,
        num_blocks=ceil(num_seqs * work.mean_blocks(16)), block_size=16,
    )  # fmt: skip


def passes_of_batcher(policy, work, count):
    """Sequences that decode and tokens of prompts, of each pass of a job of so many requests."""
    batcher, passes = Batcher(policy, (), Turns.of_job(policy, torch.device("cuda"))), []
    pairs = np.array([work.prompt_lens, work.answers])[:, np.arange(count) % len(work.prompt_lens)]
    left = deque(enumerate(np.random.default_rng(5).permutation(pairs, axis=1).T))
    while left or batcher.has_work:
        while left and len(batcher.waiting) < QUEUE * policy.max_num_seqs:
            number, (length, answer) = left.popleft()
            params = SamplingParams(max_tokens=int(answer), temperature=0, ignore_eos=True)
            request = Request(str(number), (1,) * int(length), params)
            batcher.add(Sequence(request, 0, number, work.longest, None))
            if not left:
                batcher.change_turns(replace(batcher.turns, is_ending=True))
        batch = batcher.next()
        passes.append((sum(map(len, batch.decode)), sum(s.num_tokens for s in batch.admitted)))
        for sequence in batcher.running:
            sequence.output_ids.append(1)
            if len(sequence.output_ids) == sequence.request.params.max_tokens:
                sequence.finish = Finish("length", None, "")
        batcher.retire()
    return passes


@pytest.mark.parametrize(
    ("work", "prefill"),
    [
        (workload("mtbench", 32), 4.0),
        (workload("mtbench", 32), 1.25),
        (workload("mtbench", 100), 3.0),  # two tokens of an answer are taken for one
        (Workload((150, 250, 400), 16), 2.0),  # prompts are long, so nobody is admitted who may be put back
        (Workload((20,), 1), 2.0),
        (Workload.of([(60, 16), (60, 1000)]), 2.0),
        (Workload.of([(60, 1)] * 9 + [(60, 500)]), 2.0),
        (Workload.of([(20 + i, 16 + 7 * (i % 29)) for i in range(200)]), 3.0),
        (Workload.of([(100, 300), (3000, 20), (800, 40), (2000, 10)]), 2.0),
    ],
    ids=[
        "full", "few prompts", "steps", "long prompts", "one token", "short and long", "few long", "any",
        "long prompts and any",
    ],
)  # fmt: skip
def test_passes_of_a_job_are_about_those_of_the_batcher(work, prefill):
    policy = policy_for(work, 1000, prefill)
    n, most = num_decoding(policy, work), most_prompts(policy, work)
    kinds = kinds_of_passes(policy, work)
    decode, prompts = np.array(passes_of_batcher(policy, work, 2 * n)).T
    assert sum(astuple(kinds)) == pytest.approx(len(decode), rel=0.03, abs=1)
    many, share = np.minimum(decode / n, 1), np.minimum(prompts / np.maximum(most - decode, 1), 1)
    near = {"rel": 0.1, "abs": 0.02 * len(decode) + 0.5}
    assert kinds.quiet == pytest.approx(((1 - many) * (1 - share)).sum(), **near)
    assert kinds.full == pytest.approx((many * (1 - share)).sum(), **near)
    assert kinds.ramp == pytest.approx(((1 - many) * share).sum(), **near)
    assert kinds.crowded == pytest.approx((many * share).sum(), **near)
    assert kinds.steady == 0
    assert kinds_of_passes(replace(policy, num_frames=0), work) == kinds, "whether weights stream or not"


@pytest.mark.parametrize(
    ("pairs", "num_seqs"),
    [
        ([(60, 1 + 10 * i) for i in range(100)], 150),  # several passes are taken for one, with some put back
        ([(4000, 1), (10, 400)], 100),  # prompts are dear on average, beside those that run they are not
        ([(2000, 1), (500, 300)], 100),
    ],
)  # fmt: skip
def test_passes_of_mixed_jobs_are_about_as_many_as_the_batchers(pairs, num_seqs):
    work = Workload.of(pairs)
    policy = policy_for(work, num_seqs, 2.0)
    count = len(passes_of_batcher(policy, work, 2 * num_decoding(policy, work)))
    assert sum(astuple(kinds_of_passes(policy, work))) == pytest.approx(count, rel=0.08)


def test_a_job_that_ends_with_its_short_answers_takes_fewer_passes(monkeypatch):
    work = Workload.of([(20 + i, 16 + 7 * (i % 29)) for i in range(200)])
    policy = policy_for(work, 400, 3.0)
    longest_first = len(passes_of_batcher(policy, work, 800))
    monkeypatch.setattr(Batcher, "change_turns", lambda batcher, turns: None)
    assert longest_first < 0.75 * len(passes_of_batcher(policy, work, 800))


def test_a_sample_stands_for_a_job_of_any_size_and_what_comes_after_three_memories_is_steady():
    small, large = (
        kinds_of_passes(policy_for(work, num_seqs, 2.0), work)
        for work, num_seqs in ((workload("mtbench", 64), 600), (workload("mtbench", 64), 60_000))
    )
    assert astuple(small) == pytest.approx(astuple(large), rel=0.05, abs=1)
    work = workload("mtbench", 64)
    policy = policy_for(work, 600, 2.0)
    n = num_decoding(policy, work)
    three, ten = (kinds_of_passes(policy, Workload(work.prompt_lens, 64, times * n)) for times in (3, 10))
    assert three.steady == 0 and ten.steady == pytest.approx(7 * 64)
    assert astuple(three)[:4] == astuple(ten)[:4]


@pytest.mark.parametrize(("num_seqs", "num_requests"), [(1, 1), (1, 3), (2, 5)])
def test_the_smallest_jobs_end(num_seqs, num_requests):
    work = Workload((10, 300), 40, num_requests)
    kinds = kinds_of_passes(policy_for(work, num_seqs, 2.0), work)
    assert sum(astuple(kinds)) >= 40


@pytest.mark.parametrize("num_requests", [1, 32])
def test_a_job_far_smaller_than_what_a_policy_has_room_for_is_no_job_of_nothing(num_requests):
    kinds = kinds_of_passes(policy_for(workload("mtbench", 32), 2314, 2.0), Workload((77,), 32, num_requests))
    assert sum(astuple(kinds)) >= 32


def test_a_prompt_longer_than_a_pass_has_room_for_is_admitted_all_the_same():
    """As after a plan was made smaller; the batcher takes one in each pass."""
    work = Workload((5000,), 4, 30)
    policy = replace(policy_for(work, 10, 2.0), prefill_tokens=1000)
    assert sum(astuple(kinds_of_passes(policy, work))) < 2 * len(passes_of_batcher(policy, work, 30))
