"""The schedules are right: no race, no dependency too many, the model's values, Algorithm 1."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_shapes import conflicts, part_shapes, pass_shapes, races, relaunched, reloads

from moe_lightning.errors import ScheduleError
from moe_lightning.models.registry import resolve
from moe_lightning.perf.predict import pass_work
from moe_lightning.pipeline.baselines import SCHEDULES
from moe_lightning.pipeline.simulate import simulate
from moe_lightning.pipeline.task import Buffer, Lane, PassShape, Schedule, TaskKind
from moe_lightning.pipeline.timeline import Timeline
from moe_lightning.pipeline.validate import validate

GOLDEN = Path(__file__).parents[1] / "golden"
few = settings(max_examples=25, deadline=None)


@st.composite
def any_schedule(draw: st.DrawFn, name: str) -> Schedule:
    """A pass by a builder; by CGOPipe in parts for the name "parts"."""
    return (
        SCHEDULES["cgopipe"](draw(part_shapes())) if name == "parts" else SCHEDULES[name](draw(pass_shapes()))
    )


every_schedule = pytest.mark.parametrize("name", [*sorted(SCHEDULES), "parts"])


def overlaps(timeline: Timeline) -> bool:
    return any(later.start < earlier.end for earlier, later in pairwise(timeline.records))


def durations(rng: random.Random) -> float:
    return rng.choice((0.0, rng.random(), rng.expovariate(1.0), 1e4))


def timed(schedule: Schedule, seconds: Sequence[float]) -> Timeline:
    rest = iter(seconds)
    return simulate(schedule, lambda _: next(rest))


@every_schedule
@few
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_conflicting_tasks_keep_their_order_whatever_tasks_take(
    name: str, data: st.DataObject, seed: int
) -> None:
    schedule = data.draw(any_schedule(name))
    rng = random.Random(seed)
    for _ in range(10):
        timeline = timed(schedule, [durations(rng) for _ in schedule.tasks])
        assert not races(schedule, timeline)


@every_schedule
@few
@given(data=st.data())
def test_every_dependency_is_needed(name: str, data: st.DataObject) -> None:
    schedule = data.draw(any_schedule(name))
    for index, deps in enumerate(schedule.deps):
        for dep in deps:
            without = list(schedule.deps)
            without[index] = tuple(d for d in deps if d != dep)
            broken = replace(schedule, deps=tuple(without))
            timeline = timed(broken, [float(t == dep) for t in range(len(schedule.tasks))])
            # Without overlap each task waits for the one before, conflict or not.
            caught = overlaps(timeline) if name == "no_overlap" else races(broken, timeline)
            assert caught, f"nothing goes wrong when {schedule.tasks[index]} does not wait for task {dep}"


@every_schedule
@few
@given(data=st.data())
def test_launch_order_computes_the_model(name: str, data: st.DataObject) -> None:
    validate(data.draw(any_schedule(name)))


@every_schedule
@few
@given(data=st.data())
def test_swapping_neighbours_is_caught_where_they_conflict(name: str, data: st.DataObject) -> None:
    schedule = data.draw(any_schedule(name))
    tasks = list(schedule.tasks)
    index = data.draw(st.integers(0, len(tasks) - 2))
    a, b = tasks[index], tasks[index + 1]
    tasks[index : index + 2] = [b, a]
    swapped = relaunched(schedule, tasks)
    if conflicts(a, b) and not reloads(schedule, index) and not reloads(schedule, index + 1):
        with pytest.raises(ScheduleError):
            validate(swapped)
    elif not conflicts(a, b):
        validate(swapped)


@every_schedule
@few
@given(data=st.data())
def test_dropping_a_task_is_caught(name: str, data: st.DataObject) -> None:
    schedule = data.draw(any_schedule(name))
    index = data.draw(st.integers(0, len(schedule.tasks) - 1))
    tasks = [task for t, task in enumerate(schedule.tasks) if t != index]
    if reloads(schedule, index):
        validate(relaunched(schedule, tasks))
    else:
        with pytest.raises(ScheduleError):
            validate(relaunched(schedule, tasks))


@every_schedule
@few
@given(data=st.data())
def test_a_page_in_the_wrong_frame_is_caught(name: str, data: st.DataObject) -> None:
    schedule = data.draw(any_schedule(name))
    shape = schedule.shape
    pages = [
        t
        for t, task in enumerate(schedule.tasks)
        if task.kind is TaskKind.LOAD_PAGE and not reloads(schedule, t)
    ]
    if not pages or shape.num_frames < 2:
        return
    index = data.draw(st.sampled_from(pages))
    page = schedule.tasks[index]
    frame = (page.frame + data.draw(st.integers(1, shape.num_frames - 1))) % shape.num_frames
    tasks = list(schedule.tasks)
    tasks[index] = replace(page, frame=frame, writes=(Buffer(page.writes[0].kind, frame),))
    with pytest.raises(ScheduleError):
        validate(relaunched(schedule, tasks))


def algorithm_1(num_layers: int, n: int) -> list[str]:
    """The paper's Algorithm 1 line by line, for n > 2 micro-batches; layers and micro-batches from 0."""
    launches = []

    def attend(layer: int, j: int) -> None:
        layer, j = (layer, j) if j < n else (layer + 1, j - n)
        if layer < num_layers:
            launches.extend(
                f"{kind} L{layer} mb{j}" for kind in ("pre_attention", "offload_qkv", "attention")
            )

    attend(0, 0)
    attend(0, 1)
    for layer in range(num_layers):
        for j in range(n):
            launches.append(f"load_hidden L{layer} mb{j}")
            next_layer, mark = (layer + 1, "") if layer + 1 < num_layers else (0, "+")
            launches.append(f"load_page L{next_layer}{mark} p{j}")
            launches += [f"post_attention L{layer} mb{j}", f"experts L{layer} mb{j}"]
            attend(layer, j + 2)
    return launches


