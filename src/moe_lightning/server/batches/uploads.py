"""A form with a file, written to disk as it comes."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from moe_lightning.server.batch_limits import BatchLimits
from moe_lightning.server.batches.errors import StorageFull
from moe_lightning.server.errors import HttpError
from moe_lightning.units import format_bytes

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of each malformed form
_PARTS = 16
_FIELD_BYTES = 1024
_OVERHEAD = 2**16  # of a form beside its file


@dataclass(frozen=True)
class Upload:
    """A file that lies on disk: the name that its client gives it, its bytes, and the form's other fields."""

    filename: str
    num_bytes: int
    fields: dict[str, str]


async def receive(stream: AsyncIterator[bytes], content_type: str, path: Path, limits: BatchLimits) -> Upload:
    """Write the form's file to `path`, which is new, and make it durable; no more than a piece is in memory.

    Raises:
        HttpError: the form is malformed, too large or too slow. `path` may be there all the same.
        StorageFull: the disk is.
    """
    boundary = _boundary(content_type)
    try:
        with open(path, "xb", buffering=0) as file:
            form = _Form(boundary, file, limits.file_bytes)
            async for piece in _timely(stream, limits):
                await asyncio.to_thread(form.feed, piece)
            upload = form.result()
            await asyncio.to_thread(os.fsync, file.fileno())
    except OSError as e:
        raise StorageFull(e.strerror) from e
    except ClientDisconnect:
        raise HttpError(400, "the connection ended within the upload", "disconnected") from None
    return upload


async def _timely(stream: AsyncIterator[bytes], limits: BatchLimits) -> AsyncIterator[bytes]:
    """The stream's pieces, as long as the client keeps up its rate; what is done with them does not count."""
    idle, left = limits.upload_idle_seconds, limits.upload_idle_seconds
    clock = asyncio.get_running_loop().time
    while True:
        start = clock()
        try:
            async with asyncio.timeout(min(idle, left)):
                piece = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise HttpError(
                408, f"the upload brought nothing for {idle:g} s, or less than {limits.upload_rate} bytes/s",
                "slow_upload",
            ) from None  # fmt: skip
        left += len(piece) / limits.upload_rate - (clock() - start)
        yield piece


def _boundary(content_type: str) -> bytes:
    try:
        kind, options = parse_options_header(content_type)
    except (ValueError, UnicodeError):
        kind, options = b"", {}
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise HttpError(
            400,
            "send the file as multipart/form-data with a boundary, as `curl -F file=@name` does",
            "no_form",
        )
    return options[b"boundary"]


class _Form:
    """Takes a form in pieces; the part called `file` goes to a file, other fields are kept."""

    def __init__(self, boundary: bytes, file: BinaryIO, max_bytes: int) -> None:
        self._file, self._max_bytes = file, max_bytes
        self._num_bytes = self._num_parts = self._total = 0
        self._filename: str | None = None
        self._fields: dict[str, bytes] = {}
        self._header = [b"", b""]
        self._disposition = b""
        self._name = ""
        self._is_ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": lambda data, start, end: self._add_header(0, data[start:end]),
                    "on_header_value": lambda data, start, end: self._add_header(1, data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._begin_content,
                    "on_part_data": self._add_content,
                    "on_end": self._end,
                },
            )
        except FormParserError as e:
            raise _malformed(str(e)) from None

    def feed(self, piece: bytes) -> None:
        """Take the next piece."""
        self._total += len(piece)
        if self._total > self._max_bytes + _OVERHEAD:
            raise _too_large(self._max_bytes)
        try:
            self._parser.write(piece)
        except FormParserError as e:
            raise _malformed(str(e)) from None

    def result(self) -> Upload:
        """The form, once all pieces are there."""
        if not self._is_ended:
            raise _malformed("it ends before its last boundary")
        if self._filename is None:
            raise HttpError(
                400, "file is missing; send the batch file in a part called 'file'", "missing_file"
            )
        fields = {name: value.decode("utf-8", "replace") for name, value in self._fields.items()}
        return Upload(self._filename, self._num_bytes, fields)

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > _PARTS:
            raise HttpError(400, f"the form has more than {_PARTS} parts", "too_many_parts")
        self._disposition, self._header = b"", [b"", b""]

    def _add_header(self, place: int, data: bytes) -> None:
        self._header[place] += data

    def _end_header(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = self._header[1]
        self._header = [b"", b""]

    def _begin_content(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name in self._fields or (self._name == "file" and self._filename is not None):
            raise HttpError(400, f"the form has {self._name[:64]!r} twice; send it once", "duplicate_field")
        if self._name == "file":
            self._filename = _shown_name(options.get(b"filename", b""))
        else:
            self._fields[self._name] = b""

    def _add_content(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._num_bytes += end - start
            if self._num_bytes > self._max_bytes:
                raise _too_large(self._max_bytes)
            rest = memoryview(data)[start:end]
            while rest:
                rest = rest[self._file.write(rest) :]
            return
        value = self._fields[self._name] + data[start:end]
        if len(value) > _FIELD_BYTES:
            raise HttpError(400, f"{self._name[:64]!r} is longer than {_FIELD_BYTES} bytes", "field_too_long")
        self._fields[self._name] = value

    def _end(self) -> None:
        self._is_ended = True


def _shown_name(name: bytes) -> str:
    """A client's name for its file: nothing but text to show, without what would disturb a terminal."""
    text = name.decode("utf-8", "replace")
    return "".join(c for c in text if c.isprintable())[:255] or "file"


def _too_large(max_bytes: int) -> HttpError:
    return HttpError(
        413,
        f"the file is larger than {format_bytes(max_bytes)}; split it into several batches",
        "file_too_large",
    )


def _malformed(reason: str) -> HttpError:
    return HttpError(400, f"the form is malformed: {reason}", "malformed_form")
