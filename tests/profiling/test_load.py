"""What is measured beside copies and attention: on a GPU of which only the clock is true."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch
from efforts import SHAPE, TINY

from moe_lightning.profiling import link, prefill
from moe_lightning.profiling.link import Copies
from moe_lightning.profiling.load import again_and_again


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
    assert copies.rates == [100.0], "bytes of a copy, one ending a second after the other"


class Running:
    """A load that notes what is done in it."""

    def __init__(self, kv):
        self.kv, self.copies, self.num_kept, self.is_running = kv, self, 0, False

    def keep_up(self):
        assert self.is_running
        self.num_kept += 1

    @contextmanager
    def running(self):
        self.is_running = True
        yield
        self.is_running = False


@pytest.fixture
def turns(gpu, monkeypatch):
    """Of each turn both begin at 1, attention ends after 2 s and the store after 4; one turn is disturbed."""
    times = iter([1, 3, 5, 1, 99, 99, *[1, 3, 5] * 100])
    monkeypatch.setattr(prefill, "recorded", lambda: Event(next(times)))
    monkeypatch.setattr(prefill.PrefillPlan, "of", lambda *_: None)


def test_attention_of_prompts_and_their_stores_are_timed_beside_each_other_and_the_load(
    turns, monkeypatch
) -> None:
    load = Running(torch.zeros(2**22, dtype=torch.uint8))
    attended = []
    monkeypatch.setattr(
        prefill.ops, "prefill_attention", lambda *args: attended.append(load.is_running), raising=True
    )
    randn, empty = torch.randn, torch.empty
    monkeypatch.setattr(prefill.torch, "randn", lambda *size, device, dtype: randn(*size, dtype=dtype))
    monkeypatch.setattr(prefill.torch, "empty", lambda *size, device, dtype: empty(*size, dtype=dtype))
    found = prefill.prefill(SHAPE, torch.bfloat16, TINY, load)
    num_turns, num_chunks = prefill._TURNS, len(TINY.prompts) + len(TINY.chunk_tokens)
    assert attended == [False, *[True] * num_turns] * num_chunks, "compiled before"
    assert load.num_kept == num_turns * num_chunks
    lengths = prefill.prompt_lens(TINY.prompts[0])
    assert found.rate.rates[0] == pytest.approx(4 * prefill.causal_pairs(lengths) * SHAPE.q_size / 2)
    token_bytes = 2 * SHAPE.num_kv_heads * SHAPE.head_dim * 2
    counts = [sum(prefill.prompt_lens(128, count)) for count in TINY.chunk_tokens]
    assert found.store.sizes == tuple(count * token_bytes for count in counts)
    assert found.store.seconds == pytest.approx((4.0, 4.0))
    assert load.kv.count_nonzero() > 0
    assert prefill.prefill(SHAPE, torch.bfloat16, TINY, None).store is None