def launches_of_algorithm_1(schedule: Schedule) -> list[str]:
    return [str(task).split(">")[0] for task in schedule.tasks if task.layer >= 0]


def paper_shape(num_layers: int, n: int) -> PassShape:
    return PassShape(num_layers, 0, n, 1, 2, (n,) * num_layers, 2 * n, preloaded=True)


@pytest.mark.parametrize("num_layers", [2, 3, 4])
@pytest.mark.parametrize("n", [3, 4, 7])
def test_cgopipe_launches_in_the_order_of_algorithm_1(num_layers: int, n: int) -> None:
    schedule = SCHEDULES["cgopipe"](paper_shape(num_layers, n))
    assert launches_of_algorithm_1(schedule) == algorithm_1(num_layers, n)


def test_algorithm_1_of_two_layers_and_three_micro_batches_is_the_golden_one() -> None:
    golden = (GOLDEN / "algorithm_1.txt").read_text().splitlines()
    assert launches_of_algorithm_1(SCHEDULES["cgopipe"](paper_shape(2, 3))) == golden


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_layers_keep_their_kv_on_the_gpu_in_cgopipe_alone(name: str) -> None:
    schedule = SCHEDULES[name](PassShape(4, 1, 2, 1, 2, (2,) * 4, 4, kv_every=2))
    validate(schedule)
    kinds = {TaskKind.RESIDENT_ATTENTION, TaskKind.KEEP_KV}
    layers = {task.layer for task in schedule.tasks if task.kind in kinds}
    assert layers == ({1, 3} if name == "cgopipe" else set())


@few
@given(shape=part_shapes())
def test_a_part_is_swept_for_one_group_after_the_other_from_the_one_that_is_said_to_unpack_it(
    shape: PassShape,
) -> None:
    """So its packed pages are unpacked once, and that costs where the model says."""
    sweeps = [task for task in SCHEDULES["cgopipe"](shape).tasks if task.kind is TaskKind.EXPERTS]
    tokens = (1,) * shape.num_micro_batches
    work = pass_work(resolve("mixtral-8x7b"), shape, tokens, 1.0, pages_per_expert=1, packed=True)
    seen = list[tuple[int, int]]()
    for (layer, part), some in groupby(sweeps, lambda task: (task.layer, task.part)):
        members = [task.micro_batches for task in some]
        assert sorted(members) == sorted(shape.groups)
        assert work.swept_first(part) in members[0]
        seen.append((layer, part))
    assert len(seen) == len(set(seen))


