"""On a GPU, lanes that run at once give the tokens of plain layers one after the other."""

from __future__ import annotations

import random

import pytest
import torch

from checkpoints import greedy, load, prompts_of
from fake_machine import RATES
from moe_lightning import SamplingParams
from moe_lightning.engine.plan import Plan
from moe_lightning.errors import ScheduleError
from moe_lightning.perf.workload import Workload
from moe_lightning.pipeline.task import Lane, Schedule, TaskKind
from moe_lightning.runtime.cuda_executor import CudaExecutor
from policies import LENGTHS, drawn_policy

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]
NEW_TOKENS = 8
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def prompts():
    return prompts_of(LENGTHS)


@pytest.fixture(scope="module")
def answers(mixtral_reference, prompts):
    found = [greedy(mixtral_reference, prompt, NEW_TOKENS) for prompt in prompts]
    assert min(margin for _, margin in found) > 1e-3
    return [tokens for tokens, _ in found]


def cuda(directory, *, executor="auto", **changes):
    return load(directory, device="cuda", executor=executor, **changes)


def tokens_of(llm, prompts):
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, GREEDY)]


@pytest.mark.parametrize("number", range(60))
def test_no_policy_changes_a_token(number, mixtral, prompts, answers):
    policy = drawn_policy(number)
    llm = cuda(mixtral, executor="serial" if number % 6 == 0 else "auto", **policy)
    assert tokens_of(llm, prompts) == answers
    assert tokens_of(llm, prompts[::-1]) == answers[::-1], "the ring stands elsewhere now"


def test_no_expert_on_the_gpu_changes_no_token(mixtral, prompts, answers):
    llm = cuda(mixtral, cpu_every=1, resident_pages=(0, 0, 0), num_frames=0)
    assert tokens_of(llm, prompts) == answers
    assert tokens_of(llm, prompts[::-1]) == answers[::-1]


@pytest.mark.parametrize("number", range(0, 60, 4))
def test_packed_pages_change_no_token(number, mixtral, prompts):
    policy = {**drawn_policy(number), "schedule": "cgopipe"}
    plain = cuda(mixtral, dtype="bfloat16", **policy)
    expected = [tokens_of(plain, some) for some in (prompts, prompts[::-1])]
    del plain
    llm = cuda(mixtral, dtype="bfloat16", packed=True, **policy)
    assert llm._worker.weights.pages.frames.dtype is torch.uint8
    assert [tokens_of(llm, some) for some in (prompts, prompts[::-1])] == expected


@pytest.mark.parametrize("number", range(0, 40, 7))
def test_random_delays_change_no_token_of_packed_pages(number, mixtral, prompts, monkeypatch):
    policy = {**drawn_policy(number), "schedule": "cgopipe"}
    plain = cuda(mixtral, dtype="bfloat16", **policy)
    expected = tokens_of(plain, prompts)
    del plain
    llm = cuda(mixtral, dtype="bfloat16", packed=True, **policy)
    delay(llm, monkeypatch, number, most_ms=0.5)
    assert tokens_of(llm, prompts) == expected


class Delayed:
    """A runner whose tasks take longer: GPU lanes spin, the CPU lane sleeps, before or after the work."""

    def __init__(self, runner, draw, most_ms, lanes=tuple(Lane)):
        self._runner, self._draw, self._most_ms, self._lanes = runner, draw, most_ms, lanes

    def run(self, task):
        before = self._draw.random() < 0.5
        if before:
            self._wait(task)
        self._runner.run(task)
        if not before:
            self._wait(task)

    def _wait(self, task):
        if task.lane not in self._lanes:
            return
        seconds = self._draw.random() * self._most_ms * 1e-3
        if task.lane is Lane.CPU:
            import time

            time.sleep(seconds)
        else:
            torch.cuda._sleep(int(seconds * 1.5e9))


def delay(llm, monkeypatch, seed, most_ms=2.0, lanes=tuple(Lane)):
    draw = random.Random(seed)
    monkeypatch.setattr(llm._worker, "_wrap", lambda runner: Delayed(runner, draw, most_ms, lanes))


