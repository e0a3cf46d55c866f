"""What the batch service takes at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_lightning.config import setting
from moe_lightning.server.config import parse_positive, parse_seconds
from moe_lightning.units import GIB, KIB, MIB, parse_bytes, parse_count


def _count(default: int, flag: str, help_text: str) -> Any:
    return setting(default, help_text, flag=flag, parse=parse_positive(parse_count), metavar="N")


def _bytes(default: int, flag: str, help_text: str) -> Any:
    return setting(default, help_text, flag=flag, parse=parse_positive(parse_bytes), metavar="SIZE")


@dataclass(frozen=True)
class BatchLimits:
    """Bounds of what clients may store and ask for; bytes and seconds. Most are flags of the server.

    Attributes:
        upload_rate: bytes per second that an upload has to reach on average, beside `upload_idle_seconds` once;
            time that the server takes does not count.
        order_seconds: until the body that orders a batch has to be there; the server's --body-seconds.
        line_bytes: of one line; a longer one becomes a line of the error file.
        body_depth: levels of objects and lists in one line's body; likewise.
        bytes_in_flight: of the lines of the requests in flight.
        retry_seconds: until what the engine or the disk refused for now is tried again.
        aborts: of one line by passes that fail, until it becomes a line of the error file.
        tick_seconds: between looks at the clock for what has expired.
    """

    file_bytes: int = _bytes(200 * MIB, "max_file_size", "of one uploaded file")
    files: int = _count(1000, "max_files", "uploads are refused while there are as many")
    stored_bytes: int = _bytes(
        50 * GIB, "max_stored_size", "uploads are refused while all files hold as much"
    )
    uploads: int = _count(8, "max_uploads", "uploads at a time")
    upload_idle_seconds: float = setting(
        60.0, "after which an upload that sends nothing is ended", flag="upload_seconds", parse=parse_seconds,
        metavar="SECONDS",
    )  # fmt: skip
    upload_rate: int = _bytes(
        32 * KIB, "min_upload_rate", "that an upload has to bring each second on average"
    )
    order_bytes: int = _bytes(64 * KIB, "max_batch_order", "of the body that orders a batch")
    order_seconds: float = 60.0
    batches: int = _count(
        10_000, "max_batches", "batches with a record; the oldest that has ended makes room for a new one"
    )
    open_batches: int = _count(100, "max_open_batches", "batches that have not ended; more are refused")
    requests: int = _count(50_000, "max_batch_lines", "lines of one batch")
    line_bytes: int = _bytes(4 * MIB, "max_line_size", "of one line of a batch")
    body_depth: int = _count(64, "max_body_depth", "levels of objects and lists in the body of a line")
    requests_in_flight: int = _count(
        8192, "max_batch_in_flight", "lines that are being answered at a time, of all batches together"
    )
    bytes_in_flight: int = 256 * MIB
    window_hours: int = _count(7 * 24, "max_window_hours", "longest completion window of a batch")
    retry_seconds: float = 5.0
    aborts: int = 5
    tick_seconds: float = 1.0
