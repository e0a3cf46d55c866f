"""What becomes of a batch's record, step by step; times are Unix seconds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Literal

from moe_lightning.server.batches.objects import (
    Batch,
    BatchError,
    BatchRecord,
    Errors,
    FileObject,
    RequestCounts,
    Usage,
)
from moe_lightning.server.batches.run import Tally
from moe_lightning.server.errors import HttpError

Edit = Callable[[BatchRecord], BatchRecord]
Ending = Literal["completed", "failed", "expired", "cancelled"]


def request_id(batch_id: str, line_id: str) -> str:
    """The same for a line whenever its batch is resumed, and another one in each batch."""
    return f"req_{hashlib.sha256(f'{batch_id} {line_id}'.encode()).hexdigest()[:32]}"


def in_progress(now: float, num_lines: int) -> Edit:
    """Its input is read; a batch that is being cancelled stays so."""

    def edit(record: BatchRecord) -> BatchRecord:
        changes: dict[str, Any] = {"request_counts": RequestCounts(total=num_lines)}
        if record.batch.status == "validating":
            changes |= {"status": "in_progress", "in_progress_at": int(now)}
        return _changed(record, **changes)

    return edit


def cancelling(now: float) -> Edit:
    """Its client gives it up; once more changes nothing.

    Raises:
        HttpError: by the edit: there is nothing left to give up.
    """

    def edit(record: BatchRecord) -> BatchRecord:
        status = record.batch.status
        if status == "cancelling":
            return record
        if status not in ("validating", "in_progress"):
            message = f"the batch is {status}; only one that is validating or in progress can be cancelled"
            raise HttpError(400, message, "not_cancellable")
        return _changed(record, status="cancelling", cancelling_at=int(now))

    return edit


def finalizing(now: float) -> Edit:
    """All lines are done; a batch that is being cancelled stays so."""

    def edit(record: BatchRecord) -> BatchRecord:
        if record.batch.status != "in_progress":
            return record
        return _changed(record, status="finalizing", finalizing_at=int(now))

    return edit


def ended(
    status: Ending, now: float, files: list[FileObject], tally: Tally, errors: tuple[BatchError, ...]
) -> Edit:
    """It has ended; one that was being cancelled ends as cancelled, whatever came of it."""

    def edit(record: BatchRecord) -> BatchRecord:
        end = "cancelled" if record.batch.status == "cancelling" and status != "failed" else status
        ids = {file.id for file in files}
        return _changed(
            with_tally(tally)(record),
            status=end,
            errors=Errors(data=errors) if errors else None,
            output_file_id=record.answers_id if record.answers_id in ids else None,
            error_file_id=record.failures_id if record.failures_id in ids else None,
            **{f"{end}_at": int(now)},
        )

    return edit


def with_tally(tally: Tally) -> Edit:
    """With what is done by now; lines of a batch that has ended do not change any more."""

    def edit(record: BatchRecord) -> BatchRecord:
        if not record.is_open:
            return record
        batch = record.batch
        total = max(batch.request_counts.total, tally.completed + tally.failed)
        read, written = tally.input_tokens, tally.output_tokens
        return _changed(
            record,
            model=tally.model or batch.model,
            request_counts=RequestCounts(total=total, completed=tally.completed, failed=tally.failed),
            usage=Usage(input_tokens=read, output_tokens=written, total_tokens=read + written),
        )

    return edit


def with_problem(batch: Batch, problem: str) -> Batch:
    """With what it waits for."""
    error = BatchError(code="waiting", message=problem)
    return batch.model_copy(update={"errors": Errors(data=(error,))})


def output_files(record: BatchRecord, sizes: tuple[int | None, int | None], now: float) -> list[FileObject]:
    """Those of a batch that has ended, for answers and failures of these bytes, None where there are none."""
    number = record.batch.id.removeprefix("batch_")
    names = (
        (record.answers_id, f"batch_{number}_output.jsonl"),
        (record.failures_id, f"batch_{number}_error.jsonl"),
    )
    expires_at = None if record.keep_seconds is None else int(now) + record.keep_seconds
    return [
        FileObject(
            id=file_id,
            bytes=size,
            created_at=int(now),
            expires_at=expires_at,
            filename=name,
            purpose="batch_output",
        )
        for (file_id, name), size in zip(names, sizes, strict=True)
        if size is not None
    ]


def _changed(record: BatchRecord, **changes: Any) -> BatchRecord:
    return record.model_copy(update={"batch": record.batch.model_copy(update=changes)})
