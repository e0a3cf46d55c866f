"""Responses that end when their client goes: JSON, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moe_lightning.server.errors import HttpError, error_body

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
Events = AsyncGenerator[list[dict[str, Any]], None]
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class Stalled(Exception):  # noqa: N818
    """The client takes nothing of its stream."""


class Disconnected(Exception):  # noqa: N818
    """The client went before its answer was there."""


def encode(value: Any) -> bytes:
    """A value as JSON; half a surrogate pair becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


class JsonResponse(Response):
    """A value as the body; numbers must be finite."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body's bytes."""
        return encode(content)


async def unless_disconnected(receive: Receive, work: Awaitable[_T]) -> _T:
    """What `work` gives; it is cancelled when the client goes.

    Raises:
        Disconnected: the client went first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        await _cancel(task, gone)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events.

    A slow reader holds up nothing but its own stream: events that come meanwhile are sent together later.

    Args:
        events: lists of JSON objects, each one event; of an empty one a comment is sent, so that nobody on the way
            takes the line for dead. Closed when the client goes, or takes nothing.
        write_seconds: after which a client that takes nothing is given up.
    """

    media_type = "text/event-stream"

    def __init__(self, events: Events, write_seconds: float) -> None:
        # A proxy that collects what it passes on would make one piece of the stream.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._write_seconds = events, write_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await unless_disconnected(receive, self._send_all(send))
        except Disconnected:
            return
        except Stalled:
            _log.warning("a stream is dropped: its reader has taken nothing for %g s", self._write_seconds)

    async def _send_all(self, send: Send) -> None:
        try:
            async with aclosing(self._events) as events:
                async for batch in events:
                    await self._write(send, b"".join(map(_event, batch)) if batch else KEEP_ALIVE)
        except Stalled:
            raise
        except Exception as error:  # the status is sent already: the last event says it
            await self._write(send, _event(_body_of(error)))
        await self._write(send, DONE, is_last=True)

    async def _write(self, send: Send, data: bytes, *, is_last: bool = False) -> None:
        timeout = asyncio.timeout(self._write_seconds)
        try:
            async with timeout:
                await send({"type": "http.response.body", "body": data, "more_body": not is_last})
        except TimeoutError:
            if timeout.expired():
                raise Stalled from None
            raise


def _body_of(error: Exception) -> dict[str, Any]:
    if isinstance(error, HttpError):
        return error.body()
    _log.error("a stream failed", exc_info=error)
    return error_body(500, "the server failed; its log says more", "internal_error")


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + encode(value) + b"\n\n"
