"""Which connections wait for clients that do nothing; uvicorn itself waits for the head of a request for ever."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from moe_lightning.server.limits import Limits

Connection = Any  # one of uvicorn's HTTP protocols; both have `cycle`, the last request, and `transport`


@dataclass(frozen=True)
class _Wait:
    """What a client is waited for, and since when; the same `state` means that it has got no further."""

    state: tuple[object, bool, int]
    since: float
    seconds: float


class IdleConnections:
    """Finds connections to end, from looks at all of them at intervals.

    A connection waits for its client before a request's head is whole, however slowly that drips, after a response
    (with the rest of a body that nobody reads, too), and as long as the client takes nothing of a response.

    Args:
        limits: how long it may.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waits: dict[Connection, _Wait] = {}

    def look(self, connections: Iterable[Connection], now: float) -> list[Connection]:
        """Those that have waited too long at a time in seconds."""
        before, self._waits = self._waits, {}
        for connection in connections:
            wait = self._wait(connection, now)
            if wait is not None:
                last = before.get(connection)
                self._waits[connection] = last if last and last.state == wait.state else wait
        return [c for c, wait in self._waits.items() if now - wait.since >= wait.seconds]

    def _wait(self, connection: Connection, now: float) -> _Wait | None:
        cycle = connection.cycle
        is_between = cycle is None or cycle.response_complete
        unsent = connection.transport.get_write_buffer_size()
        if not is_between and not unsent:
            return None  # the server is at work
        seconds = self._limits.write_seconds if unsent else self._limits.head_seconds
        return _Wait((cycle, is_between, unsent), now, seconds)
