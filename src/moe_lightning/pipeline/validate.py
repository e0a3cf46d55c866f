"""Proof that a schedule computes what the model does, whatever its tasks take."""

from __future__ import annotations

from moe_lightning.errors import ScheduleError
from moe_lightning.pipeline.hazards import LaneOrder
from moe_lightning.pipeline.semantics import Machine, Place, Write, kv_buffer, reference, streamed, touched
from moe_lightning.pipeline.symbols import Symbol, Symbols
from moe_lightning.pipeline.task import Buffer, BufferKind, PassShape, Schedule, Task, TaskKind


def validate(schedule: Schedule) -> None:
    """Check that every order which lanes and dependencies allow gives the tokens and the cache of the model.

    First, whatever two tasks conflict over is ordered, so that every run is equivalent to the launch order.
    Second, the launch order run on symbols leaves what the model's plain nested loops leave.

    Raises:
        ScheduleError: it does not; the message shows the task and the launches around it.
    """
    _check_lengths(schedule)
    for index, task in enumerate(schedule.tasks):
        _check_buffers(schedule, index, task)
    _check_order(schedule)
    _check_values(schedule)


def _check_lengths(schedule: Schedule) -> None:
    if len(schedule.tasks) != len(schedule.deps):
        raise ScheduleError(
            f"{schedule.name} has {len(schedule.tasks)} tasks and {len(schedule.deps)} lists of "
            "dependencies; derive them again with hazards.derive"
        )


def _check_buffers(schedule: Schedule, index: int, task: Task) -> None:
    uses, writes = touched(schedule.shape, task)
    declared = set(task.reads) | set(task.writes)
    if declared != uses or set(task.writes) != writes:
        raise _error(
            schedule,
            index,
            f"declares that it touches {_names(declared)} and writes {_names(set(task.writes))}, "
            f"but it touches {_names(uses)} and writes {_names(writes)}; correct its reads and writes",
        )


# Order: races.


def _check_order(schedule: Schedule) -> None:
    order = LaneOrder(schedule.tasks)
    last_writer: dict[Buffer, int] = {}
    readers: dict[Buffer, list[int]] = {}
    for index, (task, deps) in enumerate(zip(schedule.tasks, schedule.deps, strict=True)):
        for dep in deps:
            if not 0 <= dep < index:
                raise _error(schedule, index, f"waits for task {dep}; a task can wait for earlier ones only")
        order.reduce(index, set(deps))
        for other, buffer in _conflicts(task, last_writer, readers):
            if not order.is_before(other, index):
                raise _error(
                    schedule,
                    index,
                    f"races with task {other}, {schedule.tasks[other]}, for {_name(buffer)}; "
                    f"let it wait for task {other}",
                )
        for buffer in task.reads:
            readers.setdefault(buffer, []).append(index)
        for buffer in task.writes:
            last_writer[buffer], readers[buffer] = index, []


def _conflicts(
    task: Task, last_writer: dict[Buffer, int], readers: dict[Buffer, list[int]]
) -> list[tuple[int, Buffer]]:
    # Earlier accesses are ordered before these ones already, so that near ones are enough.
    pairs = [(last_writer[buffer], buffer) for buffer in task.reads + task.writes if buffer in last_writer]
    return pairs + [(reader, buffer) for buffer in task.writes for reader in readers.get(buffer, ())]


# Values: launch order.


def _check_values(schedule: Schedule) -> None:
    terms = Symbols()
    shape = schedule.shape
    expected = reference(shape, terms)
    machine = Machine(shape, terms)
    for index, task in enumerate(schedule.tasks):
        for write in machine.run(task):
            if task.kind is not TaskKind.LOAD_PAGE:
                place = (task.kind, task.layer, task.part, write.j, write.buffer.kind)
                _check_write(schedule, index, terms, expected.get(place), write)
    for buffer, wanted in _final(shape, expected, machine):
        if machine.value(buffer) != wanted:
            text = _difference(terms, wanted, machine.value(buffer))
            raise _error(
                schedule, len(schedule.tasks), f"does not leave the model's value in {_name(buffer)}{text}"
            )


def _check_write(schedule: Schedule, index: int, terms: Symbols, wanted: Symbol | None, write: Write) -> None:
    if wanted is None:
        raise _error(schedule, index, f"has no part in a pass over {schedule.shape}; leave it out")
    if write.symbol != wanted:
        text = _difference(terms, wanted, write.symbol)
        raise _error(schedule, index, f"leaves another value than the model's in {_name(write.buffer)}{text}")


def _final(shape: PassShape, expected: dict[Place, Symbol], machine: Machine) -> list[tuple[Buffer, Symbol]]:
    """What the pass must leave behind: tokens, the grown cache, and the first pages of the next pass."""
    micro_batches, pages = range(shape.num_micro_batches), streamed(shape)
    tokens = [
        (Buffer(BufferKind.TOKENS, j), expected[TaskKind.SAMPLE, -1, 0, j, BufferKind.TOKENS])
        for j in micro_batches
    ]
    cache = [
        (kv_buffer(shape, layer, j), expected[_appended_by(shape, layer, j), layer, 0, j, BufferKind.KV])
        for layer in range(shape.num_layers)
        for j in micro_batches
    ]
    ahead = [
        (Buffer(BufferKind.FRAME, (len(pages) + k) % shape.num_frames), machine.page(layer, page))
        for k, (layer, page) in enumerate(pages[: shape.pages_ahead])
    ]
    return tokens + cache + ahead


def _appended_by(shape: PassShape, layer: int, j: int) -> TaskKind:
    if not shape.keeps_kv(layer):
        return TaskKind.STORE_KV
    return TaskKind.KEEP_KV if j < shape.num_prefill else TaskKind.RESIDENT_ATTENTION


# Messages.


def _difference(terms: Symbols, wanted: Symbol, found: Symbol) -> str:
    inner_wanted, inner_found = terms.first_difference(wanted, found)
    return (
        f"\n  expected: {terms.show(inner_wanted)}\n  found:    {terms.show(inner_found)}\n"
        f"  {'' if inner_wanted == wanted else f'in {terms.show(wanted)}; '}"
        "move its launch to where what it reads is there and still there"
    )


def _error(schedule: Schedule, index: int, what: str) -> ScheduleError:
    """The error for task `index`; the number of tasks stands for the end of the pass."""
    if index == len(schedule.tasks):
        subject = "the pass"
    else:
        subject = f"task {index}, {schedule.tasks[index]} on {schedule.tasks[index].lane},"
    return ScheduleError(f"{schedule.name}: {subject} {what}\n{neighbourhood(schedule, index)}")


def neighbourhood(schedule: Schedule, index: int, radius: int = 4) -> str:
    """The launches around a task, one line each with lane and dependencies; the task is marked ``>``."""
    lines = ["launch order there:"]
    last = len(schedule.tasks)
    for t in range(max(index - radius, 0), min(index + radius + 1, last)):
        deps = schedule.deps[t]
        waits = f"  after {', '.join(map(str, deps))}" if deps else ""
        lines.append(
            f"{'>' if t == index else ' '} {t:5d} {schedule.tasks[t].lane:4} {schedule.tasks[t]}{waits}"
        )
    if index == last:
        lines.append("> end of the pass")
    return "\n".join(lines)


def _name(buffer: Buffer) -> str:
    return f"{buffer.kind}[{buffer.index}]"


def _names(buffers: set[Buffer]) -> str:
    return ", ".join(map(_name, sorted(buffers))) or "nothing"
