"""A client of bare sockets: it costs the machine that it shares with the server as little as it can."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """Text and number of tokens of a completion; `text` is what had come if the client went early."""

    text: str
    num_tokens: int | None
    finish_reason: str | None


async def ask(port: int, body: dict[str, Any]) -> Answer:
    """A whole completion.

    Raises:
        ConnectionError: the server gave no answer; the message has what it gave.
    """
    reader, writer = await _send(port, body)
    try:
        head, _, data = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    _check(head)
    found = json.loads(data)
    choice = found["choices"][0]
    return Answer(choice["text"], found["usage"]["completion_tokens"], choice["finish_reason"])


async def stream(
    port: int,
    body: dict[str, Any],
    pause: float = 0.0,
    go_after: int | None = None,
    on_event: Callable[[], None] = lambda: None,
) -> Answer:
    """A streamed completion.

    Args:
        port: the server's.
        body: of the request, without what makes it stream.
        pause: seconds to wait after each event before reading on.
        go_after: events after which the client closes the connection.
        on_event: called for each.

    Raises:
        ConnectionError: the stream ended before it was done.
    """
    options = {"stream": True, "stream_options": {"include_usage": True}}
    reader, writer = await _send(port, {**body, **options})
    text, num_tokens, reason, events = "", None, None, 0
    try:
        _check(await reader.readuntil(b"\r\n\r\n"))
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                return Answer(text, num_tokens, reason)
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ConnectionError(event["error"]["message"])
            for choice in event["choices"]:
                text += choice["text"]
                reason = choice["finish_reason"] or reason
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
            events += 1
            on_event()
            if events == go_after:
                return Answer(text, None, None)
            if pause:
                await asyncio.sleep(pause)
    except asyncio.IncompleteReadError as error:
        raise ConnectionError("no response") from error
    finally:
        writer.close()
    raise ConnectionError("the stream ended before it was done")


async def _send(port: int, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    # A small buffer, so that a slow reader is felt at the other end.
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**16)
    data = json.dumps(body).encode()
    # HTTP/1.0: the body ends with the connection and has no chunks.
    head = "POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return reader, writer


def _check(head: bytes) -> None:
    status = head.split(b"\r\n", 1)[0]
    if b" 200 " not in status + b" ":
        raise ConnectionError(status.decode(errors="replace") or "no response")
