"""What the batch service takes at most."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lightning.units import GIB, MIB


@dataclass(frozen=True)
class BatchLimits:
    """Bounds of what clients may store and ask for; bytes and seconds.

    Attributes:
        file_bytes: of one uploaded file.
        files: uploads are refused while there are as many.
        stored_bytes: uploads are refused while all files hold as much.
        uploads: at a time.
        upload_idle_seconds: after which an upload that sends nothing is ended.
        batches: whose records are kept; the oldest that has ended makes room for a new one.
        open_batches: that have not ended; more are refused.
        requests: lines of one batch.
        line_bytes: of one line; a longer one becomes a line of the error file.
        body_depth: levels of objects and lists in one line's body; likewise.
        requests_in_flight: bodies that are being answered at a time, of all batches together.
        bytes_in_flight: of the lines of these.
        window_hours: longest completion window that a batch may ask for.
        retry_seconds: until what the engine or the disk refused for now is tried again.
        aborts: of one line by passes that fail, until it becomes a line of the error file.
        tick_seconds: between looks at the clock for what has expired.
    """

    file_bytes: int = 200 * MIB
    files: int = 1000
    stored_bytes: int = 50 * GIB
    uploads: int = 8
    upload_idle_seconds: float = 60.0
    batches: int = 10_000
    open_batches: int = 100
    requests: int = 50_000
    line_bytes: int = 4 * MIB
    body_depth: int = 64
    requests_in_flight: int = 8192
    bytes_in_flight: int = 256 * MIB
    window_hours: int = 7 * 24
    retry_seconds: float = 5.0
    aborts: int = 5
    tick_seconds: float = 1.0
