"""News of the requests of one call, kept until somebody looks; for the event loop's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from moe_lightning.server.engine_thread import Update

News = tuple[int, Update]  # which of the requests, and what is new of it


class Inbox:
    """News that came since the reader last looked."""

    def __init__(self) -> None:
        self._news: list[News] = []
        self._arrived = asyncio.Event()

    def slot(self, position: int, on_end: Callable[[int], None]) -> Slot:
        """What takes the news of one request; `on_end` hears at once when that ends, whoever reads."""
        return Slot(self, position, on_end)

    def put(self, position: int, update: Update) -> None:
        """Keep a piece of news."""
        self._news.append((position, update))
        self._arrived.set()

    async def take(self, seconds: float | None = None) -> list[News]:
        """All news; waits for some, but no longer than some seconds: then there is none."""
        try:
            async with asyncio.timeout(seconds):
                await self._arrived.wait()
        except TimeoutError:
            return []
        self._arrived.clear()
        news, self._news = self._news, []
        return news


@dataclass(frozen=True, slots=True)
class Slot:
    """Puts the news of one request into an inbox."""

    inbox: Inbox
    position: int
    on_end: Callable[[int], None]

    def __call__(self, update: Update) -> None:
        """Put one in."""
        self.inbox.put(self.position, update)
        if update.output.finished:
            self.on_end(self.position)
