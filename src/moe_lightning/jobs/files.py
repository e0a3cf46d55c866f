"""JSONL files that grow by whole lines."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_lightning.errors import JobError
from moe_lightning.jobs.lines import LINE_ID_PREFIX

_SYNC_LINES = 32
_SYNC_SECONDS = 1.0
_LINE_START = f'{{"id": "{LINE_ID_PREFIX}'.encode()
# Valid inside JSON, but some readers take them for line breaks.
_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def encode_line(record: dict[str, Any]) -> bytes:
    """One JSONL line in UTF-8 with its line break; `id` must be the first key of the record."""
    written = json.dumps(record, ensure_ascii=False, allow_nan=False)
    return written.translate(_BREAKS).encode("utf-8", "replace") + b"\n"


class LineFile:
    """An exclusively locked file to which whole lines are appended.

    Whatever interrupts an append, the file holds whole lines. Only a kill or a power cut in the middle of a
    write leaves a torn one, for `cut_torn_line` to remove.

    Raises:
        JobError: it cannot be created or locked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unsynced = 0
        self._synced_at = time.monotonic()
        while True:
            self._fd = self._open(path, 0)
            try:
                self._require_regular()
                self._lock(self._fd)
                # Its owner may have replaced or removed the file between our opening and our locking it.
                if self._is_at(path):
                    sync_directory(path)
                    return
            except BaseException:
                os.close(self._fd)
                raise
            os.close(self._fd)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Number, from 1, and bytes of each whole line that is there."""
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield number, line

    def cut_torn_line(self) -> None:
        """Truncate after the last whole line.

        Raises:
            JobError: what comes after it is nothing that a job writes.
        """
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            keep, torn = 0, b""
            for line in file:
                if line.endswith(b"\n"):
                    keep += len(line)
                else:
                    torn = line
        if not torn:
            return
        # A file system that lost power may leave zeros where data should be.
        written = torn.rstrip(b"\0")
        if not (written.startswith(_LINE_START) or _LINE_START.startswith(written)):
            raise JobError(f"{self.path} is not a batch output; choose another path or give --no-resume")
        os.ftruncate(self._fd, keep)
        os.fsync(self._fd)

    def clear(self) -> None:
        """Remove all lines."""
        os.ftruncate(self._fd, 0)

    def remove(self, line_ids: Collection[str]) -> None:
        """Remove the lines with these ids: all of them or, if it fails or the process dies, none.

        Raises:
            JobError: the disk is full or broken.
        """
        real = Path(os.path.realpath(self.path))
        beside = real.with_name(f"{real.name}.tmp")
        fd = self._open(beside, os.O_TRUNC)
        try:
            self._lock(fd)  # the lock is the file's, not the name's
            with open(fd, "wb", closefd=False) as file:
                for _, line in self.lines():
                    if json.loads(line)["id"] not in line_ids:
                        file.write(line)
            os.fchmod(fd, stat.S_IMODE(os.fstat(self._fd).st_mode))
            os.fsync(fd)
            os.rename(beside, real)
        except BaseException as e:
            os.close(fd)
            beside.unlink(missing_ok=True)
            if isinstance(e, OSError):
                raise self._failed(e) from e
            raise
        os.close(self._fd)
        self._fd = fd
        sync_directory(real)

    def delete(self) -> None:
        """Remove the file and let go of the lock."""
        os.ftruncate(self._fd, 0)
        self.path.unlink()
        os.close(self._fd)

    @property
    def size(self) -> int:
        """Bytes of all lines."""
        return os.fstat(self._fd).st_size

    @property
    def is_empty(self) -> bool:
        """Whether there is no line."""
        return self.size == 0

    def append(self, line: bytes) -> None:
        """Write one line with its line break; all of it or, if it fails, nothing.

        Raises:
            JobError: the disk is full or broken.
        """
        start = os.fstat(self._fd).st_size
        try:
            rest = memoryview(line)
            while rest:  # once, but on a disk that fills up
                rest = rest[os.write(self._fd, rest) :]
        except OSError as e:
            os.ftruncate(self._fd, start)
            raise self._failed(e) from e
        except BaseException:  # a signal; it may have come after the last byte
            if os.fstat(self._fd).st_size != start + len(line):
                os.ftruncate(self._fd, start)
            raise
        self._unsynced += 1
        try:
            self.sync_if_due()
        except JobError:
            os.ftruncate(self._fd, start)
            raise

    def sync_if_due(self) -> None:
        """Make lines durable if many, or old ones, are not yet.

        Raises:
            JobError: the disk is full or broken.
        """
        is_old = time.monotonic() - self._synced_at >= _SYNC_SECONDS
        if self._unsynced >= _SYNC_LINES or (self._unsynced and is_old):
            self.sync()

    def sync(self) -> None:
        """Make all lines durable.

        Raises:
            JobError: the disk is full or broken.
        """
        try:
            os.fsync(self._fd)
        except OSError as e:
            raise self._failed(e) from e
        self._unsynced, self._synced_at = 0, time.monotonic()

    def close(self) -> None:
        """Make all lines durable and let go of the lock."""
        try:
            self.sync()
        finally:
            os.close(self._fd)

    def _open(self, path: Path, flags: int) -> int:
        try:
            return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | flags, 0o666)
        except OSError as e:
            raise JobError(f"cannot write {path}: {e.strerror}; choose another path") from e

    def _is_at(self, path: Path) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(path))
        except FileNotFoundError:
            return False

    def _require_regular(self) -> None:
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise JobError(f"{self.path} is not a regular file and cannot be resumed; choose another path")

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobError(
                f"another process is writing {self.path}; wait for it, stop it or choose another path"
            ) from None
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOTSUP):  # network file systems without locks
                raise JobError(f"cannot lock {self.path}: {e.strerror}; choose another path") from e

    def _failed(self, e: OSError) -> JobError:
        return JobError(
            f"cannot write {self.path}: {e.strerror}. The lines in it are whole: make room and run the job "
            "again to resume"
        )


def sync_directory(path: Path) -> None:
    """Make the name of a file durable: a new one is so only once its directory is."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some file systems cannot sync a directory
            os.fsync(fd)
    finally:
        os.close(fd)
