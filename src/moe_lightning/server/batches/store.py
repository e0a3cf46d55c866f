"""Records of files and batches in SQLite; each method is one transaction."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from moe_lightning.server.batches.errors import StorageDamaged, StorageFull
from moe_lightning.server.batches.objects import OPEN, BatchRecord, FileObject

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, record TEXT, crc INTEGER
);
CREATE TABLE IF NOT EXISTS batches (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, record TEXT, crc INTEGER
);
"""
_SYNCHRONOUS = "FULL"  # what a client was told survives a power cut
_IS_OPEN = f"json_extract(record, '$.batch.status') IN ({', '.join(map(repr, OPEN))})"
_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_FULL = {
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED,  # somebody looks into it with a tool of his own
}  # fmt: skip
_Record = TypeVar("_Record", FileObject, BatchRecord)


class Store:
    """The database; to be used by one thread at a time.

    A record is JSON with a checksum: SQLite notices a damaged page only where it breaks its own structure.

    Raises:
        StorageDamaged: by any method: what is there is not what was written; nothing has been changed.
        StorageFull: by any method: the disk is full or failing; nothing has been changed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._guarded():
            self._db = sqlite3.connect(path, isolation_level="IMMEDIATE", check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute(f"PRAGMA synchronous = {_SYNCHRONOUS}")
        self._db.execute("PRAGMA journal_size_limit = 4194304")
        self._db.execute("PRAGMA trusted_schema = OFF")
        self._db.executescript(_SCHEMA)
        if (found := self._db.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
            raise self._damaged(found)
        self._select("files", FileObject, "", ())
        self._select("batches", BatchRecord, "", ())

    def close(self) -> None:
        """Let go of the database."""
        self._db.close()

    # -- files --

    def add_file(self, file: FileObject) -> None:
        """Remember a new file."""
        with self._guarded(), self._db:
            self._insert("files", file.id, file)

    def file(self, file_id: str) -> FileObject | None:
        """The file of that id."""
        return self._get("files", FileObject, file_id)

    def remove_file(self, file_id: str) -> None:
        """Forget a file."""
        with self._guarded(), self._db:
            self._db.execute("DELETE FROM files WHERE id = ?", (file_id,))

    def files(
        self, after: str | None, limit: int, *, newest_first: bool = True, purpose: str | None = None
    ) -> tuple[list[FileObject], bool]:
        """Up to `limit` files past the one called `after`, and whether there are more; none if it is unknown."""
        return self._page(
            "files", FileObject, after, limit, newest_first, "json_extract(record, '$.purpose')", purpose
        )

    def expired_files(self, now: float) -> list[FileObject]:
        """Files whose time is over."""
        return self._select("files", FileObject, "WHERE json_extract(record, '$.expires_at') <= ?", (now,))

    def stored(self) -> tuple[int, int]:
        """Number of files, and their bytes together."""
        with self._guarded():
            row = self._db.execute(
                "SELECT count(*), coalesce(sum(json_extract(record, '$.bytes')), 0) FROM files"
            )
            count, size = row.fetchone()
            return count, size

    # -- batches --

    def add_batch(self, record: BatchRecord, keep: int) -> None:
        """Remember a new batch; of all records that have ended the oldest go, so that `keep` are left."""
        with self._guarded(), self._db:
            self._insert("batches", record.batch.id, record)
            self._db.execute(
                f"DELETE FROM batches WHERE NOT {_IS_OPEN} AND seq <= "
                "(SELECT seq FROM batches ORDER BY seq DESC LIMIT 1 OFFSET ?)",
                (keep,),
            )

    def batch(self, batch_id: str) -> BatchRecord | None:
        """The batch of that id."""
        return self._get("batches", BatchRecord, batch_id)

    def batches(self, after: str | None, limit: int) -> tuple[list[BatchRecord], bool]:
        """Up to `limit` batches older than the one called `after`, and whether there are more; none if unknown."""
        return self._page("batches", BatchRecord, after, limit, newest_first=True)

    def open_batches(self) -> list[BatchRecord]:
        """Those that have not ended, oldest first."""
        return self._select("batches", BatchRecord, f"WHERE {_IS_OPEN} ORDER BY seq", ())

    def change(
        self, batch_id: str, edit: Callable[[BatchRecord], BatchRecord], new_files: Sequence[FileObject] = ()
    ) -> BatchRecord:
        """Change a batch and add its files at once; the batch as it is then."""
        with self._guarded(), self._db:
            found = self._get("batches", BatchRecord, batch_id)
            assert found is not None, "open batches are kept"
            changed = edit(found)
            text = changed.model_dump_json()
            crc = _checksum(batch_id, text)
            self._db.execute("UPDATE batches SET record = ?, crc = ? WHERE id = ?", (text, crc, batch_id))
            for file in new_files:
                self._insert("files", file.id, file)
            return changed

    # -- rows --

    def _insert(self, table: str, row_id: str, record: BaseModel) -> None:
        text = record.model_dump_json()
        row = (row_id, text, _checksum(row_id, text))
        self._db.execute(f"INSERT INTO {table} (id, record, crc) VALUES (?, ?, ?)", row)

    def _get(self, table: str, kind: type[_Record], row_id: str) -> _Record | None:
        found = self._select(table, kind, "WHERE id = ?", (row_id,))
        return found[0] if found else None

    def _select(
        self, table: str, kind: type[_Record], where: str, values: tuple[str | float | None, ...]
    ) -> list[_Record]:
        with self._guarded():
            rows = self._db.execute(f"SELECT id, record, crc FROM {table} {where}", values).fetchall()
            return [self._decoded(kind, row) for row in rows]

    def _page(
        self,
        table: str,
        kind: type[_Record],
        after: str | None,
        limit: int,
        newest_first: bool,
        field: str = "''",
        value: str | None = None,
    ) -> tuple[list[_Record], bool]:
        with self._guarded():
            seq = 2**62 if newest_first else 0
            if after is not None:
                row = self._db.execute(f"SELECT seq FROM {table} WHERE id = ?", (after,)).fetchone()
                if row is None:  # deleted since
                    return [], False
                seq = row[0]
            side, order = ("<", "DESC") if newest_first else (">", "ASC")
            where = f"WHERE seq {side} ? AND (? IS NULL OR {field} = ?) ORDER BY seq {order} LIMIT ?"
            found = self._select(table, kind, where, (seq, value, value, limit + 1))
            return found[:limit], len(found) > limit

    def _decoded(self, kind: type[_Record], row: tuple[str, str, int]) -> _Record:
        row_id, text, crc = row
        try:
            if crc == _checksum(row_id, text):
                return kind.model_validate_json(text)
        except (AttributeError, TypeError, ValidationError):
            pass
        raise self._damaged(f"a record in {kind.__name__} is not what was written")

    def _damaged(self, reason: str) -> StorageDamaged:
        return StorageDamaged(f"the database of batches, {self._path.name}, is damaged ({reason})")

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as e:
            code = getattr(e, "sqlite_errorcode", 0) & 0xFF
            if code in _FULL:
                raise StorageFull(str(e)) from e
            raise self._damaged(str(e)) from e
        except UnicodeDecodeError as e:
            raise self._damaged("text is not UTF-8") from e


def _checksum(row_id: str, text: str) -> int:
    return zlib.crc32(f"{row_id} {text}".encode())
