"""When passes drift from their predictions, the engine plans anew; no token and no request is lost by it."""

from __future__ import annotations

import random
import re
from concurrent.futures import Future
from dataclasses import replace
from math import ceil

import pytest
import torch

from checkpoints import load, prompts_of, tiny_policy
from fake_machine import RATES, FakeMachine, slower
from moe_lightning import SamplingParams
from moe_lightning.engine.background import at_once, in_thread
from moe_lightning.engine.facts import pass_work
from moe_lightning.engine.watch import MOST_REVISIONS, Watch
from moe_lightning.engine.worker import RecordedPass
from moe_lightning.models.registry import resolve
from moe_lightning.perf.drift import WINDOW
from moe_lightning.perf.facts import PassFacts
from moe_lightning.perf.passes import Passes
from moe_lightning.perf.refit import Refitted
from moe_lightning.perf.replan import LIMITS
from moe_lightning.perf.workload import Workload
from moe_lightning.pipeline.task import PassShape, TaskKind
from moe_lightning.policy import Policy
from moe_lightning.runtime.micro_batch import DecodeRow, Step
from policies import drawn_policy

LENGTHS = (1, 5, 16, 17, 33, 9, 4, 12, 20, 7)
NEW_TOKENS = 40
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
WORK = Workload(LENGTHS, NEW_TOKENS)
ROOMY = {"num_blocks": 128, "num_frames": 16}
SLOW_ATTENTION = {TaskKind.ATTENTION: 3.0}
ALL_SLOW = dict.fromkeys(TaskKind, 2.0)
SPEC = replace(resolve("mixtral-8x7b"), num_layers=3, dtype="float32")
POLICY = Policy(8, 4, 2**16, 4, 256, 256, 1, (0, 0, 0), 16, 64)


@pytest.fixture(scope="module")
def prompts():
    return prompts_of(LENGTHS)


def tokens_of(llm, prompts):
    return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, GREEDY, use_tqdm=False)]


@pytest.fixture(scope="module")
def answers(mixtral, prompts):
    return tokens_of(load(mixtral), prompts)


class Job:
    """An engine's run on a machine that takes so many times as long from some passes on."""

    def __init__(self, mixtral, prompts, factors, *, is_watched=True, **changes):
        self.llm = load(mixtral, executor="threads", **{**ROOMY, **changes})
        self.machine = FakeMachine(self.llm, lambda number: slower(factors.get(number)))
        if is_watched:
            self.machine.keep_to_plan(WORK)
        self.tokens = tokens_of(self.llm, prompts)

    @property
    def num_revisions(self):
        return self.llm.engine.watch.num_revisions

    @property
    def policy(self):
        """What batcher and worker have agreed on."""
        assert self.llm.engine._batcher.policy == self.llm._worker._policy
        return self.llm._worker._policy


def test_without_drift_the_plan_stays_and_nothing_is_said(mixtral, prompts, answers, caplog):
    job = Job(mixtral, prompts, {})
    assert job.tokens == answers
    assert job.machine.num_passes > 2 * WINDOW
    assert (job.num_revisions, job.policy, caplog.messages) == (0, job.llm.policy, [])


def test_drift_changes_the_plan_once_and_the_job_ends_sooner_with_the_same_tokens(
    mixtral, prompts, answers, caplog
):
    job = Job(mixtral, prompts, {5: SLOW_ATTENTION}, micro_batch_size=1)
    alone = Job(mixtral, prompts, {5: SLOW_ATTENTION}, micro_batch_size=1, is_watched=False)
    assert job.tokens == alone.tokens == answers
    assert job.machine.now < alone.machine.now
    assert job.num_revisions == 1, "what goes on as it is drifts no more"
    (message,) = caplog.messages
    found = re.fullmatch(
        r"passes take (\S+) times what was predicted \(attention 3\.00 times\); fitted to what was measured, the "
        r"plan changes \((.*)\): (\d+) tokens/s expected while memory is full, where (\d+) were",
        message,
    )
    assert found and float(found[1]) > 1.1
    changed = {name for name in LIMITS if getattr(job.policy, name) != getattr(job.llm.policy, name)}
    assert changed and changed == {change.split()[0] for change in found[2].split(", ")}


