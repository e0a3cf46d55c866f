from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_shapes import part_shapes, pass_shapes

from moe_lightning.errors import ScheduleError
from moe_lightning.pipeline.baselines import SCHEDULES
from moe_lightning.pipeline.simulate import simulate, until_tokens
from moe_lightning.pipeline.task import Lane, PassShape, Task

SMALL = SCHEDULES["cgopipe"](PassShape(2, 0, 2, 1, 2, (2, 2), 4, preloaded=True))


@settings(max_examples=50, deadline=None)
@given(shape=pass_shapes(), seed=st.integers(0, 2**32), name=st.sampled_from(sorted(SCHEDULES)))
def test_a_task_starts_the_moment_the_last_thing_it_waits_for_is_done(
    shape: PassShape, seed: int, name: str
) -> None:
    schedule = SCHEDULES[name](shape)
    rng = random.Random(seed)
    taken = [rng.choice((0.0, rng.random(), 100.0)) for _ in schedule.tasks]
    rest = iter(taken)
    records = simulate(schedule, lambda _: next(rest)).records
    for index, (task, deps) in enumerate(zip(schedule.tasks, schedule.deps, strict=True)):
        before = [t for t in range(index) if schedule.tasks[t].lane is task.lane]
        waits = [records[t].end for t in (*before[-1:], *deps)]
        assert records[index].start == max(waits, default=0.0)
        assert records[index].end == records[index].start + taken[index]


@settings(max_examples=50, deadline=None)
@given(
    shape=st.one_of(pass_shapes(), part_shapes()),
    seed=st.integers(0, 2**32),
    name=st.sampled_from(sorted({*SCHEDULES} - {"no_overlap"})),
)
def test_buffers_alone_lead_to_the_times_that_derived_dependencies_do(
    shape: PassShape, seed: int, name: str
) -> None:
    if name != "cgopipe":  # the others sweep whole layers
        shape = replace(shape, num_frames=max(shape.num_frames, *shape.streamed_pages))
    schedule = SCHEDULES[name](shape)
    rng = random.Random(seed)
    taken = [rng.choice((0.0, rng.random(), 100.0)) for _ in schedule.tasks]
    drawn, again = iter(taken), iter(taken)
    timeline = simulate(schedule, lambda _: next(drawn))
    last, busy = until_tokens(schedule.tasks, lambda _: next(again))
    rest = max((record.end for record in timeline.records if record.lane is not Lane.H2D), default=0.0)
    assert last == (rest or max(record.end for record in timeline.records))
    assert busy == pytest.approx({lane: timeline.busy_seconds().get(lane, 0.0) for lane in Lane})


def test_lanes_run_at_once() -> None:
    timeline = simulate(SMALL, lambda _: 1.0)
    assert max(timeline.busy_seconds().values()) <= timeline.span < len(SMALL.tasks)


def test_a_lane_that_never_waits_is_busy_all_the_time() -> None:
    def only_pages(task: Task) -> float:
        return 1.0 if task.lane is Lane.H2D else 0.0

    assert simulate(SMALL, only_pages).utilization()[Lane.H2D] == 1.0


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_duration_that_is_none_is_refused(bad: float) -> None:
    with pytest.raises(ScheduleError, match="give a finite duration"):
        simulate(SMALL, lambda _: bad)


def test_a_dependency_on_a_later_task_is_refused() -> None:
    deps = ((1,), *SMALL.deps[1:])
    with pytest.raises(ScheduleError, match="waits for task 1"):
        simulate(replace(SMALL, deps=deps), lambda _: 1.0)
