"""A batch service with a fake engine, and clients to it, all in one process."""

import asyncio
import functools
import json
import os

import httpx2
from fastapi import FastAPI
from openai import AsyncOpenAI

from moe_lightning.server.batches import BatchLimits, BatchService, store
from moe_lightning.server.handlers import add_error_handlers

QUICK = BatchLimits(tick_seconds=0.01, retry_seconds=0.01)
URL = "/v1/completions"


def asynchronous(test):
    """The test as a function; none of ours takes long, so that one that hangs fails."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 120))

    return run


def without_power_cuts(patch):
    """Nothing is made durable: a kill does not need it, and waiting for the disk is most of what a test takes."""
    patch.setattr(os, "fsync", lambda fd: None)
    patch.setattr(store, "_SYNCHRONOUS", "OFF")


class FakeEngine:
    """Answers at once, or when `gate` is set; remembers what it was asked, and what was cancelled."""

    def __init__(self, *, is_open=True):
        self.gate = asyncio.Event()
        if is_open:
            self.gate.set()
        self.asked, self.cancelled = [], []
        self.running = self.most_running = 0
        self.changed = asyncio.Condition()

    async def __call__(self, url, body, request_id):
        self.asked.append((url, body, request_id))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await self._note()
        try:
            await self.gate.wait()
            return self.reply(body)
        except asyncio.CancelledError:
            self.cancelled.append(request_id)
            raise
        finally:
            self.running -= 1

    def reply(self, body):
        """What `body` gets: `prompt` echoed, or the status that it asks for."""
        if "status" in body:
            return body["status"], {
                "error": {"message": "as asked", "type": "invalid_request_error", "code": "asked"}
            }
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        return 200, {
            "object": "text_completion",
            "model": "fake",
            "choices": [{"text": body["prompt"]}],
            "usage": usage,
        }

    async def _note(self):
        async with self.changed:
            self.changed.notify_all()

    async def until(self, condition):
        """Wait until `condition()` holds; it is looked at whenever something is asked."""
        async with self.changed:
            await self.changed.wait_for(condition)


class Desk:
    """A service at work in a directory; `async with` starts and stops it."""

    def __init__(self, directory, engine=None, limits=QUICK, clock=None):
        self.engine = engine or FakeEngine()
        more = {} if clock is None else {"clock": clock}
        self.service = BatchService(directory, self.engine, limits, **more)
        self.app = FastAPI()
        self.app.include_router(self.service.router())
        add_error_handlers(self.app)
        transport = httpx2.ASGITransport(self.app)
        self.http = httpx2.AsyncClient(transport=transport, base_url="http://test/v1")
        self.client = AsyncOpenAI(
            api_key="none", base_url="http://test/v1", http_client=self.http, max_retries=0
        )

    async def __aenter__(self):
        await self.service.start()
        return self

    async def __aexit__(self, *_):
        await self.service.stop()
        await self.http.aclose()

    async def upload(self, content, name="in.jsonl"):
        """Id of a new file."""
        return (await self.client.files.create(file=(name, content), purpose="batch")).id

    async def begin(self, *lines, endpoint=URL, **more):
        """A new batch with these lines."""
        file_id = await self.upload(encode(*lines))
        return await self.client.batches.create(
            input_file_id=file_id, endpoint=endpoint, completion_window="24h", **more
        )

    async def until(self, batch_id, *statuses):
        """The batch, once it has one of the statuses."""
        while (batch := await self.client.batches.retrieve(batch_id)).status not in statuses:
            await asyncio.sleep(0.002)
        return batch

    async def run(self, *lines, **more):
        """The batch with these lines, once it has ended."""
        return await self.ended((await self.begin(*lines, **more)).id)

    async def ended(self, batch_id):
        """The batch, once it has ended."""
        return await self.until(batch_id, "completed", "failed", "expired", "cancelled")

    async def lines(self, file_id):
        """Lines of a file, by custom_id; none of them twice."""
        if file_id is None:
            return {}
        rows = [json.loads(row) for row in (await self.client.files.content(file_id)).text.splitlines()]
        found = {row["custom_id"]: row for row in rows}
        assert len(found) == len(rows), "a custom_id was written twice"
        return found


def line(custom_id, prompt="hi", *, url=URL, **body):
    """One request."""
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"prompt": prompt, **body}}


def encode(*lines):
    """A batch file; bytes are taken as they are."""
    return b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines)
