"""Requests that come to an idle engine together."""

import asyncio
import threading

import pytest

from moe_lightning.engine.request import Request, RequestOutput, SamplingParams
from moe_lightning.server import engine_thread
from moe_lightning.server.engine_thread import EngineThread, Ticket


class FakeEngine:
    """Answers all that it has in one pass; notes how many those were."""

    advanced = ()

    def __init__(self, room):
        self._room, self._requests = room, []
        self.passes, self.was_asked = [], threading.Event()

    @property
    def num_unfinished(self):
        return len(self._requests)

    @property
    def is_full(self):
        return len(self._requests) >= self._room

    def add(self, request):
        self._requests.append(request)
        self.was_asked.set()

    def step(self):
        done, self._requests = self._requests, []
        self.passes.append(len(done))
        return [RequestOutput(r.request_id, r.prompt, r.prompt_token_ids) for r in done]


async def answered(engine, count):
    """Have so many requests answered, each sent when the one before has reached the engine."""
    thread, inbox = EngineThread(engine), asyncio.Queue()
    thread.start(asyncio.get_running_loop())
    try:
        for i in range(count):
            engine.was_asked.clear()
            thread.submit([Ticket(Request(str(i), (1,), SamplingParams()), inbox.put_nowait)])
            assert await asyncio.to_thread(engine.was_asked.wait, 120)
        for _ in range(count):
            await asyncio.wait_for(inbox.get(), 120)
    finally:
        await asyncio.to_thread(thread.stop)


@pytest.fixture
def patient(monkeypatch):
    """Engines wait for more requests as long as it takes."""
    for name in ("_SILENCE_S", "_LONGEST_WAIT_S"):
        monkeypatch.setattr(engine_thread, name, 60)
    monkeypatch.setattr(engine_thread, "_SHARE_OF_PASS", 1000)


def test_requests_that_come_one_after_the_other_share_their_first_pass(patient):
    engine = FakeEngine(room=3)
    asyncio.run(answered(engine, 3))
    assert engine.passes == [3]


def test_an_engine_does_not_begin_while_the_event_loop_is_busy_with_requests(patient, monkeypatch):
    monkeypatch.setattr(engine_thread, "_SILENCE_S", 0)
    engine = FakeEngine(room=3)

    async def burst():
        thread, inbox = EngineThread(engine), asyncio.Queue()
        thread.start(asyncio.get_running_loop())
        try:
            thread.submit([Ticket(Request("a", (1,), SamplingParams()), inbox.put_nowait)])
            engine.was_asked.wait(120)  # the loop is not free while this waits
            for _ in range(4):
                await asyncio.sleep(0)
            thread.submit([Ticket(Request("b", (1,), SamplingParams()), inbox.put_nowait)])
            for _ in range(2):
                await asyncio.wait_for(inbox.get(), 120)
        finally:
            await asyncio.to_thread(thread.stop)

    asyncio.run(burst())
    assert engine.passes == [2]


def test_a_request_that_comes_alone_is_answered_though_there_is_room_for_more():
    engine = FakeEngine(room=3)
    asyncio.run(answered(engine, 1))
    assert engine.passes == [1]
