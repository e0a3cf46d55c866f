"""Runs a batch service that kills itself, once for each line `point count` on stdin; without a point to its end.

Each runs in a fork, so that the imports are paid once. Says `killed` or `done` for each.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from service_desk import Desk, FakeEngine, line, without_power_cuts

from moe_lightning.jobs.files import LineFile
from moe_lightning.server.batches import BatchLimits, disk, open_batch, run, store

LIMITS = BatchLimits(requests_in_flight=4, tick_seconds=0.01)
BATCHES = {
    "first": [line(f"a{i}", f"a{i}", **({"status": 400} if i % 5 == 3 else {})) for i in range(60)] + [b"{"],
    "second": [line(f"b{i}", f"b{i}") for i in range(8)],
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at(count, owner, name, *, after=False, when=lambda *args: True):
    """Die at the `count`-th call of a method, before or after it."""
    real, left = getattr(owner, name), [count]

    def call(*args, **kwargs):
        left[0] -= when(*args, **kwargs)
        if left[0] == 0 and not after:
            die()
        result = real(*args, **kwargs)
        if left[0] == 0:
            die()
        return result

    setattr(owner, name, call)


def tear(count):
    """Die in the middle of the `count`-th line."""
    real, left = LineFile.append, [count]

    def append(self, data):
        left[0] -= 1
        if left[0] == 0:
            os.write(self._fd, data[: len(data) // 2])
            die()
        real(self, data)

    LineFile.append = append


def adds_files(self, batch_id, edit, new_files=()):
    return bool(new_files)


POINTS = {
    "upload-recorded": lambda n: at(n, disk.Disk, "publish"),
    "upload-published": lambda n: at(n, disk.Disk, "publish", after=True),
    "batch-recorded": lambda n: at(n, store.Store, "add_batch", after=True),
    "validated": lambda n: at(n, open_batch, "judge", after=True),
    "change": lambda n: at(n, store.Store, "change"),
    "changed": lambda n: at(n, store.Store, "change", after=True),
    "opened": lambda n: at(n, run.Run, "open", after=True),
    "asked": lambda n: at(n, FakeEngine, "reply"),
    "torn": tear,
    "written": lambda n: at(n, LineFile, "append", after=True),
    "synced": lambda n: at(n, LineFile, "sync", after=True),
    "finished": lambda n: at(n, run.Run, "finish", after=True),
    "ending": lambda n: at(n, store.Store, "change", when=adds_files),
    "ended": lambda n: at(n, store.Store, "change", when=adds_files, after=True),
}


class Engine(FakeEngine):
    """Writes down what it is asked."""

    def __init__(self, log):
        super().__init__(is_open=False)
        self.log = log

    async def __call__(self, url, body, request_id):
        os.write(self.log, f"{body['prompt']}\n".encode())
        return await super().__call__(url, body, request_id)


async def serve(directory, log):
    """Begin the batches that are not there yet, and then bring all to their end."""
    async with Desk(directory, Engine(log), LIMITS) as desk:
        there = {b.metadata["name"] async for b in desk.client.batches.list()}
        for name, lines in BATCHES.items():
            if name not in there:
                await desk.begin(*lines, metadata={"name": name})
        desk.engine.gate.set()
        async for batch in desk.client.batches.list():
            await desk.ended(batch.id)


def main():
    """Fork for each line on stdin."""
    without_power_cuts(pytest.MonkeyPatch())
    for number, command in enumerate(sys.stdin):
        if (child := os.fork()) == 0:
            log = os.open(Path(sys.argv[2]) / str(number), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            point, count = command.split()
            if point != "none":
                POINTS[point](int(count))
            asyncio.run(serve(Path(sys.argv[1]), log))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        print("killed" if os.WIFSIGNALED(status) else "done" if status == 0 else "failed", flush=True)


if __name__ == "__main__":
    main()
