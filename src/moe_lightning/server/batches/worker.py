"""All open batches, each brought to its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from moe_lightning.errors import JobError
from moe_lightning.server.batch_limits import BatchLimits
from moe_lightning.server.batches import transitions
from moe_lightning.server.batches.objects import Batch, BatchRecord
from moe_lightning.server.batches.open_batch import Answer, Early, OpenBatch, Workshop
from moe_lightning.server.batches.room import Room
from moe_lightning.server.batches.run import Tally
from moe_lightning.server.batches.shelf import Shelf
from moe_lightning.server.batches.threads import Lane
from moe_lightning.server.errors import HttpError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Load:
    """Batches that have not ended, those of them that wait for the disk, and lines of theirs."""

    open_batches: int = 0
    waiting_batches: int = 0
    requests_in_flight: int = 0
    completed_requests: int = 0
    failed_requests: int = 0


class BatchWorker:
    """Brings batches to their end, the oldest first.

    Lines of the next batch are taken once all of the one before are in flight, so that no place stays empty.
    """

    def __init__(
        self, shelf: Shelf, records: Lane, answer: Answer, limits: BatchLimits, clock: Callable[[], float]
    ) -> None:
        room = Room(limits.requests_in_flight, limits.bytes_in_flight)
        files = Lane("batch-files")
        self._shop = Workshop(
            shelf, records, files, answer, limits, clock, room, asyncio.Lock(), asyncio.Lock()
        )
        self._open: dict[str, OpenBatch] = {}
        self._expires_at: dict[str, int] = {}
        self._saved: dict[str, Tally] = {}  # what the database knows
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, record: BatchRecord) -> None:
        """Take a batch on."""
        batch = self._open[record.batch.id] = OpenBatch(self._shop, record)
        self._expires_at[batch.id] = record.batch.expires_at
        if self._shop.clock() >= record.batch.expires_at:  # while no server ran
            batch.end_early("expired")
        task = asyncio.create_task(self._bring_to_end(batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _bring_to_end(self, batch: OpenBatch) -> None:
        if await batch.bring_to_end():
            for held in (self._open, self._expires_at, self._saved):
                held.pop(batch.id, None)

    def end_early(self, batch_id: str, reason: Early) -> None:
        """Give up what is not answered yet of a batch."""
        if (batch := self._open.get(batch_id)) is not None:
            batch.end_early(reason)

    def live(self, record: BatchRecord) -> Batch:
        """The batch with what is not in its record yet."""
        batch = self._open.get(record.batch.id)
        if batch is None or not record.is_open:
            return record.batch
        if batch.run.is_read:
            record = transitions.with_tally(batch.run.tally)(record)
        return (
            record.batch if batch.problem is None else transitions.with_problem(record.batch, batch.problem)
        )

    async def tick(self) -> None:
        """End what has expired, make old lines durable, write down how far batches are."""
        now = self._shop.clock()
        for batch in list(self._open.values()):
            if batch.id not in self._open:  # it has ended since
                continue
            if now >= self._expires_at[batch.id]:
                batch.end_early("expired")
            try:
                await self._shop.files.do(batch.run.sync_if_due)
                await self._save(batch)
            except (JobError, HttpError, OSError) as e:  # whoever has more to write says it to the client
                logger.warning("batch %s: %s", batch.id, e)

    async def _save(self, batch: OpenBatch) -> None:
        tally = batch.run.tally
        if batch.run.is_read and tally != self._saved.get(batch.id):
            edit = transitions.with_tally(tally)
            await self._shop.records.do(self._shop.shelf.store.change, batch.id, edit)
            if batch.id in self._open:
                self._saved[batch.id] = tally

    def load(self) -> Load:
        """What is at work now; may be asked by any thread."""
        batches = list(self._open.values())
        tallies = [batch.run.tally for batch in batches]
        return Load(
            len(batches),
            sum(batch.problem is not None for batch in batches),
            self._shop.room.requests,
            sum(tally.completed for tally in tallies),
            sum(tally.failed for tally in tallies),
        )

    async def stop(self) -> None:
        """Stop; what is not answered yet is for the next start."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for batch in self._open.values():
            try:
                await self._shop.files.do(batch.run.close)
            except JobError as e:
                logger.error("batch %s: %s", batch.id, e)
        await self._shop.files.close()
