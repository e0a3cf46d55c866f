"""Runs that share one engine: each gets its own outputs, all of them, whoever drives the passes."""

from __future__ import annotations

import pytest

from checkpoints import load, prompts_of
from moe_lightning import SamplingParams

PROMPTS = prompts_of((3, 5, 9, 4, 17, 2))
# Of different lengths, so that they finish in different passes.
PARAMS = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (4, 9, 2, 7, 3, 6)]


@pytest.fixture(scope="module")
def llm(mixtral):
    return load(mixtral)


@pytest.fixture(scope="module")
def answers(llm):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]


def found(outputs):
    return {int(output.request_id): output.outputs[0].token_ids for output in outputs}


def is_idle(llm):
    engine = llm.engine
    is_empty = engine.num_unfinished == engine.num_running == engine.num_waiting == 0
    return is_empty and engine._batcher.allocator.num_free == llm.policy.num_blocks and not llm._runs._run_of


def test_generate_inside_an_iteration_takes_nothing_from_it(llm, answers):
    iterator = llm.generate_iter(PROMPTS, PARAMS)
    first = next(iterator)
    (other,) = llm.generate([PROMPTS[1]], PARAMS[1])  # long enough that all the others finish meanwhile
    assert other.outputs[0].token_ids == answers[1]
    assert found([first, *iterator]) == dict(enumerate(answers))
    assert is_idle(llm)


def test_iterations_that_take_turns_each_get_their_own(llm, answers):
    one, two = llm.generate_iter(PROMPTS[:3], PARAMS[:3]), llm.generate_iter(PROMPTS[3:], PARAMS[3:])
    outputs = [[], []]
    for _ in range(3):
        for of_run, iterator in zip(outputs, (one, two), strict=True):
            of_run.append(next(iterator))
    assert [next(iterator, None) for iterator in (one, two)] == [None, None]
    assert found(outputs[0]) == dict(enumerate(answers[:3]))
    assert found(outputs[1]) == dict(enumerate(answers[3:]))
    assert is_idle(llm)


def test_an_iteration_that_is_closed_drops_its_own_requests_only(llm, answers):
    left, kept = llm.generate_iter(PROMPTS, PARAMS), llm.generate_iter(PROMPTS, PARAMS)
    next(left)
    first = next(kept)  # what the passes for it finish of the other one is dropped with it
    left.close()
    assert llm.engine.num_unfinished == len(PROMPTS) - 1
    assert found([first, *kept]) == dict(enumerate(answers))
    assert is_idle(llm)


def test_the_engine_knows_when_no_run_has_more_requests(llm, answers, monkeypatch):
    monkeypatch.setattr(llm._runs, "_max_waiting", 2)

    def is_ending():
        return llm.engine._batcher.turns.is_ending

    one = llm.generate_iter(PROMPTS, PARAMS)
    found_of_one = [next(one)]
    two = llm.generate_iter(PROMPTS * 3, PARAMS * 3)
    next(two)
    assert not is_ending()
    two.close()
    found_of_one += one
    assert is_ending() and found(found_of_one) == dict(enumerate(answers))
    llm.generate(PROMPTS[:1], PARAMS[0])
    assert is_ending() and is_idle(llm)


def test_a_run_waits_for_room_that_another_one_takes(mixtral, answers):
    llm = load(mixtral, max_num_seqs=1)
    full = llm.generate_iter(PROMPTS, PARAMS)
    first = next(full)
    # The queue is full of the other run's requests: none of these can be queued yet.
    assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS)] == answers
    assert found([first, *full]) == dict(enumerate(answers))
