"""Python's garbage collector in a process that runs a job or serves."""

from __future__ import annotations

import gc

_JOB, _SERVER = (20_000, 20, 100), (20_000, 5, 10)


def collect_rarely(*, is_server: bool = False) -> None:
    """Leave what is there alone for good, and look seldom at what lives long.

    A job has some 100,000 requests, sequences and tasks at a time. A full collection looks at all of them, which
    takes a quarter of a second in which nothing is launched, and finds next to nothing: they form no cycles.
    Connections do, each with its transport, and those that were open at a collection stay until one of older
    objects: a server makes 4 and 40 times as many of these. For processes of our own only: the settings are the
    whole process's.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*(_SERVER if is_server else _JOB))
