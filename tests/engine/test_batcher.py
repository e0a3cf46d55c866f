"""The batcher on its own: any mix of arrivals, lengths, ends and failures, without a model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.engine.batcher import Batcher
from moe_lightning.engine.request import Request, SamplingParams
from moe_lightning.engine.sequence import Sequence
from moe_lightning.engine.stopping import Finish
from moe_lightning.engine.waiting import Turns, Waiting
from moe_lightning.memory.blocks import num_blocks_for
from moe_lightning.policy import Policy

IN_ORDER, JOB = Turns(), Turns(together=800)


def policy_of(**changes):
    values = {
        "max_num_seqs": 4, "micro_batch_size": 2, "group_size": 1, "look_ahead": 1, "prefill_tokens": 24,
        "chunk_tokens": 7, "pages_per_expert": 1, "resident_pages": (1,), "num_frames": 0, "num_blocks": 8,
        "block_size": 4,
    }  # fmt: skip
    return Policy(**{**values, **changes})


def sequence_of(order, num_prompt, num_new, max_model_len, is_background=False):
    prompt = tuple(range(100 * order, 100 * order + num_prompt))
    params = SamplingParams(max_tokens=num_new, temperature=0)
    request = Request(str(order), prompt, params, is_background=is_background)
    return Sequence(request, 0, order, max_model_len, None)


def test_in_batches_nobody_is_admitted_before_all_have_ended():
    batcher = Batcher(policy_of(max_num_seqs=3, num_blocks=20), (), in_batches=True)
    for order in range(5):
        batcher.add(sequence_of(order, 3, 2 + order % 2, 40))
    sizes = []
    while batcher.has_work:
        batch = batcher.next()
        sizes.append((len(batch.admitted), sum(map(len, batch.decode))))
        for sequence in batcher.running:
            sequence.output_ids.append(1)
            if len(sequence.output_ids) == sequence.max_new_tokens:
                sequence.finish = Finish("length", None, "")
        batcher.retire()
    assert sizes == [(3, 0), (0, 3), (0, 1), (2, 0), (0, 2), (0, 1)]


def test_a_batch_whose_prompts_need_several_passes_stays_open_until_memory_is_full():
    policy = policy_of(max_num_seqs=4, num_blocks=9, prefill_tokens=6)
    batcher = Batcher(policy, (), in_batches=True)
    for order in range(6):
        batcher.add(sequence_of(order, 6, 6, 40))
    admitted = []
    for _ in range(4):
        admitted.append(len(batcher.next().admitted))
        for sequence in batcher.running:
            sequence.output_ids.append(1)
    assert admitted == [1, 1, 1, 0], "three blocks each: the third is the last that fits"
    batcher.running[0].finish = Finish("length", None, "")
    batcher.retire()
    assert not batcher.next().admitted, "there is room, but the batch is closed"


@dataclass
class Arrival:
    """A sequence that comes before a pass, and when it is aborted, if it is."""

    before_pass: int
    num_prompt: int
    num_new: int
    aborted_before_pass: int | None
    is_background: bool


@st.composite
def runs(draw):
    """A policy, arrivals that fit it, and the passes that fail."""
    block_size = draw(st.integers(1, 6))
    num_blocks = draw(st.integers(2, 12))
    prefill_tokens = draw(st.integers(4, 40))
    policy = policy_of(
        max_num_seqs=draw(st.integers(1, 6)),
        micro_batch_size=draw(st.integers(1, 4)),
        prefill_tokens=prefill_tokens,
        chunk_tokens=draw(st.integers(1, 10)),
        num_blocks=num_blocks,
        block_size=block_size,
    )
    longest = min(num_blocks * block_size, prefill_tokens)
    arrivals = st.builds(
        Arrival,
        before_pass=st.integers(0, 10),
        num_prompt=st.integers(1, longest - 1),
        num_new=st.integers(0, 12),
        aborted_before_pass=st.none() | st.integers(1, 12),
        is_background=st.booleans(),
    )
    failing = draw(st.sets(st.integers(0, 20), max_size=3))
    return policy, longest, draw(st.booleans()), draw(st.lists(arrivals, min_size=1, max_size=12)), failing


class Run:
    """Drives a batcher as the engine does, with a token counter for a model."""

    def __init__(self, policy, longest, expects_short=False, turns=IN_ORDER):
        self.policy, self.longest, self.is_in_order = policy, longest, turns == IN_ORDER
        self.batcher = Batcher(policy, (), turns)
        # As after many answers that were much shorter than they might have been.
        self.batcher._answer_lengths.count(0, 10**9 if expects_short else 0)
        self.arrived = []
        self.aborted = set()

    def arrive(self, num_prompt, num_new, is_background=False):
        sequence = sequence_of(len(self.arrived), num_prompt, num_new, self.longest, is_background)
        self.arrived.append(sequence)
        self.batcher.add(sequence)
        return sequence

    def abort(self, sequence):
        if not sequence.finish:
            self.aborted.add(sequence.order)
            self.batcher.remove({sequence.request.request_id})

    def run_pass(self, fails=False):
        """One pass; whether it moved something."""
        batch = self.batcher.next()
        self.check(batch)
        if fails:
            self.batcher.put_back()
            return True
        sampled = [s for members in (*batch.prefill, *batch.decode) for s in members]
        for sequence in sampled:
            sequence.output_ids.append(7)
            if len(sequence.output_ids) == sequence.max_new_tokens:
                sequence.finish = Finish("length", None, "")
        for sequence in batch.admitted:
            if sequence.max_new_tokens == 0:
                sequence.finish = Finish("length", None, "")
        self.batcher.retire()
        return bool(sampled or batch.admitted)

    def check(self, batch):
        self.check_blocks()
        self.check_nothing_is_lost()
        self.check_step(batch)

    def check_blocks(self):
        owned = [block for s in self.batcher.running for block in s.blocks]
        assert len(owned) == len(set(owned)), "a block has two owners"
        assert set(owned) <= set(range(self.policy.num_blocks))
        assert len(owned) + self.batcher.allocator.num_free == self.policy.num_blocks, "a block is lost"
        for sequence in self.batcher.running:
            assert len(sequence.blocks) == num_blocks_for(sequence.num_tokens, self.policy.block_size)
        assert not any(s.blocks for s in self.batcher.waiting)

    def check_nothing_is_lost(self):
        running, waiting = [s.order for s in self.batcher.running], [s.order for s in self.batcher.waiting]
        ended = {s.order for s in self.arrived if s.finish} | self.aborted
        assert sorted([*running, *waiting, *ended]) == [s.order for s in self.arrived]
        assert len(running) <= self.policy.max_num_seqs
        if self.is_in_order:
            self.check_fairness()

    def check_fairness(self):
        """Of each kind, whoever came first runs first."""
        for kind in (False, True):
            of_kind = [s.order for s in (*self.batcher.running, *self.batcher.waiting)
                       if s.request.is_background is kind]  # fmt: skip
            assert of_kind == sorted(of_kind)
        for queue in (self.batcher.running, list(self.batcher.waiting)):
            assert queue == sorted(queue, key=lambda s: s.rank)

    def check_step(self, batch):
        policy, running = self.policy, {s.order for s in self.batcher.running}
        admitted = [s.order for s in batch.admitted]
        decoded = [s.order for members in batch.decode for s in members]
        assert sorted(admitted + decoded) == sorted(running), "each runs once in a pass"
        rows = len(decoded) + sum(s.num_tokens for s in batch.admitted)
        assert rows <= policy.max_num_seqs + policy.prefill_tokens
        assert all(0 < len(members) <= policy.micro_batch_size for members in batch.decode)
        for members, rows in zip(batch.decode, batch.step.decode, strict=True):
            for sequence, row in zip(members, rows, strict=True):
                assert (row.token_id, row.position) == (sequence.token_ids[-1], sequence.num_tokens - 1)
                assert row.block_table == sequence.blocks
        self.check_chunks(batch)

    def check_chunks(self, batch):
        pieces = [piece for chunk in batch.step.prefill for piece in chunk]
        sizes = [sum(len(piece.token_ids) for piece in chunk) for chunk in batch.step.prefill]
        assert all(size == self.policy.chunk_tokens for size in sizes[:-1])
        assert all(0 < size <= self.policy.chunk_tokens for size in sizes)
        tokens = [token for piece in pieces for token in piece.token_ids]
        assert tokens == [token for s in batch.admitted for token in s.token_ids]
        ends = [s.order for chunk in batch.prefill for s in chunk]
        assert ends == [s.order for s in batch.admitted if s.max_new_tokens > 0]


@settings(max_examples=300, deadline=None)
@given(runs(), st.sampled_from([1, 1, 2, 5, 100]))
def test_no_block_has_two_owners_no_sequence_is_lost_and_the_queue_always_moves(case, together):
    policy, longest, expects_short, arrivals, failing = case
    run, number = Run(policy, longest, expects_short, Turns(together)), 0
    pending = list(arrivals)
    aborts = {}
    while pending or run.batcher.has_work:
        for arrival in [a for a in pending if a.before_pass <= number]:
            sequence = run.arrive(arrival.num_prompt, arrival.num_new, arrival.is_background)
            if arrival.aborted_before_pass is not None:
                aborts.setdefault(max(arrival.aborted_before_pass, number + 1), []).append(sequence)
        pending = [a for a in pending if a.before_pass > number]
        for sequence in aborts.pop(number, []):
            run.abort(sequence)
        if run.batcher.has_work:
            assert run.run_pass(fails=number in failing), "a pass that moves nothing is for ever"
        number += 1
    run.check_blocks()
    run.check_nothing_is_lost()
    for sequence in run.arrived:
        if sequence.order not in run.aborted:
            assert len(sequence.output_ids) == sequence.max_new_tokens
    assert run.batcher.allocator.num_free == policy.num_blocks


def test_the_youngest_gives_its_blocks_back_first_and_returns_to_the_head_of_the_queue():
    run = Run(policy_of(num_blocks=4, block_size=4), longest=16, expects_short=True)
    first, second, third = (run.arrive(num_prompt, 8) for num_prompt in (4, 3, 8))
    run.run_pass()
    assert run.batcher.running == [first, second], "the third would take what these two need next"
    while run.batcher.num_preemptions == 0:
        run.run_pass()
    assert run.batcher.running == [first]
    assert list(run.batcher.waiting) == [second, third]
    assert second.output_ids, "its tokens are kept"
    while run.batcher.has_work:
        run.run_pass()
    assert [len(s.output_ids) for s in run.arrived] == [8, 8, 8]


def test_background_work_gives_its_blocks_back_before_younger_requests():
    run = Run(policy_of(num_blocks=4, block_size=4), longest=16, expects_short=True)
    background = run.arrive(4, 8, is_background=True)
    run.run_pass()
    asked = run.arrive(3, 8)
    while run.batcher.num_preemptions == 0:
        run.run_pass()
    assert (run.batcher.running, list(run.batcher.waiting)) == ([asked], [background])
    while run.batcher.has_work:
        run.run_pass()
    assert [len(s.output_ids) for s in run.arrived] == [8, 8]


@pytest.mark.parametrize("changes", [{"max_num_seqs": 3, "num_blocks": 32}, {"num_blocks": 8}])
def test_background_work_makes_room_for_a_request_in_the_pass_in_which_it_is_asked(changes):
    run = Run(policy_of(**changes), longest=24, expects_short=True)
    background = [run.arrive(6, 12, is_background=True) for _ in range(4)]
    run.run_pass()
    run.run_pass()
    running = list(run.batcher.running)
    assert 1 < len(running) < 4, "memory is full"
    asked = run.arrive(6, 2)
    run.run_pass()
    assert run.batcher.running == [asked, *running[:-1]], "the youngest went, and no more than had to"
    assert list(run.batcher.waiting) == background[len(running) - 1 :]
    while run.batcher.has_work:
        run.run_pass()
    assert [len(s.output_ids) for s in run.arrived] == [12] * 4 + [2]


def test_background_work_does_not_go_where_that_makes_no_room():
    run = Run(policy_of(num_blocks=8, max_num_seqs=3), longest=32, expects_short=True)
    first, background = run.arrive(16, 6), run.arrive(4, 6, is_background=True)
    run.run_pass()
    asked = run.arrive(20, 2)
    run.run_pass()
    assert run.batcher.running == [first, background]
    while not asked.finish:
        run.run_pass()
    assert first.finish


@settings(max_examples=100, deadline=None)
@given(runs())
def test_whoever_is_asked_for_waits_for_no_background_work(case):
    policy, longest, expects_short, arrivals, _ = case
    run = Run(policy, longest, expects_short)
    for arrival in arrivals:
        run.arrive(arrival.num_prompt, arrival.num_new, is_background=True)
    for _ in range(3):
        if run.batcher.has_work:
            run.run_pass()
    asked = run.arrive(longest // 2 + 1, 1)
    for _ in range(2):  # a pass in which sequences are put back for want of blocks admits nobody
        if not asked.finish:
            run.run_pass()
    assert asked.finish
    while run.batcher.has_work:
        assert run.run_pass(), "a pass that moves nothing is for ever"


def test_a_waiting_request_overtakes_background_work_that_waits():
    run = Run(policy_of(num_blocks=32, max_num_seqs=1), longest=24)
    running, background, asked = run.arrive(3, 2), run.arrive(3, 2, is_background=True), run.arrive(3, 2)
    run.run_pass()
    assert (run.batcher.running, list(run.batcher.waiting)) == ([running], [asked, background])
    run.batcher.put_back()
    assert list(run.batcher.waiting) == [running, asked, background]


def test_a_long_prompt_at_the_head_is_not_overtaken():
    run = Run(policy_of(num_blocks=8, block_size=4), longest=24)
    running = run.arrive(12, 12)
    run.run_pass()
    long, short = run.arrive(20, 2), run.arrive(2, 2)
    run.run_pass()
    assert run.batcher.running == [running]
    assert list(run.batcher.waiting) == [long, short]


def test_prompts_of_one_pass_stay_within_the_prefill_tokens():
    run = Run(policy_of(prefill_tokens=10, num_blocks=32), longest=10)
    for _ in range(3):
        run.arrive(5, 4)
    assert len(run.batcher.next().admitted) == 2


def test_put_back_keeps_arrival_order_and_frees_every_block():
    run = Run(policy_of(num_blocks=32), longest=24)
    sequences = [run.arrive(3, 4) for _ in range(6)]
    run.run_pass()
    run.batcher.put_back()
    assert list(run.batcher.waiting) == sequences
    assert run.batcher.running == []
    assert run.batcher.allocator.num_free == 32


@pytest.mark.parametrize("where", ["running", "waiting"])
def test_a_removed_sequence_leaves_nothing_behind(where):
    run = Run(policy_of(max_num_seqs=1), longest=24)
    first, second = run.arrive(4, 5), run.arrive(4, 5)
    run.run_pass()
    gone, stays = (first, second) if where == "running" else (second, first)
    run.abort(gone)
    assert gone not in run.batcher.running
    assert gone not in run.batcher.waiting
    while run.batcher.has_work:
        run.run_pass()
    assert len(stays.output_ids) == 5
    assert run.batcher.allocator.num_free == 8


def passes_of_a_job(turns, num_prompt=4, num_new=16):
    """Passes and recomputed sequences for twice the requests that fill memory on average."""
    run = Run(
        policy_of(max_num_seqs=100, micro_batch_size=50, num_blocks=240, prefill_tokens=400), 64, turns=turns
    )
    for _ in range(2 * 240 * 4 // (num_prompt + num_new // 2)):
        run.arrive(num_prompt, num_new)
    passes = 0
    while run.batcher.has_work:
        run.run_pass()
        passes += 1
    assert all(len(s.output_ids) == num_new for s in run.arrived)
    return passes, run.batcher.num_preemptions


def test_a_job_ends_sooner_where_those_with_most_to_do_keep_their_memory():
    in_order, num_put_back = passes_of_a_job(IN_ORDER)
    assert num_put_back == 0
    together, num_put_back = passes_of_a_job(JOB)
    assert 0 < num_put_back < 160 and together < 0.85 * in_order


def test_no_long_prompt_is_computed_again_to_end_a_job_sooner():
    assert passes_of_a_job(JOB, num_prompt=40, num_new=8)[1] == 0


def test_what_was_put_back_ends_before_those_begin_that_come_much_later():
    run = Run(policy_of(num_blocks=4, max_num_seqs=4), longest=16, turns=Turns(together=3))
    sequences = [run.arrive(4, 8) for _ in range(6)]
    while not all(s.output_ids for s in sequences[3:]):
        run.run_pass()
    assert run.batcher.num_preemptions > 0
    assert all(s.finish or s.blocks for s in sequences[:3])


@pytest.mark.parametrize(
    ("turns", "order"), [
        (JOB, [0, 2, 3, 1]), (replace(JOB, is_ending=True), [2, 0, 3, 1]),
        (IN_ORDER, [0, 1, 2, 3]), (replace(IN_ORDER, is_ending=True), [0, 1, 2, 3]),
    ],
)  # fmt: skip
def test_the_last_requests_of_a_job_begin_with_those_that_may_get_the_longest_answers(turns, order):
    """Number 1 has begun and was put back: in a job it goes behind those that have not."""
    waiting = Waiting(turns)
    for number, length in enumerate((4, 9, 7, 2)):
        sequence = sequence_of(number, 3, length, 16)
        sequence.output_ids += [7] * (number == 1)
        waiting.add(sequence)
    assert [waiting.pop().order for _ in range(4)] == order


def test_without_a_gpu_nothing_is_computed_twice_for_a_job():
    assert Turns.of_job(policy_of(max_num_seqs=5), torch.device("cpu")) == IN_ORDER
    assert Turns.of_job(policy_of(max_num_seqs=5), torch.device("cuda", 0)).together > 5


def test_a_batcher_goes_by_other_turns_from_the_next_pass_on():
    run = Run(policy_of(num_blocks=4, max_num_seqs=1), longest=16, turns=JOB)
    first, second = run.arrive(4, 8), run.arrive(4, 8)
    run.run_pass()
    run.batcher.put_back()
    assert list(run.batcher.waiting) == [second, first], "who has not begun goes first in a job"
    run.batcher.change_turns(IN_ORDER)
    assert list(run.batcher.waiting) == [first, second]
