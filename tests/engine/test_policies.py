"""No policy, schedule or executor changes a token."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from checkpoints import NUM_EXPERTS, NUM_LAYERS, greedy, load, prompts_of
from moe_lightning import SamplingParams
from moe_lightning.errors import DeviceError, ScheduleError
from moe_lightning.pipeline.baselines import SCHEDULES
from moe_lightning.pipeline.task import Lane, Schedule, TaskKind
from moe_lightning.runtime import runner
from policies import LENGTHS, Overtaken, Slowed, drawn_policy

NAMES = sorted(SCHEDULES)
NEW_TOKENS = 8
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def prompts():
    return prompts_of(LENGTHS)


@pytest.fixture(scope="module")
def answers(mixtral_reference, prompts):
    """What transformers answers; no choice in it is so close that rounding could turn it."""
    found = [greedy(mixtral_reference, prompt, NEW_TOKENS) for prompt in prompts]
    assert min(margin for _, margin in found) > 1e-3
    return [tokens for tokens, _ in found]


def tokens_of(llm, prompts, params=GREEDY):
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]


@pytest.mark.parametrize("number", range(40))
def test_no_policy_changes_a_token(number, mixtral, prompts, answers):
    executor = "threads" if number % 3 else "serial"
    llm = load(mixtral, executor=executor, **drawn_policy(number))
    assert tokens_of(llm, prompts) == answers
    assert tokens_of(llm, prompts[::-1]) == answers[::-1], "the ring stands elsewhere now"


def test_what_is_known_of_a_pass_is_what_its_schedule_has(mixtral, prompts):
    llm = load(mixtral, executor="threads", **drawn_policy(1))
    tokens_of(llm, prompts)
    shape, work = llm.fullest_facts.shape, llm.fullest_facts.work
    assert work.streamed_pages == sum(shape.streamed_pages) > 0
    assert work.num_prefill == shape.num_prefill and len(work.tokens) == shape.num_micro_batches


@pytest.mark.parametrize("number", range(0, 40, 3))
def test_packed_pages_change_no_token(number, mixtral, prompts):
    policy = drawn_policy(number)
    # Where a sequence stands among others changes how products round in bfloat16: so both in the same order.
    plain = load(mixtral, dtype="bfloat16", **policy)
    executor = "threads" if number % 2 else "serial"
    llm = load(mixtral, dtype="bfloat16", executor=executor, packed=True, **policy)
    assert llm._worker.weights.pages.host.dtype is torch.uint8
    assert tokens_of(llm, prompts) == tokens_of(plain, prompts)
    assert tokens_of(llm, prompts[::-1]) == tokens_of(plain, prompts[::-1]), "the ring stands elsewhere now"


def test_the_drawn_policies_meet_the_extremes():
    policies = [drawn_policy(number) for number in range(40)]
    rings = [
        (p["num_frames"], NUM_EXPERTS * p["pages_per_expert"] - min(p["resident_pages"])) for p in policies
    ]
    assert {p["schedule"] for p in policies} == set(SCHEDULES)
    assert any(frames == smallest for frames, smallest in rings)
    assert any(frames > 2 * smallest for frames, smallest in rings)
    assert any(p["schedule"] == "cgopipe" and p["cpu_every"] for p in policies)
    assert any(0 < frames < smallest for frames, smallest in rings), (
        "less than a layer, where experts are in parts"
    )


@pytest.mark.parametrize("executor", ["serial", "threads"])
@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize(
    "resident, num_frames",
    [
        ((0, 0, 0), NUM_EXPERTS),
        ((NUM_EXPERTS,) * 3, 0),
        ((0, NUM_EXPERTS, 0), NUM_EXPERTS),
        ((7, 7, 7), 1),
    ],
    ids=["all-streamed", "all-resident", "one-layer-resident", "ring-of-one-frame"],
)
def test_no_residency_changes_a_token_with_the_smallest_ring(
    schedule, executor, resident, num_frames, mixtral, prompts, answers
):
    values = {"resident_pages": resident, "num_frames": num_frames, "pages_per_expert": 1}
    llm = load(mixtral, executor=executor, schedule=schedule, **values)
    assert tokens_of(llm, prompts[:4]) == answers[:4]


@pytest.mark.parametrize("executor", ["serial", "threads"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("group_size", [1, 100])
@pytest.mark.parametrize("cpu_every", [1, 2, 3])
def test_experts_on_the_cpu_change_no_token(
    cpu_every, group_size, packed, executor, mixtral, prompts, answers, monkeypatch
):
    on_cpu = range(cpu_every - 1, NUM_LAYERS, cpu_every)
    values = {
        "cpu_every": cpu_every, "group_size": group_size, "expert_parts": 2, "kv_every": 2,
        "resident_pages": tuple(0 if layer in on_cpu else layer for layer in range(NUM_LAYERS)),
    }  # fmt: skip
    expected = tokens_of(load(mixtral, dtype="bfloat16", **values), prompts) if packed else answers
    packing = {"dtype": "bfloat16", "packed": True} if packed else {}
    llm = load(mixtral, executor=executor, **values, **packing)
    draw, seen = random.Random(cpu_every), Counter()

    def delay(task):
        seen[task.kind, task.layer] += 1
        return draw.random() * 1e-3

    slow_down(llm, delay, monkeypatch)
    assert tokens_of(llm, prompts) == expected
    assert {layer for kind, layer in seen if kind is TaskKind.CPU_EXPERTS} == set(on_cpu)
    assert {layer for kind, layer in seen if kind is TaskKind.EXPERTS} == set(range(NUM_LAYERS)) - set(on_cpu)


def slow_down(llm, delay, monkeypatch):
    monkeypatch.setattr(llm._worker, "_wrap", lambda runner: Slowed(runner, delay))


@pytest.mark.parametrize("schedule", NAMES)
def test_random_delays_in_every_lane_change_no_token(schedule, mixtral, prompts, answers, monkeypatch):
    draw = random.Random(schedule)
    llm = load(mixtral, executor="threads", schedule=schedule, pages_per_expert=1, num_frames=9)
    slow_down(llm, lambda task: draw.random() * 1e-3, monkeypatch)
    assert tokens_of(llm, prompts) == answers


@pytest.mark.parametrize("schedule", ["cgopipe", "flexgen"])
@pytest.mark.parametrize("lane", list(Lane))
def test_one_slow_lane_changes_no_token(lane, schedule, mixtral, prompts, answers, monkeypatch):
    llm = load(mixtral, executor="threads", schedule=schedule, pages_per_expert=1, num_frames=9)
    slow_down(llm, lambda task: 2e-3 * (task.lane is lane), monkeypatch)
    assert tokens_of(llm, prompts[:4]) == answers[:4]


# Consumer and producer of a dependency that CGOPipe cannot do without.
EDGES = [
    (TaskKind.OFFLOAD_QKV, TaskKind.PRE_ATTENTION),
    (TaskKind.ATTENTION, TaskKind.OFFLOAD_QKV),
    (TaskKind.LOAD_HIDDEN, TaskKind.ATTENTION),
    (TaskKind.POST_ATTENTION, TaskKind.LOAD_HIDDEN),
    (TaskKind.EXPERTS, TaskKind.LOAD_PAGE),
    (TaskKind.LOAD_PAGE, TaskKind.EXPERTS),
]


@pytest.mark.parametrize("consumer, producer", EDGES, ids=lambda kind: kind.value)
def test_a_missing_dependency_is_noticed(consumer, producer, mixtral, prompts, answers, monkeypatch):
    """The tests above would prove nothing if a race left the tokens as they are."""
    llm = load(
        mixtral, executor="threads", pages_per_expert=1, resident_pages=(0, 0, 0), num_frames=12, group_size=1
    )
    build, dropped = llm._worker._schedule, []

    def without(num_prefill, num_decode):
        """The first task of a pass that would have to wait no longer does."""
        schedule = build(num_prefill, num_decode)
        tasks, deps = schedule.tasks, list(schedule.deps)
        edges = ((t, d) for t, needed in enumerate(deps) for d in needed)
        for t, d in edges:
            if (tasks[t].kind, tasks[d].kind) == (consumer, producer):
                deps[t] = tuple(other for other in deps[t] if other != d)
                dropped.append((tasks[t], tasks[d]))
                break
        else:
            dropped.append((None, None))
        return Schedule(schedule.name, schedule.shape, tasks, tuple(deps))

    monkeypatch.setattr(llm._worker, "_schedule", without)
    monkeypatch.setattr(llm._worker, "_wrap", lambda runner: Overtaken(runner, *dropped[-1]))
    try:
        assert tokens_of(llm, prompts[:4]) != answers[:4]
    except ScheduleError as error:
        assert "which holds" in str(error)
    assert any(task for task, _ in dropped)


class Boom(Exception):
    """Not one of the package's errors."""


