"""One open batch at work: validated, answered, ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, ParamSpec, TypeVar

from moe_lightning.errors import JobError
from moe_lightning.jobs.lines import BadLine, Envelope
from moe_lightning.server.batch_limits import BatchLimits
from moe_lightning.server.batches import transitions
from moe_lightning.server.batches.errors import StorageDamaged, StorageFull
from moe_lightning.server.batches.objects import BatchError, BatchRecord
from moe_lightning.server.batches.room import Room
from moe_lightning.server.batches.run import Run
from moe_lightning.server.batches.shelf import Shelf
from moe_lightning.server.batches.threads import Lane
from moe_lightning.server.batches.validation import judge

Answer = Callable[[str, dict[str, Any], str], Awaitable[tuple[int, dict[str, Any]]]]
Early = Literal["cancelled", "expired"]
_CHUNK = 64
_LATER = (429, 503)
_REASONS = {
    "cancelled": ("batch_cancelled", "the batch was cancelled before this request was answered"),
    "expired": ("batch_expired", "the completion window ended before this request was answered"),
}
_P = ParamSpec("_P")
_R = TypeVar("_R")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workshop:
    """What open batches share.

    `records` and `files` are the threads for the database and for outputs. One batch at a time holds `validating`,
    one `feeding`, each the one that came first.
    """

    shelf: Shelf
    records: Lane
    files: Lane
    answer: Answer
    limits: BatchLimits
    clock: Callable[[], float]
    room: Room
    validating: asyncio.Lock
    feeding: asyncio.Lock


class OpenBatch:
    """A batch that has not ended.

    Attributes:
        id: the batch's.
        run: its files.
        problem: what it waits for, in words.
    """

    def __init__(self, shop: Workshop, record: BatchRecord) -> None:
        batch = record.batch
        self.id = batch.id
        content = shop.shelf.disk.content
        answers, failures = content(record.answers_id), content(record.failures_id)
        self.run = Run(content(batch.input_file_id), answers, failures, record.rules)
        self.problem: str | None = None
        self._shop = shop
        self._ending: Early | None = "cancelled" if batch.status == "cancelling" else None
        self._work: asyncio.Task[None] | None = None
        self._has_turn = False

    def end_early(self, reason: Early) -> None:
        """Give up what is not answered yet."""
        if self._ending is None:
            self._ending = reason
            if self._work is not None:
                self._work.cancel()

    async def bring_to_end(self) -> bool:
        """Do what is left to do; False if the server is to be started again for it."""
        try:
            try:
                await self._all_steps()
            except StorageDamaged as e:
                logger.exception("batch %s", self.id)
                await self._fail(BatchError(code="storage_damaged", message=e.message))
            except OSError as e:
                logger.exception("batch %s", self.id)
                message = f"a file of the batch cannot be read ({e.strerror})"
                await self._fail(BatchError(code="unreadable_file", message=message))
        except Exception:
            # What is done is written, and the next start goes on from there.
            logger.exception("batch %s stands still; it goes on when the server is started again", self.id)
            self.problem = "the server failed at this batch; it goes on when the server is started again"
            return False
        finally:
            self._pass_turn()
        return True

    async def _all_steps(self) -> None:
        shop = self._shop
        async with shop.validating:
            is_valid = await self._validate()
        if not is_valid:
            return
        is_next = await self._until_ended(self._take_turn())
        await self._persist(shop.files, self.run.open)
        if is_next and await self._until_ended(self._answer_all()):
            await self._change(transitions.finalizing(shop.clock()))
            await self._close("completed")
            return
        assert self._ending is not None
        await self._persist(shop.files, self.run.refuse_rest, *_REASONS[self._ending])
        await self._close(self._ending)

    async def _validate(self) -> bool:
        """Whether the batch may begin; if not, it has failed."""
        record = await self._record()
        if record.batch.status != "validating":
            return True
        path = self._shop.shelf.disk.content(record.batch.input_file_id)
        verdict = await asyncio.to_thread(judge, path, record.rules, self._shop.limits.requests)
        if verdict.errors and self._ending is None:
            await self._fail(*verdict.errors)
            return False
        await self._change(transitions.in_progress(self._shop.clock(), verdict.num_lines))
        return True

    async def _take_turn(self) -> None:
        await self._shop.feeding.acquire()
        self._has_turn = True

    def _pass_turn(self) -> None:
        if self._has_turn:
            self._has_turn = False
            self._shop.feeding.release()

    async def _until_ended(self, work: Coroutine[Any, Any, None]) -> bool:
        """Whether the work is done; False if the batch is ended before."""
        if self._ending is not None:
            work.close()
            return False
        self._work = asyncio.ensure_future(work)
        try:
            await self._work
        except asyncio.CancelledError:
            if self._ending is None or _is_cancelled():
                raise
            return False
        except ExceptionGroup as group:  # the first is why the others were given up
            raise group.exceptions[0] from group
        finally:
            self._work = None
        return True

    async def _answer_all(self) -> None:
        files, run = self._shop.files, self.run
        lines = run.lines()
        async with asyncio.TaskGroup() as group:
            while chunk := await asyncio.to_thread(_next, lines):
                for line in chunk:
                    if isinstance(line, BadLine):
                        await self._persist(files, run.refuse, line, line.code, line.message)
                    else:
                        await self._shop.room.take(line.size)
                        group.create_task(self._answer_line(line))
            self._pass_turn()  # the next batch fills the places that this one leaves

    async def _answer_line(self, line: Envelope) -> None:
        files, run = self._shop.files, self.run
        try:
            request_id = transitions.request_id(self.id, line.line_id)
            status, body = await self._asked(line, request_id)
            try:
                await self._persist(files, run.answer, line, status, request_id, body)
            except (ValueError, TypeError, RecursionError):
                logger.exception("the answer to request %s is no JSON", request_id)
                message = f"line {line.number}: the server failed at this request"
                await self._persist(files, run.refuse, line, "internal_error", message)
        finally:
            self._shop.room.give(line.size)

    async def _asked(self, line: Envelope, request_id: str) -> tuple[int, dict[str, Any]]:
        """What came back; what the engine cannot take now is asked again, what it gives up on some times."""
        num_aborts = 0
        while True:
            try:
                status, body = await self._shop.answer(line.url, line.body, request_id)
            except asyncio.CancelledError:
                if _is_cancelled():
                    raise
                status, body = 503, {}  # the engine gave up on it: it may be stopping
            except Exception:
                logger.exception("request %s", request_id)
                error = {"code": "internal_error", "message": "the server failed at this request"}
                return 500, {"error": error}
            num_aborts += _is_abort(body)
            if status not in _LATER or num_aborts >= self._shop.limits.aborts:
                return status, body
            await asyncio.sleep(self._shop.limits.retry_seconds)

    async def _fail(self, *errors: BatchError) -> None:
        await self._close("failed", errors)

    async def _close(self, status: transitions.Ending, errors: tuple[BatchError, ...] = ()) -> None:
        """Write the end down, and the files at once."""
        shop = self._shop
        sizes = await self._persist(shop.files, self.run.finish)
        now = shop.clock()
        files = transitions.output_files(await self._record(), sizes, now)
        ended = transitions.ended(status, now, files, self.run.tally, errors)
        await self._persist(shop.records, shop.shelf.store.change, self.id, ended, files)
        await shop.files.do(self.run.close)

    async def _record(self) -> BatchRecord:
        record = await self._persist(self._shop.records, self._shop.shelf.store.batch, self.id)
        assert record is not None, "open batches are kept"
        return record

    async def _change(self, edit: transitions.Edit) -> None:
        await self._persist(self._shop.records, self._shop.shelf.store.change, self.id, edit)

    async def _persist(
        self, lane: Lane, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> _R:
        """What the function gives, tried until the disk has room for what it writes."""
        while True:
            try:
                result = await lane.do(function, *args, **kwargs)
            except (JobError, StorageFull) as e:
                if self.problem is None:
                    logger.error("batch %s waits: %s", self.id, e)
                reason = e.__cause__.strerror if isinstance(e.__cause__, OSError) else None  # names no path
                self.problem = (
                    f"the server's disk takes nothing more ({reason}); it goes on once there is room"
                )
            else:
                self.problem = None
                return result
            await asyncio.sleep(self._shop.limits.retry_seconds)


def _next(lines: Iterator[Envelope | BadLine]) -> list[Envelope | BadLine]:
    return list(islice(lines, _CHUNK))


def _is_abort(body: dict[str, Any]) -> bool:
    """A pass with the request failed: that may be the request's own fault."""
    error = body.get("error")
    return isinstance(error, dict) and error.get("code") == "aborted"


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
