"""The engine in a thread of its own: requests in, updates out, one hand-over per pass."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from moe_lightning.engine.engine import Engine
from moe_lightning.engine.pieces import Piece, Pieces
from moe_lightning.engine.request import CompletionOutput, Request, RequestOutput
from moe_lightning.errors import DeviceError

_log = logging.getLogger(__name__)
_FAILURES = 3  # passes in a row that may fail before the engine counts as broken
# How long an idle engine waits for more requests that come with the first.
_SILENCE_S = 0.05  # after which nobody comes any more of whom the event loop does not know
_ROUNDS = 8  # of the event loop, in which a connection that it has taken becomes a request
_LONGEST_WAIT_S = 1.0
_SHARE_OF_PASS = 0.1


@dataclass(frozen=True)
class Update:
    """News of one request: pieces of its answers if it streams, and whether `output` is its end."""

    output: RequestOutput
    pieces: list[Piece]


Deliver = Callable[[Update], None]


@dataclass(frozen=True)
class Ticket:
    """A request with what is to be called, on the event loop, when there is news of it."""

    request: Request
    deliver: Deliver
    is_stream: bool = False


OnChange = Callable[[float | None], None]
_Command = Callable[[], None]


class EngineThread:
    """Runs passes as long as there is work; all of the engine's methods are called in its thread.

    Requests join and leave between passes. All news of a pass goes to the event loop in one call. Whatever goes
    wrong outside of a pass breaks the engine: all requests end, and so do those that still come.

    Args:
        engine: what runs the passes; nobody else may use it.
        on_change: called in the thread after each pass with the seconds it took, and with None after other changes.
    """

    def __init__(self, engine: Engine, on_change: OnChange = lambda seconds: None) -> None:
        self._engine = engine
        self._on_change = on_change
        self._commands: SimpleQueue[_Command] = SimpleQueue()
        self._tickets: dict[str, Ticket] = {}
        self._pieces: dict[str, Pieces] = {}  # of the requests that stream
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._is_stopped = False
        self._num_added = 0
        self._failures = 0
        self._broken: str | None = None
        self._longest_pass_s = math.inf  # so far; passes that nobody has seen may take any time

    @property
    def broken(self) -> str | None:
        """Why nothing runs any more; None as long as all is well."""
        was_started = self._thread.ident is not None
        if self._broken is None and was_started and not self._is_stopped and not self._thread.is_alive():
            return "the engine's thread has ended"
        return self._broken

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin; news goes to this loop."""
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """End after the pass that runs; what is unfinished gets no more news."""
        self._commands.put(self._stop)
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, tickets: list[Ticket]) -> None:
        """Let requests join the next pass."""
        self._commands.put(lambda: self._add(tickets))

    def abort(self, request_ids: list[str]) -> None:
        """Let requests leave before the next pass; there will be no more news of them."""
        self._commands.put(lambda: self._abort(request_ids))

    def abort_all(self) -> None:
        """End all requests; each gets an update that says so."""
        self._commands.put(self._end_all)

    def call(self, function: _Command) -> None:
        """Run a function between two passes."""
        self._commands.put(function)

    def _run(self) -> None:
        while not self._is_stopped:
            try:
                self._obey()
                if self._has_work and not self._is_stopped:
                    self._pass()
            except BaseException as error:  # a thread that ends leaves everybody waiting for ever
                self._break(error)

    @property
    def _has_work(self) -> bool:
        return self._broken is None and self._engine.num_unfinished > 0

    def _obey(self) -> None:
        """All commands there are; waits for some if there is nothing else to do."""
        was_idle = not self._has_work
        with suppress(Empty):
            while True:
                self._commands.get(block=not self._has_work and not self._is_stopped)()
        if was_idle:
            self._gather()

    def _gather(self) -> None:
        """Let those join who come with the first: a pass takes about as long for one as for many.

        Without that the first of many would have a pass of its own, and all others end one pass later.
        """
        until = time.monotonic() + min(_LONGEST_WAIT_S, _SHARE_OF_PASS * self._longest_pass_s)
        while self._obeyed(min(_SILENCE_S, until - time.monotonic())) or self._loop_brought_some(until):
            pass

    @property
    def _has_room(self) -> bool:
        """There is work, and more may join it."""
        return self._has_work and not self._is_stopped and not self._engine.is_full

    def _obeyed(self, seconds: float) -> bool:
        """Wait so long for one more command while there is room; whether one came."""
        if not self._has_room:
            return False
        try:
            self._commands.get(timeout=max(seconds, 0.0))()
        except Empty:
            return False
        return True

    def _loop_brought_some(self, until: float) -> bool:
        """Wait until the event loop has done what it had to do; whether commands came of that.

        It takes in all of a burst before it hands over the first, which may take longer than any silence.
        """
        is_done = threading.Event()
        if not self._has_room or time.monotonic() >= until:
            return False
        if not self._call_loop(_go_round, _ROUNDS, lambda: self.call(is_done.set)):
            return False
        before = self._num_added
        while not is_done.is_set() and self._obeyed(until - time.monotonic()):
            pass
        return self._num_added > before

    def _stop(self) -> None:
        self._is_stopped = True

    def _add(self, tickets: list[Ticket]) -> None:
        self._num_added += len(tickets)
        self._tickets.update({ticket.request.request_id: ticket for ticket in tickets})
        if self._broken:
            self._give_up_all()
            return
        for ticket in tickets:
            request = ticket.request
            if ticket.is_stream:
                self._pieces[request.request_id] = Pieces(request.params)
            self._engine.add(request)

    def _abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._engine.abort(request_id)
            self._tickets.pop(request_id, None)
            self._pieces.pop(request_id, None)
        self._on_change(None)

    def _end_all(self) -> None:
        ended = [self._engine.abort(request_id) for request_id in list(self._tickets)]
        self._hand_over([output for output in ended if output is not None])
        self._on_change(None)

    def _pass(self) -> None:
        start = time.perf_counter()
        try:
            outputs = self._engine.step()
        except Exception as error:  # whatever it is, the server must answer
            self._fail(error)
            return
        self._failures = 0
        seconds = time.perf_counter() - start
        longest = self._longest_pass_s
        self._longest_pass_s = seconds if math.isinf(longest) else max(longest, seconds)
        self._on_change(seconds)  # before anybody hears of what it counts
        self._hand_over(outputs)

    def _fail(self, error: Exception) -> None:
        """End all requests, and for good if there is no hope."""
        self._failures += 1
        _log.exception("a pass failed; all requests in it end")
        if isinstance(error, DeviceError) or self._failures >= _FAILURES:
            self._broken = f"{type(error).__name__}: {error}"
        self._end_all()

    def _break(self, error: BaseException) -> None:
        """End all requests for good, by nothing that may fail once more."""
        _log.error("the engine is out of order; all requests end", exc_info=error)
        self._broken = f"{type(error).__name__}: {error}"
        self._give_up_all()

    def _give_up_all(self) -> None:
        tickets, self._tickets, self._pieces = self._tickets, {}, {}
        for request_id in tickets:
            with suppress(Exception):  # its state may be anything
                self._engine.abort(request_id)
        self._send([(ticket.deliver, Update(_nothing(ticket.request), [])) for ticket in tickets.values()])

    def _hand_over(self, outputs: list[RequestOutput]) -> None:
        news = []
        for output in outputs:
            pieces = self._pieces.pop(output.request_id, None)
            ticket = self._tickets[output.request_id]
            news.append((ticket.deliver, Update(output, pieces.take(output) if pieces else [])))
        for request_id in self._engine.advanced:
            pieces = self._pieces.get(request_id)
            so_far = self._engine.peek(request_id) if pieces else None
            if pieces and so_far and (new := pieces.take(so_far)):
                news.append((self._tickets[request_id].deliver, Update(so_far, new)))
        self._send(news)
        for output in outputs:  # not before they have been told
            del self._tickets[output.request_id]

    def _send(self, news: list[tuple[Deliver, Update]]) -> None:
        if news:
            self._call_loop(_deliver, news)

    def _call_loop(self, function: Callable[..., None], *arguments: object) -> bool:
        """Have the event loop call something; whether there is one."""
        if self._loop is None:
            return False
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # it is closed: nobody waits any more
            _log.debug("a closed loop was to call %s", function)
            return False
        return True


def _nothing(request: Request) -> RequestOutput:
    """What a request gets of which the engine knows nothing any more."""
    answers = [
        CompletionOutput(index=i, text="", token_ids=(), finish_reason="abort")
        for i in range(request.params.n)
    ]
    return RequestOutput(request.request_id, request.prompt, request.prompt_token_ids, answers, finished=True)


def _deliver(news: list[tuple[Deliver, Update]]) -> None:
    for deliver, update in news:
        deliver(update)


def _go_round(rounds: int, then: _Command) -> None:
    """Let the event loop go round so many times, then call something."""
    if rounds:
        asyncio.get_running_loop().call_soon(_go_round, rounds - 1, then)
    else:
        then()
