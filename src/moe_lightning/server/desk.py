"""Where requests are taken in, queued within bounds, and their news waited for; for the event loop's thread."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from moe_lightning.engine.request import Request, RequestOutput
from moe_lightning.server.engine_thread import EngineThread, Ticket
from moe_lightning.server.errors import HttpError
from moe_lightning.server.inbox import Inbox, News
from moe_lightning.server.limits import Limits


@dataclass
class _Held:
    """What requests of one kind hold: answers that run or wait, and tokens of their prompts."""

    answers: int = 0
    tokens: int = 0
    waiters: deque[asyncio.Future[None]] = field(default_factory=deque)

    def add(self, requests: Sequence[Request], sign: int = 1) -> None:
        """Count requests, or with -1 no longer."""
        answers, tokens = _total(requests)
        self.answers += sign * answers
        self.tokens += sign * tokens


class Desk:
    """Takes requests to the engine.

    Interactive ones are refused where the queue is full; background ones are sent within `background_place`. A
    request holds its place until the engine has ended it, not until somebody has read all of it.

    Args:
        engine: what answers them.
        limits: how many may wait.
        max_running: answers that the engine works on at once.
        pass_seconds: gives how long passes take now.
    """

    def __init__(
        self,
        engine: EngineThread,
        limits: Limits,
        max_running: int,
        pass_seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._max_running = max_running
        self._interactive, self._background = _Held(), _Held()
        self.is_closing = False
        self._pass_seconds = pass_seconds

    @property
    def retry_after(self) -> int:
        """Seconds after which those that are refused may find a place: answers end with passes."""
        return max(1, min(60, math.ceil(4 * self._pass_seconds())))

    @property
    def num_interactive(self) -> int:
        """Answers in work that somebody waits for."""
        return self._interactive.answers

    @property
    def num_background(self) -> int:
        """Answers in work for batches."""
        return self._background.answers

    async def outputs(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """All outputs; when the task is cancelled, what is unfinished is dropped.

        Raises:
            HttpError: there is no place, or the engine is out of order.
        """
        found: dict[int, RequestOutput] = {}
        async for news in self._news(requests, is_stream=False):
            found.update({position: update.output for position, update in news})
        return [found[position] for position in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> AsyncGenerator[list[News], None]:
        """News of requests as it comes, several at a time if the reader is slow; to end early, close it.

        After each silence of `keep_alive_seconds` comes an empty list.

        Raises:
            HttpError: as `outputs`.
        """
        return self._news(requests, is_stream=True)

    async def _news(
        self, requests: Sequence[Request], *, is_stream: bool
    ) -> AsyncGenerator[list[News], None]:
        is_background = requests[0].is_background
        held = self._background if is_background else self._interactive
        if not is_background:
            self.check_place(requests)
        inbox, running = Inbox(), dict(enumerate(requests))

        def on_end(position: int) -> None:
            if request := running.pop(position, None):
                held.add([request], -1)
                self._wake_next(held)

        held.add(requests)
        held.answers -= is_background  # the place that was kept for it is one of these
        try:
            self._engine.submit([Ticket(r, inbox.slot(i, on_end), is_stream) for i, r in enumerate(requests)])
            pending = set(range(len(requests)))
            while pending:
                news = await inbox.take(self._limits.keep_alive_seconds if is_stream else None)
                pending -= {position for position, update in news if update.output.finished}
                yield news
        finally:
            held.answers += is_background
            if running:
                self._engine.abort([request.request_id for request in running.values()])
            for position in list(running):
                on_end(position)

    def check_place(self, requests: Sequence[Request]) -> None:
        """Make sure that there is a place for interactive requests.

        Raises:
            HttpError: there is none, or the engine is out of order.
        """
        self._check_open()
        held, (answers, tokens) = self._interactive, _total(requests)
        room = self._max_running + self._limits.max_queue
        if not held.answers:  # one alone is always taken: its size has a limit of its own
            return
        if held.answers + answers > room or held.tokens + tokens > self._limits.max_queued_tokens:
            full = f"{held.answers} answers are in work and {room} is the most", "--max-queue"
            if held.answers + answers <= room:
                most = self._limits.max_queued_tokens
                full = (
                    f"prompts of {held.tokens} tokens are in work and {most} is the most",
                    "--max-queued-tokens",
                )
            raise HttpError(
                429,
                f"{full[0]}; send it again in {self.retry_after} s, or start the server with a larger {full[1]}",
                "queue_full",
                self.retry_after,
            )

    @asynccontextmanager
    async def background_place(self) -> AsyncIterator[None]:
        """Wait until there is a place for background work, and keep it for the block, in which that is done.

        Those that wait get places in the order in which they came.

        Raises:
            HttpError: the engine is out of order, or the server is closing.
        """
        held = self._background
        if held.waiters or self._is_full(held):
            await self._given_place(held)
        else:
            held.answers += 1
        try:
            self._check_open()
            yield
        finally:
            held.answers -= 1
            self._wake_next(held)

    async def _given_place(self, held: _Held) -> None:
        """Wait for `_wake_next` to take a place for this task."""
        place = asyncio.get_running_loop().create_future()
        held.waiters.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled():  # it has been given all the same
                held.answers -= 1
            self._wake_next(held)
            raise

    def _is_full(self, held: _Held) -> bool:
        # As many again as run: enough that memory never stays unused.
        return held.answers >= 2 * self._max_running or held.tokens >= self._limits.max_queued_tokens

    def _wake_next(self, held: _Held) -> None:
        while held.waiters and not self._is_full(held):
            place = held.waiters.popleft()
            if not place.done():  # its task may be cancelled
                held.answers += 1  # at once: whoever comes before the task runs finds it taken
                place.set_result(None)

    def _check_open(self) -> None:
        if self._engine.broken:
            raise HttpError(
                503, "the engine is out of order; restart the server", "engine_broken", self.retry_after
            )
        if self.is_closing:
            raise HttpError(503, "the server is shutting down", "shutting_down", self.retry_after)


def _total(requests: Sequence[Request]) -> tuple[int, int]:
    """Answers that requests get, and tokens of the prompts of all of them."""
    return (
        sum(request.params.n for request in requests),
        sum(request.params.n * len(request.prompt_token_ids) for request in requests),
    )