def fail_once(llm, lane, monkeypatch, in_pass=2):
    """The first task of a lane in one pass raises; later passes are as ever."""
    num_passes = 0

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
        return Failing(runner) if num_passes == in_pass else runner

    monkeypatch.setattr(llm._worker, "_wrap", wrap)


# The first pass has prompts only: nothing of it runs on the CPU.
@pytest.mark.parametrize(
    "lane, in_pass", [(lane, 3) for lane in Lane] + [(Lane.GPU, 1), (Lane.H2D, 1), (Lane.D2H, 1)]
)
@pytest.mark.parametrize("executor", ["serial", "threads"])
def test_after_an_error_in_a_lane_the_engine_goes_on_to_the_right_tokens(
    lane, in_pass, executor, mixtral, prompts, answers, monkeypatch
):
    llm = load(mixtral, executor=executor, num_frames=17)
    fail_once(llm, lane, monkeypatch, in_pass)
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


def test_after_an_error_generate_raises_it_and_serves_the_next_call(mixtral, prompts, answers, monkeypatch):
    llm = load(mixtral, executor="threads")
    fail_once(llm, Lane.CPU, monkeypatch)
    with pytest.raises(Boom, match="attention"):
        llm.generate(prompts, GREEDY)
    assert llm.engine.num_unfinished == 0
    assert tokens_of(llm, prompts) == answers


