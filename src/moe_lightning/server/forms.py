"""Compiles forms of answers beside the event loop, a bounded number at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from time import monotonic
from typing import Any

from moe_lightning.engine.structured import StructuredOutputsParams
from moe_lightning.server.errors import HttpError
from moe_lightning.server.limits import Limits

_THREADS = 2
_Job = Future[Exception | None]


class FormCompiler:
    """Threads that compile; for the event loop's thread.

    A compilation cannot be stopped. One that takes too long goes on, but nobody waits for it any more, it is not
    begun a second time, and while all threads have such ones, other forms are refused at once.

    Args:
        compile_form: makes a form ready; may raise RequestError.
        limits: how long a form may take, and how many there may be.
        retry_after: gives the seconds after which a form that is refused may find a place.
    """

    def __init__(
        self,
        compile_form: Callable[[StructuredOutputsParams], None],
        limits: Limits,
        retry_after: Callable[[], int],
    ) -> None:
        self._compile_form, self._limits, self._retry_after = compile_form, limits, retry_after
        # For threads of their own: one form may take as long as thousands of prompts.
        self._queue: SimpleQueue[tuple[_Job, StructuredOutputsParams] | None] = SimpleQueue()
        self._threads: list[Thread] = []
        self._jobs: dict[tuple[str, Any], _Job] = {}
        self._began: dict[
            tuple[str, Any], float
        ] = {}  # seconds of a clock, of those that threads have taken up
        self._late: set[_Job] = set()
        self._background = asyncio.Semaphore(1)  # the other thread is for those whom somebody waits for
        self._last: _Job | None = None  # of the background

    async def prepare(self, form: StructuredOutputsParams, *, is_background: bool = False) -> None:
        """Make a form ready.

        Raises:
            RequestError: it cannot be used.
            HttpError: it takes too long, or too many others do.
        """
        if is_background:
            async with self._background:
                if self._last and not self._last.done():
                    raise self._busy()
                try:
                    return await self.prepare(form)
                finally:
                    self._last = self._jobs.get(form.key)
        job, seconds = self._job(form), self._limits.form_seconds
        if job not in self._late:
            await asyncio.wait({asyncio.wrap_future(job)}, timeout=seconds)
        if job.cancelled() or job.cancel():  # it has not begun
            raise self._busy()
        if not job.done():
            if monotonic() - self._began.get(form.key, monotonic()) < seconds / 2:
                raise self._busy()  # most of the time it waited for a thread
            self._late.add(job)
            raise HttpError(
                400, f"the form of the answer was not compiled within {seconds:g} s; give a simpler one"
            )
        if error := job.result():
            raise error

    def _job(self, form: StructuredOutputsParams) -> _Job:
        self._jobs = {key: job for key, job in self._jobs.items() if not job.done()}
        self._late.intersection_update(self._jobs.values())
        job = self._jobs.get(form.key)
        if job is None:
            if len(self._late) >= _THREADS or len(self._jobs) >= self._limits.max_forms:
                raise self._busy()
            job = self._jobs[form.key] = Future()
            self._start()
            self._queue.put((job, form))
        return job

    def _start(self) -> None:
        """Begin, if there was no form yet. Nobody waits for these threads when the process ends."""
        while len(self._threads) < _THREADS:
            name = f"compile_{len(self._threads)}"
            self._threads.append(Thread(target=self._work, name=name, daemon=True))
            self._threads[-1].start()

    def _work(self) -> None:
        while (taken := self._queue.get()) is not None:
            job, form = taken
            if job.set_running_or_notify_cancel():
                job.set_result(self._compiled(form))

    def _compiled(self, form: StructuredOutputsParams) -> Exception | None:
        self._began[form.key] = monotonic()
        try:
            self._limits.check_form(form)
            self._compile_form(form)
        except Exception as error:  # for those who still wait
            return error
        finally:
            del self._began[form.key]
        return None

    def _busy(self) -> HttpError:
        message = "too many forms are being compiled; send it again later"
        return HttpError(503, message, "busy", self._retry_after())

    def close(self) -> None:
        """Let go of the threads; what they have not begun is not compiled."""
        for job in self._jobs.values():
            job.cancel()
        for _ in self._threads:
            self._queue.put(None)
