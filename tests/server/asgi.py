"""Requests straight into an ASGI app: no sockets, no event loop of its own."""

from __future__ import annotations

import asyncio
import json
from typing import Any


async def send(app: Any, path: str, body: bytes, method: str = "POST") -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the response."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()  # the client stays
        raise AssertionError

    async def collect(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, collect), 120)
    headers = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(m.get("body", b"") for m in sent[1:])


def error_of(status: int, data: bytes) -> str:
    """The message of an error; it must be one of the client's."""
    assert 400 <= status < 500, (status, data[:300])
    error = json.loads(data)["error"]
    assert error["message"]
    assert error["type"]
    return str(error["message"])
