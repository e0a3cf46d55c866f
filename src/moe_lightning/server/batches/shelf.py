"""Records and contents together: what has to be true of both, whatever interrupts it."""

from __future__ import annotations

from pathlib import Path

from moe_lightning.errors import JobError
from moe_lightning.server.batch_limits import BatchLimits
from moe_lightning.server.batches.disk import Disk
from moe_lightning.server.batches.errors import StorageDamaged, StorageFull
from moe_lightning.server.batches.objects import BatchRecord, FileObject
from moe_lightning.server.batches.store import Store
from moe_lightning.server.errors import HttpError


class Shelf:
    """The directory of a service, opened; to be used by one thread at a time.

    Raises:
        JobError: the directory or its database cannot be used; the message says what to do.
    """

    def __init__(self, directory: Path) -> None:
        self.disk = Disk(directory)
        try:
            self.store = Store(self.disk.database)
            self.disk.recover(lambda file_id: self.store.file(file_id) is not None)
        except StorageDamaged as e:
            self.disk.close()
            raise JobError(
                f"{e.message}. Put a copy of {self.disk.database} back, or move {directory} away to begin with an "
                "empty one; answers are whole lines in its directory `files`"
            ) from e
        except (StorageFull, OSError) as e:
            self.disk.close()
            raise JobError(f"cannot use {directory}: {e.message if isinstance(e, StorageFull) else e}") from e

    def close(self) -> None:
        """Let others use the directory."""
        self.store.close()
        self.disk.close()

    def publish(self, file: FileObject) -> None:
        """Add a file whose content is pending.

        Raises:
            StorageFull, StorageDamaged: it has not been added.
        """
        self.store.add_file(file)
        try:
            self.disk.publish(file.id)
        except OSError as e:
            self.store.remove_file(file.id)
            raise StorageFull(e.strerror) from e

    def delete(self, file: FileObject) -> None:
        """Remove a file.

        Raises:
            HttpError: a batch that has not ended reads it.
            StorageFull, StorageDamaged: it has not been removed.
        """
        for record in self.store.open_batches():
            if record.batch.input_file_id == file.id:
                message = f"{record.batch.id} reads the file; wait for its end, or cancel it first"
                raise HttpError(400, message, "file_in_use")
        if self.store.file(file.id) is None:
            raise missing("file", file.id)
        try:
            self.disk.retire(file.id)
        except FileNotFoundError:  # somebody else took it away: the record goes all the same
            pass
        except OSError as e:
            raise StorageFull(e.strerror) from e
        try:
            self.store.remove_file(file.id)
        except (StorageFull, StorageDamaged):
            self.disk.publish(file.id)
            raise
        self.disk.discard(file.id)

    def delete_expired(self, now: float) -> None:
        """Remove files whose time is over, but for those that a batch still reads."""
        if not (expired := self.store.expired_files(now)):
            return
        in_use = {record.batch.input_file_id for record in self.store.open_batches()}
        for file in expired:
            if file.id not in in_use:
                self.delete(file)

    def add_batch(self, record: BatchRecord, limits: BatchLimits) -> None:
        """Add a batch.

        Raises:
            HttpError: its input is not there, or there are too many batches.
            StorageFull, StorageDamaged: it has not been added.
        """
        batch = record.batch
        file = self.store.file(batch.input_file_id)
        if file is None:
            raise missing("file", batch.input_file_id)
        if file.purpose != "batch":
            raise HttpError(400, f"input_file_id: {file.id} has the purpose {file.purpose}", "invalid_value")
        if len(self.store.open_batches()) >= limits.open_batches:
            message = f"{limits.open_batches} batches are open; try again when one has ended"
            raise HttpError(429, message, "too_many_batches", retry_after=60)
        self.require_room(limits)
        self.store.add_batch(record, limits.batches)

    def require_room(self, limits: BatchLimits) -> None:
        """Make sure that there may be another file.

        Raises:
            HttpError: there may not.
        """
        count, stored = self.store.stored()
        if count >= limits.files or stored >= limits.stored_bytes:
            raise HttpError(
                400, f"{count} files with {stored} bytes are stored; delete some", "too_many_files"
            )


def missing(kind: str, given: str) -> HttpError:
    """There is no such thing."""
    return HttpError(404, f"there is no {kind} {given[:64]!r}", f"{kind}_not_found")