@pytest.mark.parametrize("number", range(0, 40, 3))
def test_random_delays_in_every_lane_change_no_token(number, mixtral, prompts, answers, monkeypatch):
    llm = cuda(mixtral, **{**drawn_policy(number), "schedule": "cgopipe"})
    delay(llm, monkeypatch, number, most_ms=0.5)
    assert tokens_of(llm, prompts) == answers
    assert tokens_of(llm, prompts[::-1]) == answers[::-1]


@pytest.mark.parametrize("number", range(1, 40, 5))
def test_random_delays_change_no_token_where_the_gpu_attends(number, mixtral, prompts, answers, monkeypatch):
    llm = cuda(mixtral, **{**drawn_policy(number), "schedule": "flexgen"})
    delay(llm, monkeypatch, number, most_ms=0.5)
    assert tokens_of(llm, prompts) == answers
    assert tokens_of(llm, prompts[::-1]) == answers[::-1]


@pytest.mark.parametrize(
    "consumer, producer",
    [
        (TaskKind.GPU_ATTENTION, TaskKind.LOAD_KV),
        (TaskKind.LOAD_KV, TaskKind.GPU_ATTENTION),
        (TaskKind.STORE_KV, TaskKind.PRE_ATTENTION),
    ],
    ids=lambda kind: kind.value,
)
def test_a_missing_dependency_is_noticed_where_the_gpu_attends(
    consumer, producer, mixtral, prompts, answers, monkeypatch
):
    llm = cuda(mixtral, schedule="flexgen", pages_per_expert=1, num_frames=12, micro_batch_size=1)
    drop(llm, consumer, producer, monkeypatch)
    assert tokens_of(llm, prompts[:4]) != answers[:4]


def test_kv_that_cannot_be_locked_is_staged_all_the_same(mixtral, prompts, answers):
    llm = cuda(mixtral, schedule="flexgen")
    llm._worker._kv.arena.is_pinned = False
    assert tokens_of(llm, prompts) == answers


@pytest.mark.parametrize("lane", list(Lane))
def test_one_slow_lane_changes_no_token(lane, mixtral, prompts, answers, monkeypatch):
    llm = cuda(mixtral, pages_per_expert=1, num_frames=9)
    delay(llm, monkeypatch, 1, most_ms=4.0, lanes=(lane,))
    assert tokens_of(llm, prompts[:4]) == answers[:4]


EDGES = [
    (TaskKind.OFFLOAD_QKV, TaskKind.PRE_ATTENTION),
    (TaskKind.ATTENTION, TaskKind.OFFLOAD_QKV),
    (TaskKind.LOAD_HIDDEN, TaskKind.ATTENTION),
    (TaskKind.POST_ATTENTION, TaskKind.LOAD_HIDDEN),
    (TaskKind.EXPERTS, TaskKind.LOAD_PAGE),
    (TaskKind.LOAD_PAGE, TaskKind.EXPERTS),
    (TaskKind.OFFLOAD_INPUTS, TaskKind.POST_ATTENTION),
    (TaskKind.CPU_EXPERTS, TaskKind.OFFLOAD_INPUTS),
    (TaskKind.ADD_OUTPUTS, TaskKind.CPU_EXPERTS),
]


def drop(llm, consumer, producer, monkeypatch):
    """Let consumers no longer wait for producers, which come late."""
    build = llm._worker._schedule

    def without(num_prefill, num_decode):
        schedule = build(num_prefill, num_decode)
        kinds = [task.kind for task in schedule.tasks]
        deps = tuple(
            tuple(d for d in needed if (kind, kinds[d]) != (consumer, producer))
            for kind, needed in zip(kinds, schedule.deps, strict=True)
        )
        return Schedule(schedule.name, schedule.shape, schedule.tasks, deps)

    class Slow:
        """Delays the producer before its work, and what overtakes it then is wrong."""

        def __init__(self, runner):
            self._runner = runner

        def run(self, task):
            if task.kind is producer:
                if task.lane is Lane.CPU:
                    import time

                    time.sleep(5e-3)
                else:
                    torch.cuda._sleep(8_000_000)
            self._runner.run(task)

    monkeypatch.setattr(llm._worker, "_schedule", without)
    monkeypatch.setattr(llm._worker, "_wrap", Slow)


