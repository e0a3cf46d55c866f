"""What is measured beside copies and attention: on a GPU of which only the clock is true."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, cycle

import pytest
import torch
from efforts import SHAPE, TINY, OnCpu

from moe_lightning.errors import DeviceError
from moe_lightning.kernels import ops
from moe_lightning.profiling import events, link, load, prefill, queued
from moe_lightning.profiling import gpu as gpu_profile
from moe_lightning.profiling.gpu import ExpertsBench
from moe_lightning.profiling.kv_store import KvStore
from moe_lightning.profiling.link import Copies, Link
from moe_lightning.profiling.load import Load, again_and_again
from moe_lightning.profiling.small_kernels import small_kernels
from moe_lightning.profiling.steps import Steps


def test_work_goes_on_until_the_block_ends() -> None:
    twice, num, workers = threading.Event(), 0, set[threading.Thread]()

    def work() -> None:
        nonlocal num
        num += 1
        workers.add(threading.current_thread())
        if num == 2:
            twice.set()

    with again_and_again(work):
        assert twice.wait(10)
    assert len(workers) == 1 and not workers.pop().is_alive()


def test_an_error_of_the_work_is_raised_and_one_of_the_block_is_not_hidden() -> None:
    def fail() -> None:
        raise ValueError("of the work")

    with pytest.raises(ValueError, match="of the work"), again_and_again(fail):
        pass
    with pytest.raises(KeyError), again_and_again(lambda: None):
        raise KeyError


def test_work_that_does_not_end_is_an_error_and_does_not_keep_the_process(monkeypatch) -> None:
    monkeypatch.setattr(load, "LIMIT_S", 0.0)
    begun, released, workers = threading.Event(), threading.Event(), []

    def stand_still():
        workers.append(threading.current_thread())
        begun.set()
        assert released.wait(10)

    try:
        with pytest.raises(DeviceError, match="have not ended after 0 s"), again_and_again(stand_still):
            assert begun.wait(10)
        with pytest.raises(KeyError), again_and_again(stand_still):
            raise KeyError
        assert all(worker.daemon for worker in workers)
    finally:
        released.set()
    for worker in workers:
        worker.join(10)


class Gpu:
    """Streams that are done with all at once; events at times that tests say, in the order of recording."""

    def __init__(self, times=()):
        self.times, self.stream = iter(times), "default"
        self.are_late = cycle([False])  # launchers, for as long as another stream holds their tasks

    @contextmanager
    def inside(self, stream):
        before, self.stream = self.stream, stream
        yield
        self.stream = before


class Stream:
    def wait_event(self, event):
        assert event.time is not None


class Event:
    is_done = True

    def __init__(self, time):
        self.time = time

    def query(self):
        return self.is_done

    def elapsed_time(self, other):
        return 1e3 * (other.time - self.time)


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    for name, value in {
        "Stream": Stream, "stream": gpu.inside, "synchronize": lambda: None, "_sleep": lambda _: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return gpu


def test_copies_to_the_gpu_never_cease_and_beside_them_some_go_each_way(gpu, monkeypatch) -> None:
    monkeypatch.setattr(link, "recorded", lambda: Event(0))
    seen = []

    class Link:
        def copy_to_gpu(self, number, size):
            seen.append(("in", gpu.stream, size))

        def copy_from_gpu(self, number, size):
            seen.append(("out", gpu.stream, size))

    copies = Copies(Link(), 100, 1334)
    with copies:
        assert seen == [("in", copies._stream, 100)] * 5, "what takes three tenths of a second, and one"
        seen.clear()
        copies.keep_up(240)
    assert seen == [("in", copies._stream, 100)] * 5 + [
        ("out", copies._back, 100), ("in", copies._back, 100),
    ] * 2  # fmt: skip
    waited, last = [], Event(0)
    last.synchronize = lambda: waited.append(gpu.stream)
    monkeypatch.setattr(link, "recorded", lambda: (waited.append(gpu.stream), last)[1])
    copies.wait()
    assert waited == [copies._stream, "default"], "recorded behind the copies, waited for by who calls"


def test_copies_count_while_they_are_watched_from_the_first_that_ends_to_the_last(gpu, monkeypatch) -> None:
    made, now = [], 0.0

    def recorded():
        made.append(Event(0))
        made[-1].is_done = False
        return made[-1]

    def end(event):
        event.is_done, event.time = True, now

    def take(seconds, count):
        """Time goes on, and so many copies end, one after the other."""
        nonlocal now
        for event in [event for event in made if not event.is_done][:count]:
            now += seconds / count
            end(event)

    class Link:
        def copy_to_gpu(self, number, size):
            pass

    monkeypatch.setattr(link, "recorded", recorded)
    monkeypatch.setattr(link, "wait_for", end)
    copies = Copies(Link(), 100, 20e3)
    for count in (5, 5, 9):
        with copies:
            for _ in range(3):
                take(1.0, 4)  # a pause
                copies.keep_up()
                take(0.1, 1)  # before it is watched
                copies.watch()
                take(0.5, count)
                now += 7.0  # the queue is empty
                copies.watched()
    seconds = 3 * (2 * 0.5 * 4 / 5 + 0.5 * 8 / 9)
    assert copies.rate_watched() == pytest.approx(100 * 3 * (4 + 4 + 8) / seconds), (
        "on average over all times"
    )
    with copies:
        take(1.0, 4)
    assert copies.rate_watched() is None, "nobody looked"
    with copies:
        copies.watch()
        take(0.5, 1)
        copies.watched()
    assert copies.rate_watched() is None, "one is no rate"


def test_copies_of_a_size_are_measured_for_so_long_however_short_they_are(gpu, monkeypatch) -> None:
    """Those of 64 KiB are launched in a batch that is held for five times as long as it takes."""
    now, batches = [0.0], []

    def ended():
        event = Event(now[0])
        event.synchronize = lambda: (batches.append(event), now.append(now.pop() + 0.05))
        return event

    monkeypatch.setattr(link.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(link, "recorded", ended)
    with OnCpu():
        measured = Link(
            torch.zeros(4, TINY.copy_sizes[-1], dtype=torch.uint8), replace(TINY, gpu_point_s=0.4)
        )
    seconds = measured._seconds(lambda number, size: now.append(now.pop() + 1e-6), TINY.copy_sizes[0])
    assert len(batches) == 8 and seconds == pytest.approx(1e-6)


def test_queues_of_copies_stay_short_and_the_last_ones_are_waited_for(gpu, monkeypatch) -> None:
    queued_events, num, waited = [], 0, []

    def recorded():
        event = Event(len(queued_events))
        event.is_done = False
        queued_events.append(event)
        return event

    class Link:
        def copy_to_gpu(self, number, size):
            nonlocal num
            num += 1

        copy_from_gpu = copy_to_gpu

    monkeypatch.setattr(link, "recorded", recorded)
    monkeypatch.setattr(link, "wait_for", waited.append)
    with Copies(Link(), 100, 1334) as copies:
        for _ in range(3):
            copies.keep_up(240)
        assert num == 5 + 4, "none is done: five to the GPU and two each way are under way"
        assert len(queued_events) == 6
        queued_events[5].is_done = queued_events[0].is_done = True
        copies.keep_up(240)
        assert num == 5 + 4 + 1 + 4
    assert waited == [*queued_events[1:5], *queued_events[6:]]
    assert copies.rate_watched() is None


class Silent(Event):
    is_done = False


def test_who_waits_for_a_gpu_that_does_not_answer_gets_an_error_that_says_what_was_measured(
    monkeypatch,
) -> None:
    monkeypatch.setattr(events, "LIMIT_S", 0.0)
    steps = Steps(2, lambda *_: None)
    steps.begin("sweeps")
    silence = r"while measuring sweeps: the GPU is not done .*`nvidia-smi"
    with pytest.raises(DeviceError, match=silence), steps.named():
        events.wait_for(Silent(0))


def test_others_go_on_while_one_waits_for_the_gpu(monkeypatch) -> None:
    polls, answers = [], iter([False, False, True])
    monkeypatch.setattr(events.time, "sleep", polls.append)
    event = Event(0)
    event.query = lambda: next(answers)
    events.wait_for(event)
    assert len(polls) == 2 and all(seconds > 0 for seconds in polls)


class Running(OnCpu):
    """A load of which one knows whether it goes on; then nothing may wait for the whole GPU or be allocated."""

    ALLOCATE = (torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand, torch.randperm, torch.arange)

    def __init__(self, kv, monkeypatch):
        super().__init__()
        self.kv, self.is_running, self.num_runs = kv, False, 0
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)

    @contextmanager
    def running(self):
        self.is_running, self.num_runs = True, self.num_runs + 1
        yield
        self.is_running = False

    def synchronize(self):
        assert not self.is_running, "beside a load the GPU is never idle"

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert not (self.is_running and func in self.ALLOCATE)
        return super().__torch_function__(func, types, args, kwargs)


def test_a_load_queues_copies_before_each_layer_of_attention_and_they_count_while_it_runs() -> None:
    seen, thrice = [], threading.Event()

    class Kept:
        def __enter__(self):
            seen.append("begin")

        def __exit__(self, *_):
            seen.append("end")

        def keep_up(self, num_bytes):
            seen.append(num_bytes)

        def watch(self):
            seen.append("watch")

        def watched(self):
            seen.append("watched")

    def attend():
        seen.append("attend")
        if len(seen) > 12:
            thrice.set()

    with Load(Kept(), attend, 240, torch.zeros(1)).running():
        assert thrice.wait(10)
    assert seen[0] == "begin" and seen[-1] == "end"
    layers, rest = divmod(len(seen) - 2, 4)
    assert seen[1:-1] == [240, "watch", "attend", "watched"] * layers and rest == 0 and layers >= 3


@pytest.fixture
def seen(gpu, monkeypatch):
    """What streams were asked to do."""
    seen = []
    monkeypatch.setattr(queued, "stream_aside", lambda: "aside")
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: seen.append(("sleep", gpu.stream)))

    class Current(Stream):
        def wait_event(self, event):
            seen.append(("wait", event.stream))

    def recorded():
        event = Event(next(gpu.times) if seen and seen[-1][0] not in ("sleep", "wait") else 0)
        event.stream = gpu.stream
        event.is_done = gpu.stream != "aside" or next(gpu.are_late)
        return event

    monkeypatch.setattr(torch.cuda, "current_stream", Current)
    monkeypatch.setattr(queued, "recorded", recorded)
    return seen


def test_a_task_waits_for_another_stream_beside_the_load_and_its_median_counts(
    gpu, seen, monkeypatch
) -> None:
    gpu.times = iter([9, 1, 2, 5, 5, 5])
    beside = Running(None, monkeypatch)
    a, b, c = (lambda name=name: seen.append((name, gpu.stream, beside.is_running)) for name in "abc")
    assert queued.task_seconds([[a, b], [c]], beside, turns=3) == [2.0, 5.0]
    held = [("sleep", "aside"), ("wait", "aside")]
    first = [(name, "default", False) for name in "abc"]
    others = [one for name in "abaccc" for one in (*held, (name, "default", True))]
    assert seen == first + others, "all are compiled before the load begins, and it begins once"
    assert beside.num_runs == 1


def test_a_task_that_was_launched_late_does_not_count_and_is_held_longer_next_time(
    gpu, seen, monkeypatch
) -> None:
    gpu.times, gpu.are_late, holds = iter([9, 1, 8, 2]), iter([True, False, True, False]), []
    monkeypatch.setattr(
        torch.cuda, "_sleep", lambda cycles: [holds.append(cycles), seen.append(("sleep", ""))]
    )
    work = lambda: seen.append(("work", gpu.stream))  # noqa: E731
    assert queued.task_seconds([[work]], None, turns=2) == [1.5]
    assert [cycles / holds[0] for cycles in holds] == [1, 2, 2, 4]


def test_where_all_were_launched_late_they_count_and_there_is_an_end(gpu, seen) -> None:
    gpu.times, gpu.are_late = iter([5, 1, 5, 9, 5, 5]), cycle([True])
    work = lambda: seen.append(("work", gpu.stream))  # noqa: E731
    assert queued.task_seconds([[work]], None, turns=2) == [5.0]
    assert next(gpu.times, None) is None


def test_sweeps_and_tasks_are_allocated_before_their_load_begins(gpu, seen, monkeypatch) -> None:
    for name in ("experts_", "rms_norm", "rotate_", "route"):
        monkeypatch.setattr(ops, name, lambda *_, **__: seen.append(("call", gpu.stream)))
    gpu.times = iter(range(10**6))
    with Running(None, monkeypatch) as beside:
        found = ExpertsBench(SHAPE, torch.float32, TINY).measure(beside)
        assert beside.num_runs == 1 and found.times.sizes == TINY.tokens
        assert small_kernels(SHAPE, torch.float32, TINY, beside).pre_attention.sizes == TINY.rows
        assert beside.num_runs == 2 and not beside.is_running


def test_pages_are_measured_while_sweeps_follow_each_other_and_nothing_is_allocated(gpu, monkeypatch) -> None:
    now, made, asked = [0.0], [], []

    class Watched:
        def rate_watched(self):
            asked.append(len(made))
            return 47.0 if made else 50.0

    def recorded():
        made.append(Event(0))
        return made[-1]

    def sweep(hidden, *_):
        assert beside.is_running and len(hidden) == 16, "as many tokens as the effort says, at most"
        now[0] += 0.1

    monkeypatch.setattr(ops, "experts_", sweep)
    monkeypatch.setattr(gpu_profile, "recorded", recorded)
    monkeypatch.setattr(gpu_profile.time, "perf_counter", lambda: now[0])
    with Running(None, monkeypatch) as beside:
        beside.copies = Watched()
        bench = ExpertsBench(SHAPE, torch.float32, replace(TINY, load_tokens=99, pages_s=0.95))
        assert bench.page_rate(beside) == 47.0
    assert asked == [0, 10], "what was watched before is forgotten, and the rate asked for in the end"
    assert not beside.is_running and beside.num_runs == 1


@pytest.fixture
def chunks(gpu, monkeypatch):
    """Of each chunk attention takes 2 s and the store, which begins later, 4; one chunk is disturbed."""
    chunk, disturbed = [1, 2, 6, 3], [1, 2, 99, 99]
    turn = [*chunk * prefill._CHUNKS, 0]  # and the end of it
    point = [*chunk, *turn * prefill._TURNS]
    times = chain(chunk, disturbed, point[8:], cycle(point))
    monkeypatch.setattr(prefill, "recorded", lambda: Event(next(times)))
    monkeypatch.setattr(prefill, "stream_aside", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(prefill.PrefillPlan, "of", lambda *_: None)


def test_attention_of_prompts_and_their_stores_are_timed_among_a_chunks_tasks_and_beside_the_load(
    chunks, gpu, monkeypatch
) -> None:
    beside, launched = Running(torch.zeros(2**22, dtype=torch.uint8), monkeypatch), []

    def noted(name):
        return lambda *_: launched.append((name, beside.is_running, gpu.stream == "default"))

    monkeypatch.setattr(prefill.ops, "prefill_attention", noted("attention"))
    monkeypatch.setattr(prefill, "tasks", lambda *_: [(noted("before"), noted("after"))])
    true_store = KvStore.store
    monkeypatch.setattr(prefill.KvStore, "store", lambda self, n: (noted("store")(), true_store(self, n)))
    with beside:
        found = prefill.prefill(SHAPE, torch.bfloat16, TINY, beside)
        assert prefill.prefill(SHAPE, torch.bfloat16, TINY, None).store is None
    num_points = len(TINY.prompts) + len(TINY.chunk_tokens)
    chunk = [("before", True), ("store", False), ("attention", True), ("after", True)]
    point = [False] + [True] * prefill._TURNS * prefill._CHUNKS  # compiled before the load begins
    wanted = [(name, is_running, is_main) for is_running in point for name, is_main in chunk]
    assert launched[: num_points * len(wanted)] == wanted * num_points
    lengths = prefill.prompt_lens(TINY.prompts[0])
    assert found.rate.rates[0] == pytest.approx(4 * prefill.causal_pairs(lengths) * SHAPE.q_size / 2)
    token_bytes = 2 * SHAPE.num_kv_heads * SHAPE.head_dim * 2
    counts = [sum(prefill.prompt_lens(count // 2, count)) for count in TINY.chunk_tokens]
    assert found.store.sizes == tuple(count * token_bytes for count in counts)
    assert found.store.seconds == pytest.approx((4.0, 4.0))
    assert beside.kv.count_nonzero() > 0
