"""A live server in a thread of the test's process, on a free port of the loopback."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

from moe_lightning import LLM
from moe_lightning.server.app import Settings, create_app
from moe_lightning.server.run import Server


class Held:
    """An engine that makes a pass only when it is let; `has_begun` is set once it wants to."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._step = engine.step
        self._passes = threading.Semaphore(0)
        self._is_free = False
        self.has_begun = threading.Event()
        engine.step = self._one

    def _one(self) -> Any:
        self.has_begun.set()
        if not self._is_free:
            self._passes.acquire()
        return self._step()

    def let_pass(self, count: int) -> None:
        self._passes.release(count)

    def free(self) -> None:
        self._engine.step = self._step
        self._is_free = True
        self._passes.release()


class Stream:
    """A connection on which a request was sent, with the response read as far as somebody wants."""

    def __init__(self, port: int, path: str, body: Any, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(120)
        self.socket.connect(("127.0.0.1", port))
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        self.socket.sendall(head.encode() + b"\r\nConnection: close\r\n\r\n" + data)
        self.data = b""

    def until(self, mark: bytes) -> bytes:
        """Read until the mark has come."""
        while mark not in self.data:
            part = self.socket.recv(65536)
            assert part, f"the connection ended before {mark!r} came: {self.data[-300:]!r}"
            self.data += part
        return self.data

    def rest(self) -> bytes:
        """All that comes."""
        while part := self.socket.recv(65536):
            self.data += part
        return self.data

    def events(self) -> list[Any]:
        """The events of the whole stream, without the last, which says that it is done."""
        head, _, body = self.rest().partition(b"\r\n\r\n")
        assert b"200 OK" in head
        text = _joined_chunks(body).decode()
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]

    def close(self) -> None:
        self.socket.close()


def _joined_chunks(body: bytes) -> bytes:
    joined = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        joined += rest[: int(size, 16)]
        body = rest[int(size, 16) + 2 :]
    return joined


@dataclass(frozen=True)
class Live:
    """A running server."""

    port: int
    app: Any
    server: Server
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine(self) -> Any:
        return self.app.state.service.llm.engine

    @property
    def desk(self) -> Any:
        return self.app.state.service.desk

    @contextmanager
    def held(self) -> Iterator[Held]:
        """The engine stands still but for passes that the block lets it make."""
        held = Held(self.engine)
        try:
            yield held
        finally:
            held.free()

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait for what another thread brings about."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come about"
            time.sleep(0.005)
        # Whatever the server's loop was in the middle of when that came about, it is through with it.
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.loop).result(seconds)

    def background(self, url: str, body: dict[str, Any], request_id: str = "b") -> Future[Any]:
        """A body answered as the batch service would have it answered."""
        answer = self.app.state.service.answer_body(url, body, request_id)
        return asyncio.run_coroutine_threadsafe(answer, self.loop)

    def open_stream(self, path: str, body: Any) -> Stream:
        """A stream whose end nobody waits for."""
        return Stream(self.port, path, body)

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        own = {"Content-Type": "application/json"} if data is not None else {}
        connection.request(method, path, data, own | (headers or {}))
        response = connection.getresponse()
        found = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        connection.close()
        return found

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        status, _, data = self.send("POST", path, body, headers)
        return status, json.loads(data)

    def get(self, path: str) -> tuple[int, Any]:
        status, _, data = self.send("GET", path)
        return status, json.loads(data)


@contextmanager
def serving(llm: LLM, settings: Settings | None = None) -> Iterator[Live]:
    """A server of the model; ends with the block."""
    app = create_app(llm, settings)
    ready = threading.Event()
    server = Server(app, ready.set)
    loop = asyncio.new_event_loop()
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        thread = threading.Thread(
            target=lambda: loop.run_until_complete(server.serve(sockets=[listening])), name="server"
        )
        thread.start()
        assert ready.wait(60)
        try:
            yield Live(listening.getsockname()[1], app, server, loop)
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join(60)
            loop.close()
            assert not thread.is_alive()
