"""Full disks, interrupts and lost requests leave whole lines and an error that says how to go on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_desk import MIXED, VALID, Desk, by_id, completion, encode, read_jsonl
from fake_llm import FakeLLM

from moe_lightning.engine.request import PassStats, RequestOutput
from moe_lightning.errors import JobError
from moe_lightning.jobs import files as job_files


def test_a_full_disk_leaves_whole_lines_and_says_how_to_go_on(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, answers, failures = finished
    desk = Desk(tmp_path, MIXED)
    real = os.write
    for room in (0, 10, 700, 1500):
        left = room

        def write(fd: int, data: Any) -> int:
            nonlocal left
            if not left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = real(fd, bytes(data)[:left])
            left -= written
            return written

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            with pytest.raises(
                JobError, match=r"No space left on device.*make room.*run the job again to resume"
            ):
                desk.run()
        assert read_jsonl(desk.output) is not None  # whole lines
    desk.run()
    assert desk.answers() == answers and by_id(desk.failures()) == failures


FULL = """
import resource, sys
from moe_lightning.errors import JobError
from moe_lightning.jobs import BatchJob, JobFiles
from fake_llm import FakeLLM
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    with BatchJob(JobFiles.at(sys.argv[1], sys.argv[2])) as job:
        job.run(FakeLLM)
except JobError as e:
    sys.exit(str(e))
"""


def test_a_file_that_may_not_grow_ends_with_a_whole_line_and_the_job_resumes(
    finished: Any, tmp_path: Path
) -> None:
    """The system's own limit, which lets a part of a line be written before it refuses."""
    _, answers, failures = finished
    desk = Desk(tmp_path, MIXED)
    paths = [str(Path(job_files.__file__).parents[2]), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    for room in (10, 700, 1500):
        command = [sys.executable, "-c", FULL, str(desk.input), str(desk.output), str(room)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "File too large. The lines in it are whole" in done.stderr, (
            done.stderr
        )
        assert len(read_jsonl(desk.output)) < len(VALID)
        assert desk.output.stat().st_size <= room
    assert desk.output.stat().st_size > 700
    desk.run()
    assert desk.answers() == answers and by_id(desk.failures()) == failures


def test_an_interrupt_within_a_write_leaves_whole_lines(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def write(fd: int, data: Any) -> int:
        real(fd, bytes(data)[:20])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(KeyboardInterrupt):
            desk.run()
    assert desk.output.read_bytes() == desk.errors.read_bytes() == b""


class LosesOne(FakeLLM):
    def run(
        self, requests: Any, on_pass: Callable[[PassStats], None] | None = None
    ) -> Iterator[RequestOutput]:
        outputs = super().run(requests, on_pass)
        next(outputs)
        yield from outputs


def test_a_request_that_the_engine_loses_is_no_silent_success(desk: Desk) -> None:
    with pytest.raises(JobError, match="no answer to 1 requests"):
        desk.run(LosesOne())
    desk.run()
    assert sorted(desk.answers()) == VALID


def test_lines_are_durable_in_small_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, encode(*(completion(f"r{i}") for i in range(100))))
    synced: list[int] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        real(fd)
        synced.append(desk.output.read_bytes().count(b"\n"))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    desk.run()
    assert synced[-1] == 100
    assert {32, 64, 96} <= set(synced)


def test_an_old_line_is_made_durable_by_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = job_files.LineFile(tmp_path / "out")
    now = 0.0
    calls: list[int] = []
    monkeypatch.setattr(time, "monotonic", lambda: now)
    file.sync()
    file.append(b"{}\n")
    monkeypatch.setattr(os, "fsync", calls.append)
    file.sync_if_due()
    assert not calls
    now = 1.0
    file.sync_if_due()
    file.sync_if_due()
    assert len(calls) == 1
    file.close()
