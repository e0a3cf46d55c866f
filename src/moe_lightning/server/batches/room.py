"""How much may be in flight."""

from __future__ import annotations

import asyncio


class Room:
    """Room for so many requests and bytes; what is larger than all of it gets in where nothing else is.

    One task at a time may wait.
    """

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self._max_requests, self._max_bytes = max_requests, max_bytes
        self._requests = self._bytes = 0
        self._freed = asyncio.Event()

    @property
    def requests(self) -> int:
        """That are inside."""
        return self._requests

    async def take(self, size: int) -> None:
        """Wait until there is room for a request of `size` bytes, and take it."""
        while self._requests and not self._has(size):
            self._freed.clear()
            await self._freed.wait()
        self._requests += 1
        self._bytes += size

    def give(self, size: int) -> None:
        """Give the room of a request back."""
        self._requests -= 1
        self._bytes -= size
        self._freed.set()

    def _has(self, size: int) -> bool:
        return self._requests < self._max_requests and self._bytes + size <= self._max_bytes
