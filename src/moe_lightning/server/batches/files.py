"""What clients do with files."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import BinaryIO, Literal

from moe_lightning.server.batch_limits import BatchLimits
from moe_lightning.server.batches.disk import is_file_id, new_file_id
from moe_lightning.server.batches.errors import StorageDamaged
from moe_lightning.server.batches.objects import MAX_EXPIRY, MIN_EXPIRY, FileObject, Page, page
from moe_lightning.server.batches.shelf import Shelf, missing
from moe_lightning.server.batches.threads import Lane
from moe_lightning.server.batches.uploads import receive
from moe_lightning.server.errors import HttpError

_BUSY_SECONDS = 5


class Files:
    """Uploads, lists, reads and deletes."""

    def __init__(self, shelf: Shelf, lane: Lane, limits: BatchLimits, clock: Callable[[], float]) -> None:
        self._shelf, self._lane, self._limits, self._clock = shelf, lane, limits, clock
        self._uploads = 0

    async def upload(self, stream: AsyncIterator[bytes], content_type: str) -> FileObject:
        """Take a file in.

        Raises:
            HttpError: the form is not right, or there is no room.
        """
        await self._lane.do(self._shelf.require_room, self._limits)
        if self._uploads >= self._limits.uploads:
            raise HttpError(429, "too many uploads at a time; try again later", "busy", _BUSY_SECONDS)
        self._uploads += 1
        file_id = new_file_id()
        try:
            upload = await receive(stream, content_type, self._shelf.disk.pending(file_id), self._limits)
            now = int(self._clock())
            file = FileObject(
                id=file_id,
                bytes=upload.num_bytes,
                created_at=now,
                expires_at=_expires_at(upload.fields, now),
                filename=upload.filename,
                purpose=_purpose(upload.fields),
            )
            # Shielded: a lane forgets what is cancelled before it begins, and what follows would come first.
            await asyncio.shield(self._lane.do(self._shelf.publish, file))
        finally:
            self._uploads -= 1
            await asyncio.shield(self._lane.do(self._shelf.disk.discard, file_id))
        return file

    async def get(self, file_id: str) -> FileObject:
        """One file.

        Raises:
            HttpError: there is none of that id.
        """
        found = await self._lane.do(self._shelf.store.file, file_id) if is_file_id(file_id) else None
        if found is None:
            raise missing("file", file_id)
        return found

    async def list(
        self, after: str | None, limit: int, *, newest_first: bool, purpose: str | None
    ) -> Page[FileObject]:
        """A part of the list of files.

        Raises:
            HttpError: there is no file called `after`.
        """
        if after is not None:
            await self.get(after)
        found, has_more = await self._lane.do(
            self._shelf.store.files, after, limit, newest_first=newest_first, purpose=purpose
        )
        return page(found, has_more=has_more)

    async def content(self, file_id: str) -> tuple[FileObject, BinaryIO]:
        """A file, and its content for the caller to read and close.

        Raises:
            HttpError: there is none of that id.
        """
        found = await self.get(file_id)
        try:
            return found, await asyncio.to_thread(open, self._shelf.disk.content(found.id), "rb")
        except FileNotFoundError:
            raise missing("file", file_id) from None
        except OSError as e:
            raise StorageDamaged(f"the file cannot be read ({e.strerror})") from e

    async def delete(self, file_id: str) -> None:
        """Remove a file.

        Raises:
            HttpError: there is none of that id, or a batch that has not ended reads it.
        """
        await asyncio.shield(self._lane.do(self._shelf.delete, await self.get(file_id)))


def _purpose(fields: dict[str, str]) -> Literal["batch"]:
    if (purpose := fields.get("purpose")) != "batch":
        raise HttpError(400, f"purpose={purpose!r}: give 'batch'", "invalid_purpose")
    return "batch"


def _expires_at(fields: dict[str, str], now: int) -> int | None:
    seconds, anchor = fields.get("expires_after[seconds]"), fields.get("expires_after[anchor]")
    if seconds is None and anchor is None:
        return None
    if anchor != "created_at":
        raise HttpError(400, f"expires_after[anchor]={anchor!r}: give 'created_at'", "invalid_value")
    number = int(seconds) if re.fullmatch(r"[0-9]{1,9}", seconds or "", re.ASCII) and seconds else 0
    if not MIN_EXPIRY <= number <= MAX_EXPIRY:
        message = f"expires_after[seconds]={seconds!r}: give a number from {MIN_EXPIRY} to {MAX_EXPIRY}"
        raise HttpError(400, message, "invalid_value")
    return now + number
