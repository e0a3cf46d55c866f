"""Runs an app until a signal ends it, and lets requests finish."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from moe_lightning.errors import ConfigError
from moe_lightning.server.engine_thread import EngineThread
from moe_lightning.server.idle import IdleConnections
from moe_lightning.server.service import Service

_GRACE_S = 5.0  # for the last words of requests that did not finish in time
_BACKLOG = 2048
_FILES = 2**16
_TICKS_PER_S = 10  # of uvicorn
_IDLE_SHARE = 2  # connections that may be open for each request that may be in progress


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error}; choose another --host or --port"
        ) from error


def allow_connections() -> None:
    """Let the process have as many files open as it may, within reason: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def serve(app: FastAPI, listening: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; then running requests get some time, and new ones are refused.

    A second SIGINT ends all at once.
    """
    allow_connections()
    with listening:
        Server(app, on_ready).run(sockets=[listening])


def bounded(protocol: type[asyncio.Protocol], most: int) -> type[asyncio.Protocol]:
    """One of uvicorn's HTTP protocols, for so many connections at a time; one that comes then is closed."""

    class Bounded(protocol):  # type: ignore[valid-type, misc]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.abort()

    return Bounded


class Server(uvicorn.Server):
    """Tells requests in time that they will not finish, instead of cutting their connections.

    Cuts those of clients that do nothing, and those that are too many.

    Args:
        app: of `create_app`.
        on_ready: called when connections are taken.
    """

    def __init__(self, app: FastAPI, on_ready: Callable[[], None]) -> None:
        self._service: Service = app.state.service
        self._engine: EngineThread = app.state.engine
        patience = int(self._service.limits.shutdown_seconds + _GRACE_S)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, backlog=_BACKLOG, server_header=False, ws="none",
            timeout_graceful_shutdown=patience,
        )  # fmt: skip
        super().__init__(config)
        self._on_ready = on_ready
        self._idle = IdleConnections(self._service.limits)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        most = _IDLE_SHARE * self._service.limits.max_connections
        self.config.http_protocol_class = bounded(self.config.http_protocol_class, most)
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self.started:
            self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        """Look after connections each second; True ends the server."""
        if counter % _TICKS_PER_S == 0:
            for connection in self._idle.look(
                self.server_state.connections, asyncio.get_running_loop().time()
            ):
                connection.transport.abort()  # to close it would wait until the client has taken all
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self._loop and not self._service.desk.is_closing:
            self._loop.call_soon_threadsafe(self._close)
        super().handle_exit(sig, frame)

    def _close(self) -> None:
        self._service.desk.is_closing = True
        assert self._loop
        self._loop.call_later(self._service.limits.shutdown_seconds, self._engine.abort_all)
