"""What is measured beside copies and attention: on a GPU of which only the clock is true."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch
from efforts import SHAPE, TINY, OnCpu

from moe_lightning.profiling import link, prefill, queued
from moe_lightning.profiling.kv_store import KvStore
from moe_lightning.profiling.link import Copies
from moe_lightning.profiling.load import Load, again_and_again


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


class Gpu:
    """Streams that are done with all at once; events at times that tests say, in the order of recording."""

    def __init__(self, times=()):
        self.times, self.stream = iter(times), "default"

    @contextmanager
    def inside(self, stream):
        before, self.stream = self.stream, stream
        yield
        self.stream = before


class Stream:
    def wait_event(self, event):
        assert event.time is not None

    def synchronize(self):
        pass


class Event:
    def __init__(self, time):
        self.time = time

    def synchronize(self):
        pass

    def query(self):
        return True

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
    now = iter(range(1000))
    monkeypatch.setattr(link, "_record", lambda: Event(next(now)))
    seen = []

    class Link:
        def copy_to_gpu(self, number, size):
            seen.append(("in", gpu.stream, size))

        def copy_from_gpu(self, number, size):
            seen.append(("out", gpu.stream, size))

    copies = Copies(Link(), 100, 4e3)
    with copies:
        assert seen == [("in", copies._stream, 100)] * 5, "what takes a tenth of a second, and one"
        seen.clear()
        copies.keep_up(240)
    assert seen == [("in", copies._stream, 100)] * 5 + [
        ("out", copies._back, 100), ("in", copies._back, 100),
    ] * 2  # fmt: skip
    waited, last = [], Event(0)
    last.synchronize = lambda: waited.append(gpu.stream)
    monkeypatch.setattr(link, "_record", lambda: (waited.append(gpu.stream), last)[1])
    copies.wait()
    assert waited == [copies._stream, "default"], "recorded behind the copies, waited for by who calls"
    assert copies.rates == [100.0], "bytes of a copy, one ending a second after the other"


class Running:
    """A load of which one knows whether it goes on."""

    def __init__(self, kv):
        self.kv, self.is_running = kv, False

    @contextmanager
    def running(self):
        self.is_running = True
        yield
        self.is_running = False


def test_a_load_queues_copies_before_each_layer_of_attention_until_the_block_ends() -> None:
    seen, thrice = [], threading.Event()

    class Kept:
        def __enter__(self):
            seen.append("begin")

        def __exit__(self, *_):
            seen.append("end")

        def keep_up(self, num_bytes):
            seen.append(num_bytes)

    def attend():
        seen.append("attend")
        if len(seen) > 6:
            thrice.set()

    with Load(Kept(), attend, 240, torch.zeros(1)).running():
        assert thrice.wait(10)
    assert seen[0] == "begin" and seen[-1] == "end"
    assert seen[1:-1] == [240, "attend"] * (len(seen) // 2 - 1) and len(seen) >= 8


def test_a_task_waits_for_another_stream_and_its_median_counts(gpu, monkeypatch) -> None:
    seen, ends = [], iter([9, 1, 2])
    monkeypatch.setattr(queued, "stream_aside", lambda: "aside")
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: seen.append(("sleep", gpu.stream)))

    class Current(Stream):
        def wait_event(self, event):
            seen.append(("wait", event.stream))

    def recorded():
        event = Event(next(ends) if seen and seen[-1][0] in "ab" else 0)
        event.stream = gpu.stream
        return event

    monkeypatch.setattr(torch.cuda, "current_stream", Current)
    monkeypatch.setattr(queued, "recorded", recorded)
    works = [lambda: seen.append(("a", gpu.stream)), lambda: seen.append(("b", gpu.stream))]
    assert queued.task_seconds(works, turns=3) == 2.0
    held = [("sleep", "aside"), ("wait", "aside")]
    a, b = ("a", "default"), ("b", "default")
    assert seen == [a, b, *held, a, *held, b, *held, a], "both are compiled before"


@pytest.fixture
def chunks(gpu, monkeypatch):
    """Of each chunk attention takes 2 s and the store, which begins later, 4; one chunk is disturbed."""
    times = iter([1, 2, 6, 3, 1, 2, 99, 99, *[1, 2, 6, 3] * 1000])
    monkeypatch.setattr(prefill, "recorded", lambda: Event(next(times)))
    monkeypatch.setattr(prefill, "stream_aside", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(prefill.PrefillPlan, "of", lambda *_: None)


def test_attention_of_prompts_and_their_stores_are_timed_among_a_chunks_tasks_and_beside_the_load(
    chunks, gpu, monkeypatch
) -> None:
    load, launched = Running(torch.zeros(2**22, dtype=torch.uint8)), []

    def noted(name):
        return lambda *_: launched.append((name, load.is_running, gpu.stream == "default"))

    monkeypatch.setattr(prefill.ops, "prefill_attention", noted("attention"))
    monkeypatch.setattr(prefill, "tasks", lambda *_: [(noted("before"), noted("after"))])
    true_store = KvStore.store
    monkeypatch.setattr(prefill.KvStore, "store", lambda self, n: (noted("store")(), true_store(self, n)))
    with OnCpu():
        found = prefill.prefill(SHAPE, torch.bfloat16, TINY, load)
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
    assert load.kv.count_nonzero() > 0
