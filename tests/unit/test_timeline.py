from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lightning.errors import ScheduleError
from moe_lightning.pipeline.baselines import SCHEDULES
from moe_lightning.pipeline.task import Lane, PassShape, TaskKind
from moe_lightning.pipeline.timeline import Record, Timeline


def record(lane: Lane, start: float, end: float) -> Record:
    return Record("experts L0 mb0", TaskKind.EXPERTS, lane, 0, (0,), start, end)


def timeline(*runs: tuple[Lane, float, float]) -> Timeline:
    return Timeline("t", tuple(record(*run) for run in runs))


def test_utilization_is_the_busy_share_of_the_span_not_of_the_clock() -> None:
    t = timeline((Lane.GPU, 10, 14), (Lane.H2D, 12, 13), (Lane.H2D, 15, 18))
    assert t.span == 8
    assert t.utilization() == {**dict.fromkeys(Lane, 0.0), Lane.GPU: 0.5, Lane.H2D: 0.5}


def test_overlapping_runs_of_a_lane_count_once() -> None:
    t = timeline((Lane.GPU, 0, 4), (Lane.GPU, 1, 2), (Lane.GPU, 3, 5), (Lane.GPU, 6, 7))
    assert t.busy(Lane.GPU) == [(0, 5), (6, 7)]
    assert timeline((Lane.GPU, 0, 4), (Lane.GPU, 1, 2)).busy_seconds()[Lane.GPU] == 4


def test_bubbles_include_those_before_the_first_and_after_the_last_run() -> None:
    t = timeline((Lane.GPU, 0, 10), (Lane.CPU, 2, 3), (Lane.CPU, 3, 4), (Lane.CPU, 6, 7))
    assert t.bubbles(Lane.CPU) == [(0, 2), (4, 6), (7, 10)]
    assert t.bubbles(Lane.GPU) == []
    assert t.bubbles(Lane.H2D) == [(0, 10)]


@given(st.lists(st.tuples(st.sampled_from(Lane), st.integers(0, 50), st.integers(0, 9)), max_size=12))
def test_busy_time_and_bubbles_fill_the_span(runs: list[tuple[Lane, int, int]]) -> None:
    t = timeline(*((lane, start, start + seconds) for lane, start, seconds in runs))
    for lane in Lane:
        assert t.busy_seconds()[lane] + sum(end - start for start, end in t.bubbles(lane)) == t.span


def test_window_cuts_runs_at_its_edges_and_leaves_out_what_only_touches_them() -> None:
    outside = [(Lane.GPU, 0, 2), (Lane.D2H, 8, 9)]
    t = timeline(*outside, (Lane.H2D, 0, 3), (Lane.GPU, 3, 6), (Lane.CPU, 5, 10))
    assert t.window(2, 8) == timeline((Lane.H2D, 2, 3), (Lane.GPU, 3, 6), (Lane.CPU, 5, 8))


def test_nothing_run_is_no_time() -> None:
    empty = timeline()
    assert (empty.span, empty.bubbles(Lane.GPU), empty.utilization()[Lane.GPU]) == (0, [], 0)


SCHEDULE = SCHEDULES["cgopipe"](PassShape(1, 0, 1, 1, 1, (1,), 1))


def test_records_take_their_facts_from_tasks_and_their_times_from_the_clock() -> None:
    n = len(SCHEDULE.tasks)
    t = Timeline.of(SCHEDULE, list(range(n)), [start + 0.5 for start in range(n)])
    for task, r in zip(SCHEDULE.tasks, t.records, strict=True):
        assert (r.task_name, r.kind, r.lane, r.layer) == (str(task), task.kind, task.lane, task.layer)
        assert r.micro_batches == task.micro_batches
    assert [(r.start, r.end) for r in t.records] == [(i, i + 0.5) for i in range(n)]


def test_times_that_do_not_fit_the_tasks_are_refused() -> None:
    n = len(SCHEDULE.tasks)
    with pytest.raises(ScheduleError, match="give one of each per task"):
        Timeline.of(SCHEDULE, [0.0] * (n - 1), [0.0] * n)
    with pytest.raises(ScheduleError, match=r"starts at 1\.0 s and ends at 0\.0 s"):
        Timeline.of(SCHEDULE, [1.0] * n, [0.0] * n)
