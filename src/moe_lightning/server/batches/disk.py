"""Where the contents of files lie: one directory, under names that only the server makes."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from moe_lightning.errors import JobError
from moe_lightning.jobs.files import LineFile, sync_directory

_FILE_ID = re.compile(r"file-[0-9a-f]{32}", re.ASCII)
_BATCH_ID = re.compile(r"batch_[0-9a-f]{32}", re.ASCII)


def new_file_id() -> str:
    """An id that nobody can guess."""
    return f"file-{secrets.token_hex(16)}"


def new_batch_id() -> str:
    """An id that nobody can guess."""
    return f"batch_{secrets.token_hex(16)}"


def is_file_id(text: str) -> bool:
    """Whether `new_file_id` may have made it."""
    return _FILE_ID.fullmatch(text) is not None


def is_batch_id(text: str) -> bool:
    """Whether `new_batch_id` may have made it."""
    return _BATCH_ID.fullmatch(text) is not None


class Disk:
    """The directory of a service, locked against other processes.

    Contents lie in `files`. A file whose record is not written yet, or no longer there, lies in `pending`: whatever
    interrupts an upload or a removal, `recover` tells by the record which of the two it belongs to.

    Raises:
        JobError: the directory cannot be written, or another process uses it.
    """

    def __init__(self, directory: Path) -> None:
        self._files, self._pending = directory / "files", directory / "pending"
        try:
            for path in (directory, self._files, self._pending):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise JobError(f"cannot write {directory}: {e.strerror}; choose another directory") from e
        self.database = directory / "batches.sqlite"
        is_new = not self.database.exists() or self.database.stat().st_size == 0
        if is_new and any(self._files.iterdir()):
            raise JobError(
                f"{directory} has files of batches but not their database; put {self.database.name} back, or "
                "move the directory away"
            )
        self._lock = LineFile(directory / "lock")

    def close(self) -> None:
        """Let others use the directory."""
        self._lock.close()

    def content(self, file_id: str) -> Path:
        """Where a file's content lies."""
        return self._in(self._files, file_id)

    def pending(self, file_id: str) -> Path:
        """Where the content of a file lies before its record is written, and after it is removed."""
        return self._in(self._pending, file_id)

    def publish(self, file_id: str) -> None:
        """Put a content where it belongs once its record is written."""
        self._move(self.pending(file_id), self.content(file_id))

    def retire(self, file_id: str) -> None:
        """Put a content aside before its record is removed."""
        self._move(self.content(file_id), self.pending(file_id))

    def discard(self, file_id: str) -> None:
        """Remove a content that has no record."""
        with suppress(FileNotFoundError):
            self.pending(file_id).unlink()

    def recover(self, has_record: Callable[[str], bool]) -> None:
        """Finish what a kill has interrupted."""
        for path in list(self._pending.iterdir()):
            if is_file_id(path.name) and has_record(path.name):
                self.publish(path.name)
            else:
                path.unlink()

    def _in(self, directory: Path, file_id: str) -> Path:
        assert is_file_id(file_id), "no name of a client's comes here"
        return directory / file_id

    def _move(self, old: Path, new: Path) -> None:
        os.rename(old, new)
        for path in (new, old):
            sync_directory(path)
