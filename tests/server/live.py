"""A live server in a thread of the test's process, on a free port of the loopback."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

import uvicorn

from moe_lightning import LLM
from moe_lightning.server.app import Settings, create_app


class Held:
    """An engine that makes a pass only when it is let."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._step = engine.step
        self._passes = threading.Semaphore(0)
        self._is_free = False
        engine.step = self._one

    def _one(self) -> Any:
        if not self._is_free:
            self._passes.acquire()
        return self._step()

    def let_pass(self, count: int) -> None:
        self._passes.release(count)

    def free(self) -> None:
        self._engine.step = self._step
        self._is_free = True
        self._passes.release()


@dataclass(frozen=True)
class Live:
    """A running server."""

    port: int
    app: Any

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

    def until(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        """Wait for what another thread brings about."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come about"
            time.sleep(0.005)

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
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
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        ready = threading.Event()

        async def main() -> None:
            serve = asyncio.ensure_future(server.serve(sockets=[listening]))
            while not server.started and not serve.done():
                await asyncio.sleep(0.01)
            ready.set()
            await serve

        thread = threading.Thread(target=lambda: asyncio.run(main()), name="server")
        thread.start()
        assert ready.wait(60)
        try:
            yield Live(listening.getsockname()[1], app)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
