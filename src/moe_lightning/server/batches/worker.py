"""Open batches at work: validated, answered, ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, ParamSpec, TypeVar

from moe_lightning.errors import JobError, MoELightningError
from moe_lightning.jobs.lines import BadLine, Envelope
from moe_lightning.server.batches import transitions
from moe_lightning.server.batches.errors import StorageDamaged, StorageFull
from moe_lightning.server.batches.limits import BatchLimits
from moe_lightning.server.batches.objects import Batch, BatchError, BatchRecord
from moe_lightning.server.batches.room import Room
from moe_lightning.server.batches.run import Run, Tally
from moe_lightning.server.batches.shelf import Shelf
from moe_lightning.server.batches.threads import Lane
from moe_lightning.server.batches.validation import judge

Answer = Callable[[str, dict[str, Any], str], Awaitable[tuple[int, dict[str, Any]]]]
_CHUNK = 64
_LATER = (429, 503)
_REASONS = {
    "cancelled": ("batch_cancelled", "the batch was cancelled before this request was answered"),
    "expired": ("batch_expired", "the completion window ended before this request was answered"),
}
_P = ParamSpec("_P")
_R = TypeVar("_R")
logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Open:
    """A batch that has not ended.

    `ending` is why it is ended early; `work` is what that interrupts. `problem` is what it waits for.
    """

    id: str
    expires_at: int
    run: Run
    ending: Literal["cancelled", "expired"] | None = None
    work: asyncio.Task[Any] | None = None
    task: asyncio.Task[None] | None = None
    problem: str | None = None
    has_turn: bool = False
    saved: Tally | None = None


class BatchWorker:
    """Brings batches to their end, the oldest first.

    Lines of the next batch are taken once all of the one before are in flight, so that no place stays empty.
    """

    def __init__(
        self, shelf: Shelf, records: Lane, answer: Answer, limits: BatchLimits, clock: Callable[[], float]
    ) -> None:
        self._store, self._disk, self._records = shelf.store, shelf.disk, records
        self._answer, self._limits, self._clock = answer, limits, clock
        self._files = Lane("batch-files")
        self._open: dict[str, _Open] = {}
        self._validating, self._feeding = asyncio.Lock(), asyncio.Lock()  # first come, first served
        self._room = Room(limits.requests_in_flight, limits.bytes_in_flight)

    def begin(self, record: BatchRecord) -> None:
        """Take a batch on."""
        batch = record.batch
        content = self._disk.content
        answers, failures = content(record.answers_id), content(record.failures_id)
        run = Run(content(batch.input_file_id), answers, failures, self._limits.rules(batch.endpoint))
        job = self._open[batch.id] = _Open(batch.id, batch.expires_at, run)
        job.ending = "cancelled" if batch.status == "cancelling" else None
        job.task = asyncio.create_task(self._bring_to_end(job))

    def end(self, batch_id: str, reason: Literal["cancelled", "expired"]) -> None:
        """Give up what is not answered yet."""
        job = self._open.get(batch_id)
        if job is not None and job.ending is None:
            job.ending = reason
            if job.work is not None:
                job.work.cancel()

    def live(self, record: BatchRecord) -> Batch:
        """The batch with what is not in its record yet."""
        job = self._open.get(record.batch.id)
        if job is None or not record.is_open:
            return record.batch
        batch = (transitions.with_tally(job.run.tally)(record) if job.run.is_read else record).batch
        return batch if job.problem is None else transitions.with_problem(batch, job.problem)

    @property
    def requests_in_flight(self) -> int:
        """Bodies that are being answered."""
        return self._room.requests

    async def stop(self) -> None:
        """Stop; what is not answered yet is for the next start."""
        jobs = list(self._open.values())
        for job in jobs:
            if job.task is not None:
                job.task.cancel()
        await asyncio.gather(*(job.task for job in jobs if job.task is not None), return_exceptions=True)
        for job in jobs:
            try:
                await self._files.do(job.run.close)
            except JobError as e:
                logger.error("batch %s: %s", job.id, e)
        await self._files.close()

    async def tick(self) -> None:
        """End what has expired, make old lines durable, write down how far batches are."""
        for job in list(self._open.values()):
            if self._clock() >= job.expires_at:
                self.end(job.id, "expired")
            try:
                await self._files.do(job.run.sync_if_due)
                if job.run.is_read and job.run.tally != job.saved:
                    job.saved = tally = job.run.tally
                    await self._records.do(self._store.change, job.id, transitions.with_tally(tally))
            except (MoELightningError, OSError) as e:  # whoever has more to write says it to the client
                logger.warning("batch %s: %s", job.id, e)

    async def _bring_to_end(self, job: _Open) -> None:
        try:
            try:
                await self._work(job)
            except StorageDamaged as e:
                logger.exception("batch %s", job.id)
                await self._fail(job, (BatchError(code=e.code, message=str(e)),))
            except OSError as e:
                logger.exception("batch %s", job.id)
                message = f"a file of the batch cannot be read ({e.strerror})"
                await self._fail(job, (BatchError(code="unreadable_file", message=message),))
        except Exception:
            # What is done is written, and the next start goes on from there.
            logger.exception("batch %s stands still; it goes on when the server is started again", job.id)
            job.problem = "the server failed at this batch; it goes on when the server is started again"
        else:
            del self._open[job.id]
        finally:
            self._pass_turn(job)

    async def _work(self, job: _Open) -> None:
        async with self._validating:
            record = await self._validated(job)
        if record is None:
            return
        if await self._until_ended(job, self._take_turn(job)):
            await self._persist(job, self._files, job.run.open)
            if await self._until_ended(job, self._answer_all(job)):
                await self._persist(
                    job, self._records, self._store.change, job.id, transitions.finalizing(self._clock())
                )
        else:
            await self._persist(job, self._files, job.run.open)
        await self._finish(job)

    async def _validated(self, job: _Open) -> BatchRecord | None:
        """The batch, once it may begin; None if it has failed."""
        record = await self._persist(job, self._records, self._store.batch, job.id)
        assert record is not None
        batch = record.batch
        if batch.status != "validating":
            return record
        path = self._disk.content(batch.input_file_id)
        verdict = await asyncio.to_thread(judge, path, batch.endpoint, self._limits)
        if verdict.errors and job.ending is None:
            await self._fail(job, verdict.errors)
            return None
        begin = transitions.in_progress(self._clock(), verdict.num_lines)
        return await self._persist(job, self._records, self._store.change, job.id, begin)

    async def _take_turn(self, job: _Open) -> None:
        await self._feeding.acquire()
        job.has_turn = True

    def _pass_turn(self, job: _Open) -> None:
        if job.has_turn:
            job.has_turn = False
            self._feeding.release()

    async def _until_ended(self, job: _Open, work: Coroutine[Any, Any, None]) -> bool:
        """Whether the work is done; False if the batch is ended before."""
        if job.ending is not None:
            work.close()
            return False
        job.work = asyncio.ensure_future(work)
        try:
            await job.work
        except asyncio.CancelledError:
            if job.ending is None or _is_cancelled():
                raise
            return False
        except ExceptionGroup as group:  # the first is why the others were given up
            raise group.exceptions[0] from group
        finally:
            job.work = None
        return True

    async def _answer_all(self, job: _Open) -> None:
        lines = job.run.lines()
        async with asyncio.TaskGroup() as group:
            while chunk := await asyncio.to_thread(_next, lines):
                for line in chunk:
                    if isinstance(line, BadLine):
                        await self._persist(job, self._files, job.run.refuse, line, line.code, line.message)
                    else:
                        await self._room.take(line.size)
                        group.create_task(self._answer_line(job, line))
            self._pass_turn(job)

    async def _answer_line(self, job: _Open, line: Envelope) -> None:
        try:
            request_id = transitions.request_id(job.id, line.line_id)
            status, body = await self._asked(line, request_id)
            try:
                await self._persist(job, self._files, job.run.answer, line, status, request_id, body)
            except (ValueError, TypeError, RecursionError):
                logger.exception("the answer to request %s is no JSON", request_id)
                message = f"line {line.number}: the server failed at this request"
                await self._persist(job, self._files, job.run.refuse, line, "internal_error", message)
        finally:
            self._room.give(line.size)

    async def _asked(self, line: Envelope, request_id: str) -> tuple[int, dict[str, Any]]:
        """What came back; what the engine cannot take now is asked again."""
        while True:
            try:
                status, body = await self._answer(line.url, line.body, request_id)
            except asyncio.CancelledError:
                if _is_cancelled():
                    raise
                status, body = 503, {}  # the engine gave up on it: it may be stopping
            except Exception:
                logger.exception("request %s", request_id)
                return 500, {
                    "error": {"code": "internal_error", "message": "the server failed at this request"}
                }
            if status not in _LATER:
                return status, body
            await asyncio.sleep(self._limits.retry_seconds)

    async def _finish(self, job: _Open) -> None:
        if job.ending is not None:
            await self._persist(job, self._files, job.run.refuse_rest, *_REASONS[job.ending])
        sizes = await self._persist(job, self._files, job.run.finish)
        await self._close(job, job.ending or "completed", sizes)

    async def _fail(self, job: _Open, errors: tuple[BatchError, ...]) -> None:
        sizes = await self._persist(job, self._files, job.run.finish)
        await self._close(job, "failed", sizes, errors)

    async def _close(
        self,
        job: _Open,
        status: Literal["completed", "failed", "expired", "cancelled"],
        sizes: tuple[int | None, int | None],
        errors: tuple[BatchError, ...] = (),
    ) -> None:
        """Write the end down, with the files at once."""
        record = await self._persist(job, self._records, self._store.batch, job.id)
        assert record is not None
        now = self._clock()
        files = transitions.output_files(record, sizes, now)
        ended = transitions.ended(status, now, files, job.run.tally, errors)
        await self._persist(job, self._records, self._store.change, job.id, ended, files)
        await self._files.do(job.run.close)

    async def _persist(
        self, job: _Open, lane: Lane, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> _R:
        """What the function gives, tried until the disk has room for what it writes."""
        while True:
            try:
                result = await lane.do(function, *args, **kwargs)
            except (JobError, StorageFull) as e:
                if job.problem is None:
                    logger.error("batch %s waits: %s", job.id, e)
                reason = e.__cause__.strerror if isinstance(e.__cause__, OSError) else None  # names no path
                job.problem = (
                    f"the server's disk takes nothing more ({reason}); it goes on once there is room"
                )
            else:
                job.problem = None
                return result
            await asyncio.sleep(self._limits.retry_seconds)


def _next(lines: Iterator[Envelope | BadLine]) -> list[Envelope | BadLine]:
    return list(islice(lines, _CHUNK))


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