def test_passes_that_are_faster_than_predicted_drift_too(mixtral, prompts, answers, caplog):
    job = Job(mixtral, prompts, {1: dict.fromkeys(TaskKind, 0.5)})
    assert job.tokens == answers
    assert "passes take 0.5" in caplog.messages[0] and "load_page 0.5" in caplog.messages[0]


def test_a_few_slow_passes_are_no_drift(mixtral, prompts, caplog):
    slow, usual = dict.fromkeys(TaskKind, 9.0), {}
    bursts = {number: slow if number % 8 < 3 else usual for number in range(5, 100)}
    assert Job(mixtral, prompts, bursts).num_revisions == 0
    assert caplog.messages == []


def test_a_watch_that_fails_costs_no_answer(mixtral, prompts, answers, caplog, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(Watch, "note", fail)
    job = Job(mixtral, prompts, {})
    assert job.tokens == answers
    assert job.llm.engine.watch is None
    assert caplog.messages == ["passes are no longer compared with the plan"]


def test_what_drifts_on_and_on_is_followed_a_few_times_only(mixtral, prompts, answers):
    period = WINDOW + 2
    factors = {number: dict.fromkeys(TaskKind, 2.0 ** (number // period)) for number in range(1, 200)}
    job = Job(mixtral, prompts, factors, max_num_seqs=4, micro_batch_size=2)
    assert job.tokens == answers
    assert job.machine.num_passes > (MOST_REVISIONS + 3) * period
    assert job.num_revisions == MOST_REVISIONS


class Watched:
    """A watch over passes of one kind, which take so many times what was predicted."""

    def __init__(self, policy=POLICY):
        self.watch = Watch(SPEC, "float32", policy, RATES, WORK, 64)
        passes = Passes(SPEC, "float32", policy, RATES, 64.0, WORK.mean_prompt)
        self.predicted, _ = passes.steady(8, 0)
        row = DecodeRow(1, 63, (0,), None)
        self.step = Step(decode=((row,) * 4, (row,) * 4))
        shape = PassShape(SPEC.num_layers, 0, 2, 2**16, 4, (8, 8, 8), 16, preloaded=True)
        self.facts = PassFacts(
            "cgopipe", shape, pass_work(SPEC, "float32", tiny_policy(pages_per_expert=1), self.step)
        )

    def note(self, factor, recorded=False):
        timeline = self.facts.predict(Refitted(RATES, dict.fromkeys(TaskKind, factor)))
        example = RecordedPass(self.facts, lambda: timeline) if recorded else None
        return self.watch.note(self.step, factor * self.predicted, example)


@pytest.mark.parametrize(("held", "is_full"), [(8, True), (20, False)])
def test_passes_are_compared_that_have_half_the_sequences_of_full_memory_however_many_may_run(held, is_full):
    blocks = ceil(held * WORK.mean_blocks(POLICY.block_size))
    watched = Watched(replace(POLICY, max_num_seqs=40, num_blocks=blocks))
    for _ in range(WINDOW):
        watched.note(2.0)
    assert watched.watch.wants_recording == is_full


def test_passes_go_on_while_another_plan_is_searched_for_and_the_first_one_after_it_brings_it():
    watched, waiting = Watched(), []

    def begin(search):
        waiting.append((search, Future()))
        return waiting[-1][1]

    watched.watch._begin = begin
    assert not any(watched.note(2.0, recorded=True) for _ in range(3 * WINDOW))
    ((search, future),) = waiting
    assert not watched.watch.wants_recording and watched.watch.num_revisions == 0
    future.set_result(search())
    assert "passes take 2.00 times" in watched.note(9.0).message
    assert watched.watch.num_revisions == 1
    assert not any(watched.note(2.0, recorded=True) for _ in range(2 * WINDOW)), (
        "what is fitted drifts no more"
    )


def test_a_pass_that_does_not_fit_makes_a_search_void():
    watched = Watched()
    watched.watch._begin = lambda search: Future()
    assert not any(watched.note(2.0, recorded=True) for _ in range(WINDOW))
    smaller = watched.watch.shrink_to(replace(POLICY, max_num_seqs=4, micro_batch_size=2))
    assert smaller.max_num_seqs == 4 and watched.watch._search is None


def test_a_search_that_fails_is_told_where_its_result_is_asked_for():
    def fail():
        raise ZeroDivisionError

    for begin in (at_once, in_thread):
        with pytest.raises(ZeroDivisionError):
            begin(fail).result(60)


def test_a_recorded_pass_that_was_not_as_the_others_is_no_example():
    watched = Watched()
    assert not any(watched.note(2.0, recorded=True) for _ in range(WINDOW - 1))
    assert not watched.watch.wants_recording
    assert watched.note(2.0) is None and watched.watch.wants_recording
    assert watched.note(9.0, recorded=True) is None and watched.watch.wants_recording
    assert "passes take 2.00 times" in watched.note(2.0, recorded=True).message
    assert not watched.watch.wants_recording


def test_after_a_revision_as_many_passes_must_drift_again_and_rates_are_fitted_to_those_of_the_plan():
    watched = Watched()
    for factor, drift in ((2.0, 2.0), (4.0, 2.0), (1.0, 0.25)):
        assert not any(watched.note(factor, recorded=True) for _ in range(WINDOW - 1))
        message = watched.note(factor, recorded=True).message
        assert f"passes take {drift:.2f} times" in message
        assert factor == 1.0 or f"experts {factor:.2f} times" in message
        assert watched.watch._rest == pytest.approx(1.0, rel=0.1), (
            "tasks explain all but the time between passes"
        )
    assert "no kind of task stands out" in message


def test_passes_made_smaller_for_want_of_memory_stay_so_when_the_plan_changes(
    mixtral, prompts, answers, caplog, monkeypatch
):
    llm = load(mixtral, executor="threads", **ROOMY, micro_batch_size=4, group_size=1)
    machine = FakeMachine(llm, lambda number: slower(ALL_SLOW if number > 12 else None))
    machine.keep_to_plan(WORK)
    run, steps = llm._worker.run, []

    def run_out_of_memory(step):
        steps.append(step)
        if len(steps) in (4, 5):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return run(step)

    monkeypatch.setattr(llm._worker, "run", run_out_of_memory)
    assert tokens_of(llm, prompts) == answers
    first, second, drifted = caplog.messages
    assert "micro_batch_size 4 -> 2" in first and "group_size 1 -> " in first, "the best of the smaller plans"
    assert "max_num_seqs 8 -> 4" in second
    assert drifted.startswith(("passes take 1.9", "passes take 2.0")) and "the plan stays" in drifted
    assert llm.engine.watch.num_revisions == 1
    assert all(sum(map(len, step.decode)) <= 4 for step in steps[5:])
    assert all(len(rows) <= 1 for step in steps[5:] for rows in step.decode)


def test_a_serial_executor_is_not_watched(mixtral):
    llm = load(mixtral, executor="serial")
    FakeMachine(llm).keep_to_plan(WORK)
    assert llm.engine.watch is None


@pytest.mark.parametrize("number", range(8))
def test_limits_that_change_between_any_passes_change_no_token(number, mixtral, prompts, answers):
    draw = random.Random(number)
    llm = load(mixtral, executor="threads" if number % 2 else "serial", **drawn_policy(number))
    built = llm.policy

    def change():
        policy = replace(
            built,
            max_num_seqs=draw.randint(1, built.max_num_seqs),
            micro_batch_size=draw.randint(1, built.max_num_seqs),
            group_size=draw.choice([1, 2, 100]),
            look_ahead=draw.choice([0, 1, 5]),
            prefill_tokens=draw.randint(33, built.prefill_tokens),
            chunk_tokens=draw.randint(3, built.chunk_tokens),
        )
        llm.engine._batcher.keep_to(policy)
        llm._worker.keep_to(policy)

    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for order, prompt in enumerate(prompts):
        llm.engine.add(llm.completion_request(str(order), prompt, params))
    found = {}
    while llm.engine.num_unfinished:
        found.update({int(o.request_id): list(o.outputs[0].token_ids) for o in llm.engine.step()})
        change()
    assert [found[order] for order in range(len(prompts))] == [tokens[:12] for tokens in answers]


def test_a_worker_refuses_limits_that_take_other_memory(mixtral):
    llm = load(mixtral)
    with pytest.raises(AssertionError, match="takes other memory"):
        llm._worker.keep_to(replace(llm.policy, num_frames=llm.policy.num_frames + 1))
