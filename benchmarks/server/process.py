"""A server as its users start it: the command, in a process of its own, on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_READY = re.compile(r" is served at http://127\.0\.0\.1:(\d+)")


@dataclass(frozen=True)
class ServerProcess:
    """A server that takes requests."""

    process: subprocess.Popen[str]
    port: int

    @property
    def resident_bytes(self) -> int:
        """Memory of its own, without the pages of files that it has mapped."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        assert found
        return int(found[1]) * 1024


def start(model: Path, *flags: str, port: int = 0, cores: Sequence[int] | None = None) -> ServerProcess:
    """Start a server; returns when it takes requests.

    Raises:
        RuntimeError: it ended instead.
    """
    command = [sys.executable, "-m", "moe_lightning", "serve", str(model), "--port", str(port), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    if cores:
        os.sched_setaffinity(process.pid, cores)
    assert process.stdout
    for line in process.stdout:
        if found := _READY.search(line):
            return ServerProcess(process, int(found[1]))
    raise RuntimeError(f"the server ended with status {process.wait()} before it took requests")


@contextmanager
def serving(model: Path, *flags: str, cores: Sequence[int] | None = None) -> Iterator[ServerProcess]:
    """A server that ends with the block, in good order."""
    server = start(model, *flags, cores=cores)
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(60)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()
