"""The batch service: what clients do with batches, and the work on them between start and stop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter

from moe_lightning.server.batch_limits import BatchLimits
from moe_lightning.server.batches import transitions
from moe_lightning.server.batches.disk import is_batch_id, new_batch_id, new_file_id
from moe_lightning.server.batches.files import Files
from moe_lightning.server.batches.objects import Batch, BatchRecord, CreateBatch, Page, page
from moe_lightning.server.batches.open_batch import Answer
from moe_lightning.server.batches.routes import make_router
from moe_lightning.server.batches.shelf import Shelf, missing
from moe_lightning.server.batches.threads import Lane
from moe_lightning.server.batches.worker import BatchWorker, Load
from moe_lightning.server.errors import HttpError

_STARTING_SECONDS = 5
_DEFAULTS = BatchLimits()
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Running:
    """What a service has between start and stop."""

    shelf: Shelf
    lane: Lane
    files: Files
    worker: BatchWorker
    ticking: asyncio.Task[None]


class BatchService:
    """OpenAI's Files and Batches in one directory, which no other process may use.

    Everything that a client was told is on disk: after SIGKILL `start` goes on where the last one was.

    Args:
        directory: where files and the database lie; made if it is missing.
        answer: (url, body, request id) -> (status, response body), as background work. Cancelling it gives the
            request up. 429 and 503 say that the same request is to be made again later, every other status but
            200 that it has failed.
        limits: what clients may store and ask for.
        clock: Unix seconds.
    """

    def __init__(
        self,
        directory: Path,
        answer: Answer,
        limits: BatchLimits = _DEFAULTS,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.limits = limits
        self._directory, self._answer, self._clock = directory, answer, clock
        self._running: _Running | None = None

    @staticmethod
    def check(directory: Path) -> None:
        """Find out in time whether a service could start.

        Raises:
            JobError: as `start`.
        """
        Shelf(directory).close()

    async def start(self) -> None:
        """Open the directory and go on with the batches in it.

        Raises:
            JobError: the directory or its database cannot be used; the message says what to do.
        """
        assert self._running is None, "started twice"
        lane = Lane("batch-records")
        try:
            shelf = await lane.do(Shelf, self._directory)
        except BaseException:
            await lane.close()
            raise
        worker = BatchWorker(shelf, lane, self._answer, self.limits, self._clock)
        for record in await lane.do(shelf.store.open_batches):
            worker.begin(record)
        ticking = asyncio.create_task(self._tick(shelf, lane, worker))
        files = Files(shelf, lane, self.limits, self._clock)
        self._running = _Running(shelf, lane, files, worker, ticking)

    async def stop(self) -> None:
        """Stop and let go of the directory; what is not done yet is for the next start."""
        running, self._running = self._running, None
        if running is None:
            return
        running.ticking.cancel()
        await asyncio.gather(running.ticking, return_exceptions=True)
        await running.worker.stop()
        await running.lane.do(running.shelf.close)
        await running.lane.close()

    def router(self) -> APIRouter:
        """The routes /v1/files and /v1/batches."""
        return make_router(self)

    def load(self) -> Load:
        """What is at work now; may be asked by any thread."""
        return Load() if self._running is None else self._running.worker.load()

    @property
    def files(self) -> Files:
        """What clients do with files.

        Raises:
            HttpError: the service is not running.
        """
        return self._at_work().files

    async def create(self, wanted: CreateBatch) -> Batch:
        """Begin a batch.

        Raises:
            HttpError: there is no such file, too many batches are open, or the window is too long.
        """
        at, now = self._at_work(), int(self._clock())
        if wanted.window_hours > self.limits.window_hours:
            message = f"completion_window: give {self.limits.window_hours}h at most"
            raise HttpError(400, message, "invalid_value")
        batch = Batch(
            id=new_batch_id(),
            endpoint=wanted.endpoint,
            input_file_id=(await at.files.get(wanted.input_file_id)).id,
            completion_window=wanted.completion_window,
            created_at=now,
            expires_at=now + 3600 * wanted.window_hours,
            metadata=wanted.metadata,
        )
        keep = None if wanted.output_expires_after is None else wanted.output_expires_after.seconds
        record = BatchRecord(
            batch=batch,
            answers_id=new_file_id(),
            failures_id=new_file_id(),
            keep_seconds=keep,
            line_bytes=self.limits.line_bytes,
            body_depth=self.limits.body_depth,
        )
        # Shielded: a batch that is written down is begun, though its client may have gone.
        await asyncio.shield(self._begin(at, record))
        return batch

    async def _begin(self, at: _Running, record: BatchRecord) -> None:
        await at.lane.do(at.shelf.add_batch, record, self.limits)
        at.worker.begin(record)

    async def get(self, batch_id: str) -> Batch:
        """One batch as it is now.

        Raises:
            HttpError: there is none of that id.
        """
        at = self._at_work()
        found = await at.lane.do(at.shelf.store.batch, batch_id) if is_batch_id(batch_id) else None
        if found is None:
            raise missing("batch", batch_id)
        return at.worker.live(found)

    async def list(self, after: str | None, limit: int) -> Page[Batch]:
        """A part of the list of batches, the newest first.

        Raises:
            HttpError: there is no batch called `after`.
        """
        at = self._at_work()
        if after is not None:
            await self.get(after)
        found, has_more = await at.lane.do(at.shelf.store.batches, after, limit)
        return page([at.worker.live(record) for record in found], has_more=has_more)

    async def cancel(self, batch_id: str) -> Batch:
        """Give a batch up; what is answered by now stays.

        Raises:
            HttpError: there is none of that id, or it has ended.
        """
        at = self._at_work()
        await self.get(batch_id)
        return await asyncio.shield(self._cancel(at, batch_id))

    async def _cancel(self, at: _Running, batch_id: str) -> Batch:
        record = await at.lane.do(at.shelf.store.change, batch_id, transitions.cancelling(self._clock()))
        at.worker.end_early(batch_id, "cancelled")
        return at.worker.live(record)

    async def _tick(self, shelf: Shelf, lane: Lane, worker: BatchWorker) -> None:
        while True:
            await asyncio.sleep(self.limits.tick_seconds)
            try:
                await worker.tick()
                await lane.do(shelf.delete_expired, self._clock())
            except Exception:
                logger.exception("looking after batches; the next look is in %g s", self.limits.tick_seconds)

    def _at_work(self) -> _Running:
        if self._running is None:
            raise HttpError(
                503, "batches are not available now; try again later", "not_running", _STARTING_SECONDS
            )
        return self._running