def gpu_launches(shape: PassShape, layer: int) -> list[str]:
    """Sweeps and what frees the CPU for the next layer, by part and micro-batches."""
    schedule = SCHEDULES["cgopipe"](shape)
    kinds = TaskKind.EXPERTS, TaskKind.POST_ATTENTION
    of_layer = (task for task in schedule.tasks if task.kind in kinds and task.layer == layer)
    return [f"{task.kind.value[0]}{task.part}:{','.join(map(str, task.micro_batches))}" for task in of_layer]


def test_the_first_part_is_swept_as_attention_comes_in_prompts_first() -> None:
    late = PassShape(3, 1, 4, 2, 4, (6, 6, 6), 7, preloaded=True, part_pages=(4, 4))
    assert gpu_launches(late, 1) == [
        "p0:0", "p0:1", "p0:2", "p0:3", "p0:4",
        "e0:1,2", "e0:3,4", "e0:0", "e1:1,2", "e1:3,4", "e1:0",
    ]  # fmt: skip
    assert gpu_launches(replace(late, first_part_at_once=True), 1) == [
        "p0:0", "e0:0", "p0:1", "p0:2", "e0:1,2", "p0:3", "p0:4", "e0:3,4",
        "e1:1,2", "e1:3,4", "e1:0",
    ]  # fmt: skip


def test_with_the_first_part_at_once_less_is_left_between_one_attention_and_the_next() -> None:
    """Attention nearly fills the pass: with it late, the CPU waits for all sweeps but the last."""
    seconds = {TaskKind.ATTENTION: 8.0, TaskKind.EXPERTS: 2.0, TaskKind.LOAD_PAGE: 1.0}
    late = PassShape(40, 1, 4, 2, 4, (30,) * 40, 31, preloaded=True, part_pages=(20, 20))
    spans = [
        simulate(SCHEDULES["cgopipe"](shape), lambda task: seconds.get(task.kind, 0.0)).span
        for shape in (late, replace(late, first_part_at_once=True))
    ]
    assert spans[0] / 40 == pytest.approx(4 * 8 + 4 * 2, rel=0.02)
    assert spans[1] / 40 == pytest.approx(4 * 8 + 2 * 2, rel=0.02)


@few
@given(shape=pass_shapes())
def test_without_overlap_one_task_runs_at_a_time(shape: PassShape) -> None:
    assert not overlaps(simulate(SCHEDULES["no_overlap"](shape), lambda _: 1.0))


def kinds_on(schedule: Schedule, lane: Lane) -> list[str]:
    return [str(task).split(">")[0] for task in schedule.tasks if task.lane is lane]


def test_whole_layer_puts_all_pages_of_the_next_layer_before_the_first_hidden_states() -> None:
    shape = PassShape(2, 0, 2, 1, 2, (2, 2), 4, preloaded=True)
    assert kinds_on(SCHEDULES["whole_layer"](shape), Lane.H2D) == [
        "load_page L1 p0", "load_page L1 p1", "load_hidden L0 mb0", "load_hidden L0 mb1",
        "load_page L0+ p0", "load_page L0+ p1", "load_hidden L1 mb0", "load_hidden L1 mb1",
    ]  # fmt: skip


def test_flexgen_moves_the_cache_of_the_next_micro_batch_ahead_of_pages() -> None:
    shape = PassShape(2, 0, 2, 1, 2, (2, 2), 4, preloaded=True)
    schedule = SCHEDULES["flexgen"](shape)
    assert kinds_on(schedule, Lane.H2D) == [
        "load_kv L0 mb0", "load_kv L0 mb1", "load_page L1 p0", "load_kv L1 mb0", "load_page L1 p1",
        "load_kv L1 mb1", "load_page L0+ p0", "load_page L0+ p1",
    ]  # fmt: skip
    assert kinds_on(schedule, Lane.CPU) == []


def test_flexgen_with_cpu_attention_has_one_micro_batch_in_flight() -> None:
    shape = PassShape(2, 0, 3, 1, 2, (3, 3), 6, preloaded=True)
    tasks = [task for task in SCHEDULES["flexgen_cpu"](shape).tasks if task.layer >= 0 and task.micro_batches]
    assert [(task.layer, task.micro_batches) for task in tasks] == sorted(
        (task.layer, task.micro_batches) for task in tasks
    )
