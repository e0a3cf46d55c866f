"""Derived dependencies of any tasks whatever, also of such that no schedule has."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from pass_shapes import conflicts, races

from moe_lightning.pipeline.hazards import LaneOrder, derive
from moe_lightning.pipeline.simulate import simulate
from moe_lightning.pipeline.task import Buffer, BufferKind, Lane, PassShape, Schedule, Task, TaskKind

SHAPE = PassShape(1, 0, 1, 1, 0, (0,), 0)
buffers = st.lists(st.builds(Buffer, st.just(BufferKind.HIDDEN), st.integers(0, 3)), max_size=2, unique=True)


@st.composite
def any_tasks(draw: st.DrawFn) -> list[Task]:
    return [
        Task(TaskKind.EMBED, lane, -1, (0,), tuple(draw(buffers)), tuple(draw(buffers)))
        for lane in draw(st.lists(st.sampled_from(Lane), min_size=1, max_size=12))
    ]


def schedule(tasks: list[Task], deps: tuple[tuple[int, ...], ...]) -> Schedule:
    return Schedule("any", SHAPE, tuple(tasks), deps)


@settings(max_examples=200, deadline=None)
@given(tasks=any_tasks(), seed=st.integers(0, 2**32))
def test_no_timing_makes_conflicting_tasks_race(tasks: list[Task], seed: int) -> None:
    rng = random.Random(seed)
    derived = schedule(tasks, derive(tasks))
    for _ in range(5):
        assert not races(derived, simulate(derived, lambda _: rng.choice((0.0, rng.random(), 100.0))))


@settings(max_examples=200, deadline=None)
@given(tasks=any_tasks())
def test_no_dependency_can_be_left_out(tasks: list[Task]) -> None:
    deps = derive(tasks)
    for index, waits in enumerate(deps):
        for dep in waits:
            less = (*deps[:index], tuple(d for d in waits if d != dep), *deps[index + 1 :])
            slow = iter([float(t == dep) for t in range(len(tasks))])
            broken = schedule(tasks, less)
            assert races(broken, simulate(broken, lambda _, slow=slow: next(slow)))


@settings(max_examples=200, deadline=None)
@given(tasks=any_tasks())
def test_lane_order_knows_every_pair_that_dependencies_order(tasks: list[Task]) -> None:
    deps, order = derive(tasks), LaneOrder(tasks)
    before: list[set[int]] = []
    for index, waits in enumerate(deps):
        order.reduce(index, set(waits))
        direct = {*waits, *(t for t in range(index) if tasks[t].lane is tasks[index].lane)}
        before.append(direct.union(*(before[t] for t in direct)))
    for later in range(len(tasks)):
        for earlier in range(later):
            assert order.is_before(earlier, later) == (earlier in before[later])
            assert order.is_before(earlier, later) or not conflicts(tasks[earlier], tasks[later])