@pytest.mark.parametrize("num_failures", [1, 3])
def test_passes_that_do_not_fit_are_made_smaller_and_no_token_changes(
    num_failures, mixtral, prompts, answers, monkeypatch, caplog
):
    llm, sizes, largest = load(mixtral), [], []
    run = llm._worker.run

    def run_out_of_memory(step):
        sizes.append(sum(map(len, step.decode)))
        largest.append(max(map(len, step.decode), default=0))
        if 3 <= len(sizes) < 3 + num_failures:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return run(step)

    monkeypatch.setattr(llm._worker, "run", run_out_of_memory)
    assert tokens_of(llm, prompts) == answers
    # Micro-batches first, and sequences only when that was not enough.
    assert max(largest[2 + num_failures :]) <= max(1, largest[2] // 2**num_failures)
    assert max(sizes[2 + num_failures :]) == max(1, sizes[2] // 2 ** (num_failures - 1))
    assert len(caplog.records) == num_failures
    assert "going on with micro_batch_size 3 -> 1, chunk_tokens 24 -> 12" in caplog.messages[0]


@pytest.mark.parametrize("executor", ["serial", "threads"])
def test_kv_that_is_too_much_for_a_staging_slot_comes_in_turns_and_changes_no_token(
    executor, mixtral, prompts, answers, monkeypatch, caplog
):
    llm = load(mixtral, schedule="flexgen", micro_batch_size=7, executor=executor)
    buffers = llm._worker._buffers
    slots = tuple(slot[:7] for slot in buffers.kv_stage)  # the longest sequence needs five
    llm._worker._buffers = replace(buffers, kv_stage=slots)
    turns, stage = [], runner.stage

    def staging(kv, layer, staged, slot):
        turns.append(staged.rows.start)
        stage(kv, layer, staged, slot)

    monkeypatch.setattr(runner, "stage", staging)
    assert tokens_of(llm, prompts) == answers
    assert len(set(turns)) > 1
    assert not caplog.records, "no pass was made smaller"


def test_a_pass_of_one_sequence_that_does_not_fit_is_an_error_with_a_remedy(mixtral, prompts, monkeypatch):
    llm = load(mixtral)

    def run_out_of_memory(step):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr(llm._worker, "run", run_out_of_memory)
    with pytest.raises(DeviceError, match=r"Tried to allocate 1\.00 GiB.*raise gpu_memory"):
        tokens_of(llm, prompts)


def test_a_gpu_that_failed_is_an_error_that_says_what_to_do(mixtral, prompts, monkeypatch):
    llm = load(mixtral)

    class Lost:
        def run(self, task):
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(llm._worker, "_wrap", lambda runner: Lost())
    with pytest.raises(DeviceError, match=r"illegal memory access was encountered.*Run the command again"):
        tokens_of(llm, prompts)
