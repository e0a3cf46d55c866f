"""Python's garbage collector in a process that runs a job."""

from __future__ import annotations

import gc


def collect_rarely() -> None:
    """Leave what is there alone for good, and look seldom at what lives long.

    A job has some 100,000 requests, sequences and tasks at a time. A full collection looks at all of them, which
    takes a quarter of a second in which nothing is launched, and finds next to nothing: they form no cycles. For
    processes of our own only: the settings are the whole process's.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
