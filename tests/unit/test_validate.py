"""What `validate` says; that it finds what is wrong is in test_schedules.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pass_shapes import relaunched

from moe_lightning.errors import ScheduleError
from moe_lightning.pipeline.baselines import SCHEDULES
from moe_lightning.pipeline.semantics import reference
from moe_lightning.pipeline.symbols import Symbols
from moe_lightning.pipeline.task import Buffer, BufferKind, PassShape, Schedule, TaskKind
from moe_lightning.pipeline.validate import validate

SHAPE = PassShape(2, 1, 2, 1, 2, (2, 2), 3, preloaded=True)
SCHEDULE = SCHEDULES["cgopipe"](SHAPE)


def find(schedule: Schedule, name: str) -> int:
    return [str(task) for task in schedule.tasks].index(name)


def message(schedule: Schedule) -> str:
    with pytest.raises(ScheduleError) as caught:
        validate(schedule)
    return str(caught.value)


def test_the_message_names_the_task_both_values_and_marks_it_in_the_launch_order() -> None:
    index = find(SCHEDULE, "load_hidden L1 mb1")
    tasks = [task for t, task in enumerate(SCHEDULE.tasks) if t != index]
    broken = relaunched(SCHEDULE, tasks)
    at = find(broken, "post_attention L1 mb1")
    text = message(broken)
    assert f"cgopipe: task {at}, post_attention L1 mb1 on gpu," in text
    assert "expected: attention L1 mb1(" in text
    assert "found:    attention L0 mb1(" in text
    assert [line for line in text.splitlines() if line.startswith(">")] == [
        line for line in text.splitlines() if f"{at} gpu  post_attention L1 mb1" in line
    ]
    assert f"  {at + 1:5d} gpu  experts L1 mb1" in text


def test_a_missing_dependency_is_named_with_the_buffer_and_the_remedy() -> None:
    index = find(SCHEDULE, "attention L0 mb1")
    other = find(SCHEDULE, "offload_qkv L0 mb1")
    deps = list(SCHEDULE.deps)
    assert deps[index] == (other,)
    deps[index] = ()
    text = message(replace(SCHEDULE, deps=tuple(deps)))
    assert (
        f"races with task {other}, offload_qkv L0 mb1, for host_qkv[1]; let it wait for task {other}" in text
    )


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"no_overlap"}))
def test_every_missing_dependency_is_a_race(name: str) -> None:
    schedule = SCHEDULES[name](SHAPE)
    for index, deps in enumerate(schedule.deps):
        for dep in deps:
            without = list(schedule.deps)
            without[index] = tuple(d for d in deps if d != dep)
            assert "races with" in message(replace(schedule, deps=tuple(without)))


def test_a_dependency_on_a_later_task_is_an_error() -> None:
    deps = ((3,), *SCHEDULE.deps[1:])
    assert "waits for task 3; a task can wait for earlier ones only" in message(replace(SCHEDULE, deps=deps))


def test_a_task_that_hides_what_it_touches_is_an_error() -> None:
    index = find(SCHEDULE, "post_attention L0 mb1")
    tasks = list(SCHEDULE.tasks)
    tasks[index] = replace(tasks[index], reads=(Buffer(BufferKind.HIDDEN, 1),))
    text = message(relaunched(SCHEDULE, tasks))
    assert "declares that it touches experts_in[1], hidden[1] and" in text
    assert "but it touches attention_out[1], experts_in[1], hidden[1] and" in text


def test_a_page_of_another_layer_is_told_from_the_one_expected() -> None:
    index = find(SCHEDULE, "load_page L1 p1>f0")
    tasks = list(SCHEDULE.tasks)
    tasks[index] = replace(tasks[index], page=0)
    text = message(relaunched(SCHEDULE, tasks))
    assert "expected: page L1 p1\n  found:    page L1 p0\n" in text


def test_a_cache_that_misses_the_new_tokens_is_an_error_at_the_end() -> None:
    index = find(SCHEDULE, "store_kv L1 mb0")
    text = message(relaunched(SCHEDULE, [t for i, t in enumerate(SCHEDULE.tasks) if i != index]))
    assert "the pass does not leave the model's value in kv[3]" in text
    assert "> end of the pass" in text


def test_first_pages_of_the_next_pass_that_are_not_there_are_an_error() -> None:
    index = max(t for t, task in enumerate(SCHEDULE.tasks) if task.next_pass)
    text = message(relaunched(SCHEDULE, [t for i, t in enumerate(SCHEDULE.tasks) if i != index]))
    assert "expected: page L0 p0" in text


def test_a_task_of_a_micro_batch_that_does_not_exist_is_an_error() -> None:
    extra = replace(
        SCHEDULE.tasks[-1],
        micro_batches=(3,),
        reads=(Buffer(BufferKind.HIDDEN, 3),),
        writes=(Buffer(BufferKind.TOKENS, 3),),
    )
    assert extra.kind is TaskKind.SAMPLE
    assert "has no part in a pass" in message(relaunched(SCHEDULE, [*SCHEDULE.tasks, extra]))


def test_the_model_does_not_depend_on_how_the_pass_is_cut() -> None:
    terms = Symbols()
    other = replace(SHAPE, group_size=3, look_ahead=0, num_frames=4, preloaded=False)
    assert reference(SHAPE, terms) == reference(other, terms)


def test_terms_that_differ_deep_inside_are_told_apart_where_they_differ() -> None:
    terms = Symbols()
    a, b = terms.term("a"), terms.term("b")
    left, right = (terms.term("f", terms.term("g", a, x)) for x in (a, b))
    assert left != right
    assert terms.first_difference(left, right) == (a, b)
    assert terms.show(left) == "f(g(..))"
    assert terms.show(right, depth=2) == "f(g(a, b))"
