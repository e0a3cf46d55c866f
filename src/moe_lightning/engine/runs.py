"""Several runs over one engine, each of which gets its own outputs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from moe_lightning.engine.engine import Engine
from moe_lightning.engine.request import PassStats, Request, RequestOutput

OnPass = Callable[[PassStats], None]


class _Run:
    """What one run waits for, and its outputs that it has not handed out yet."""

    def __init__(self) -> None:
        self.pending: set[str] = set()
        self.finished: deque[RequestOutput] = deque()


class Runs:
    """Runs that share passes: whichever of them asks for more drives a pass for all.

    A run is an iterator that its user may leave alone for a while, or for good; what other runs' passes finish of
    it meanwhile is kept until it goes on.

    Args:
        engine: its passes; nobody else may call `step` while a run is under way.
        max_waiting: requests are taken from a source while fewer sequences than this wait.
    """

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self._engine = engine
        self._max_waiting = max_waiting
        self._run_of: dict[str, _Run] = {}  # of each unfinished request
        self._num_open = 0  # runs that may have more requests

    def run(self, requests: Iterable[Request], on_pass: OnPass | None = None) -> Iterator[RequestOutput]:
        """Outputs as requests finish; takes requests only as fast as they can be worked on.

        `on_pass` is called after each pass that this run drives. When the caller stops early, what is unfinished
        is dropped.
        """
        source, run, is_exhausted = iter(requests), _Run(), False
        measure = self._meter()
        self._open(1)
        try:
            while True:
                if not is_exhausted and (is_exhausted := self._fill(source, run)):
                    self._open(-1)
                if is_exhausted and not run.pending and not run.finished:
                    return
                if not run.finished:
                    self._step()
                    if on_pass:
                        on_pass(measure())
                while run.finished:
                    yield run.finished.popleft()
        finally:
            if not is_exhausted:
                self._open(-1)
            for request_id in run.pending:
                del self._run_of[request_id]
                self._engine.abort(request_id)

    def _open(self, more: int) -> None:
        self._num_open += more
        self._engine.expect_more(self._num_open > 0)

    def _fill(self, source: Iterator[Request], run: _Run) -> bool:
        """Queue requests while there is room; whether the source has no more."""
        while self._engine.num_waiting < self._max_waiting:
            request = next(source, None)
            if request is None:
                return True
            self._engine.add(request)
            self._run_of[request.request_id] = run
            run.pending.add(request.request_id)
        return False

    def _step(self) -> None:
        for output in self._engine.step():
            run = self._run_of.pop(output.request_id)
            run.pending.remove(output.request_id)
            run.finished.append(output)

    def _meter(self) -> Callable[[], PassStats]:
        """A function that gives the totals since now."""
        engine, start = self._engine, time.monotonic()
        prompt, generated = engine.num_prompt_tokens, engine.num_generated_tokens

        def measure() -> PassStats:
            return PassStats(
                num_running=engine.num_running,
                num_waiting=engine.num_waiting,
                prompt_tokens=engine.num_prompt_tokens - prompt,
                generated_tokens=engine.num_generated_tokens - generated,
                seconds=time.monotonic() - start,
            )

        return measure