@pytest.mark.parametrize("consumer, producer", EDGES, ids=lambda kind: kind.value)
def test_a_missing_dependency_is_noticed(consumer, producer, mixtral, prompts, answers, monkeypatch):
    """The tests above would prove nothing if a race left the tokens as they are."""
    llm = cuda(
        mixtral, pages_per_expert=1, resident_pages=(0, 0, 0), num_frames=12, group_size=1, cpu_every=2
    )
    drop(llm, consumer, producer, monkeypatch)
    try:
        assert tokens_of(llm, prompts[:4]) != answers[:4]
    except (ScheduleError, KeyError) as error:
        assert error


@pytest.mark.parametrize("waits_in_stream", [True, False])
def test_both_ways_to_wait_for_the_cpu_give_the_same_tokens(waits_in_stream, mixtral, prompts, answers):
    llm = cuda(mixtral)
    llm._worker._executor = CudaExecutor(llm._device, waits_in_stream=waits_in_stream)
    assert tokens_of(llm, prompts) == answers


def test_memory_that_cannot_be_locked_goes_through_staging(mixtral, prompts, answers):
    llm = cuda(mixtral)
    llm._worker._weights.pages.arena.is_pinned = False
    llm._worker._kv.arena.is_pinned = False
    assert tokens_of(llm, prompts) == answers
    assert llm._worker._weights.pages._staging is not None


class Boom(Exception):
    """Not one of the package's errors."""


@pytest.mark.parametrize("lane", list(Lane))
def test_after_an_error_in_a_lane_the_engine_goes_on_to_the_right_tokens(
    lane, mixtral, prompts, answers, monkeypatch
):
    llm, num_passes = cuda(mixtral, num_frames=17), 0

    class Failing:
        def __init__(self, runner):
            self._runner = runner

        def run(self, task):
            if task.lane is lane:
                raise Boom(str(task))
            self._runner.run(task)

    def wrap(runner):
        nonlocal num_passes
        num_passes += 1
        return Failing(runner) if num_passes == 3 else runner

    monkeypatch.setattr(llm._worker, "_wrap", wrap)
    for number, prompt in enumerate(prompts):
        llm.engine.add(llm.completion_request(str(number), prompt, GREEDY))
    found, num_errors = {}, 0
    while llm.engine.num_unfinished:
        try:
            for output in llm.engine.step():
                found[int(output.request_id)] = list(output.outputs[0].token_ids)
        except Boom:
            num_errors += 1
    assert num_errors == 1
    assert [found[number] for number in range(len(prompts))] == answers


def test_out_of_memory_in_the_middle_of_a_pass_makes_passes_smaller_and_changes_no_token(
    mixtral, prompts, answers, monkeypatch, caplog
):
    llm, num_passes = cuda(mixtral, num_frames=17), 0

    class Hungry:
        def __init__(self, runner):
            self._runner = runner

        def run(self, task):
            if task.kind is TaskKind.EXPERTS and task.layer == 1:
                torch.empty(2**50, dtype=torch.uint8, device="cuda")
            self._runner.run(task)

    def wrap(runner):
        nonlocal num_passes
        num_passes += 1
        return Hungry(runner) if num_passes in (3, 4) else runner

    monkeypatch.setattr(llm._worker, "_wrap", wrap)
    assert tokens_of(llm, prompts) == answers
    assert len(caplog.records) == 2, "each failure is told"


def test_the_timeline_has_every_task_and_lanes_that_overlap(mixtral, prompts):
    llm = cuda(mixtral, num_frames=17)
    tokens_of(llm, prompts)
    timeline = llm.fullest_pass
    assert timeline is not None
    assert timeline.span > 0
    assert all(seconds > 0 for seconds in timeline.busy_seconds().values())


def test_passes_that_drift_from_their_plan_change_it_and_no_token(mixtral, prompts, answers, caplog):
    llm = cuda(mixtral, num_frames=17)
    work = Workload(LENGTHS, 40)
    # A plan for a machine that is very much slower.
    llm.keep_to(Plan(llm.spec, llm._device, llm.dtype, llm.policy, llm.max_model_len, None, RATES, work))
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    outputs = llm.generate(prompts, params)
    assert [list(output.outputs[0].token_ids)[:NEW_TOKENS] for output in outputs] == answers
    assert 1 <= llm.engine.watch.num_revisions == len(caplog.messages)
    assert caplog.messages[0].startswith("passes take 0.0")
