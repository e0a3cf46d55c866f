"""Passes to draw from, for the tests of schedules."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from moe_lightning.pipeline.hazards import derive
from moe_lightning.pipeline.task import Buffer, PassShape, Schedule, Task, TaskKind
from moe_lightning.pipeline.timeline import Timeline


@st.composite
def pass_shapes(draw: st.DrawFn) -> PassShape:
    num_layers = draw(st.integers(1, 5))
    num_prefill = draw(st.integers(0, 3))
    num_decode = draw(st.integers(0 if num_prefill else 1, 7))
    n = num_prefill + num_decode
    streamed = tuple(draw(st.lists(st.integers(0, 5), min_size=num_layers, max_size=num_layers)))
    return PassShape(
        num_layers=num_layers,
        num_prefill=num_prefill,
        num_decode=num_decode,
        group_size=draw(st.integers(1, n)),
        look_ahead=draw(st.integers(0, n + 1)),
        streamed_pages=streamed,
        num_frames=draw(st.integers(max(streamed), sum(streamed) + 2)),
        preloaded=draw(st.booleans()),
    )


@st.composite
def part_shapes(draw: st.DrawFn) -> PassShape:
    """Passes that CGOPipe alone has.

    Layers are swept in parts, most of them through less than a layer's frames, the first part at once or with the
    others; some layers keep KV on the GPU, and some have experts on the CPU.
    """
    shape = draw(pass_shapes())
    parts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    missing = max(shape.streamed_pages) - sum(parts)
    kv_every = draw(st.integers(0, shape.num_layers + 1))
    cpu_every = draw(st.integers(0, shape.num_layers + 1))
    part_pages = draw(st.sampled_from([(*parts, max(missing, 0)), ()]))
    at_once = draw(st.booleans())
    shape = replace(
        shape, part_pages=part_pages, first_part_at_once=at_once, kv_every=kv_every, cpu_every=cpu_every
    )
    streamed = (0 if shape.is_on_cpu(layer) else pages for layer, pages in enumerate(shape.streamed_pages))
    shape = replace(shape, streamed_pages=tuple(streamed))
    return replace(shape, num_frames=draw(st.integers(shape.least_frames, sum(shape.streamed_pages) + 2)))


def relaunched(schedule: Schedule, tasks: list[Task]) -> Schedule:
    """The schedule with other launches, their dependencies derived from what they say they touch."""
    return replace(schedule, tasks=tuple(tasks), deps=derive(tasks))


def conflicts(a: Task, b: Task) -> bool:
    return bool(set(a.writes) & set(b.reads + b.writes) or set(b.writes) & set(a.reads))


def reloads(schedule: Schedule, index: int) -> bool:
    """Whether the task loads a page into a frame that holds this very page already."""
    task, shape = schedule.tasks[index], schedule.shape
    if task.kind is not TaskKind.LOAD_PAGE:
        return False
    pages = [(layer, p) for layer in range(shape.num_layers) for p in range(shape.streamed_pages[layer])]
    held = dict(enumerate(pages[: shape.pages_ahead])) if shape.preloaded else {}
    for earlier in schedule.tasks[:index]:
        if earlier.kind is TaskKind.LOAD_PAGE:
            held[earlier.frame] = (earlier.layer, earlier.page)
    return held.get(task.frame) == (task.layer, task.page)


def races(schedule: Schedule, timeline: Timeline) -> bool:
    """Whether two tasks that conflict over a buffer ran at once or in the other order."""
    wrote: dict[Buffer, float] = {}
    touched: dict[Buffer, float] = {}
    for task, record in zip(schedule.tasks, timeline.records, strict=True):
        if any(record.start < wrote.get(buffer, 0.0) for buffer in task.reads):
            return True
        if any(record.start < touched.get(buffer, 0.0) for buffer in task.writes):
            return True
        for buffer in task.reads + task.writes:
            touched[buffer] = max(touched.get(buffer, 0.0), record.end)
        for buffer in task.writes:
            wrote[buffer] = max(wrote.get(buffer, 0.0), record.end)
    return False
