"""`moe-lightning serve` in a process of its own, on a free port."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager


def start(model, *flags):
    """A process, and the address that it takes requests at."""
    process = subprocess.Popen(
        [*map(str, (sys.executable, "-m", "moe_lightning", "serve", model, "--port", "0", *flags))],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    line = process.stdout.readline()
    assert "is served at" in line, f"the server said {line!r} and ended with {process.poll()}"
    return process, line.split()[-1]


def end(process):
    process.kill()
    process.wait()
    process.stdout.close()


@contextmanager
def running(model, *flags):
    """The address of a server that ends with the block."""
    process, url = start(model, *flags)
    try:
        yield url
    finally:
        end(process)
