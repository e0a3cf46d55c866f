"""A job that was stopped anywhere, and run again, ends as one that was not."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from batch_desk import MIXED, RETRIED, VALID, Desk, by_id, chat, completion, encode, never
from fake_llm import FakeLLM

from moe_lightning.errors import JobError
from moe_lightning.jobs import BatchJob, JobFiles
from moe_lightning.jobs import files as job_files


def num_retried(desk: Desk) -> int:
    """Lines of the error file that the next run tries again."""
    lines = desk.errors.read_bytes().split(b"\n")[:-1] if desk.errors.exists() else []
    return sum(json.loads(line)["custom_id"] in RETRIED for line in lines)


def test_a_finished_job_does_nothing_more(tmp_path: Path) -> None:
    desk = Desk(tmp_path, encode(completion("a"), b"{broken", completion("b"), completion("a", "again")))
    desk.run()
    before = desk.output.read_bytes(), desk.errors.read_bytes()
    with BatchJob(JobFiles.at(desk.input, desk.output)) as job:
        status = job.run(never)
    assert (status.num_done, status.num_resumed, status.num_failed, status.num_failed_earlier) == (4, 4, 0, 2)
    assert (desk.output.read_bytes(), desk.errors.read_bytes()) == before


def test_what_failed_under_other_settings_is_tried_again_and_ends_once(finished: Any) -> None:
    desk, answers, failures = finished
    status = desk.run(FakeLLM(max_model_len=65))
    assert (status.num_resumed, status.num_failed_earlier, status.num_failed, status.num_done) == (
        8,
        3,
        1,
        10,
    )
    assert sorted(desk.answers()) == sorted([*VALID, "e"]) and answers.items() <= desk.answers().items()
    assert by_id(desk.failures()) == [f for f in failures if f["custom_id"] != "e"]
    desk.run()
    assert sorted(desk.answers()) == sorted([*VALID, "e"]), "its answer stays"


def test_an_error_file_without_errors_is_removed(tmp_path: Path) -> None:
    desk = Desk(tmp_path, encode(completion("a"), completion("e", "x" * 65)))
    desk.run()
    assert len(desk.failures()) == 1
    desk.run(FakeLLM(max_model_len=65))
    assert sorted(desk.answers()) == ["a", "e"] and sorted(tmp_path.iterdir()) == [desk.input, desk.output]


def test_errors_of_other_jobs_and_a_link_to_the_file_stay_when_lines_are_tried_again(tmp_path: Path) -> None:
    desk = Desk(tmp_path, encode(completion("e", "x" * 65), b"{"))
    other = {"id": "batch_req_1", "custom_id": "other", "response": None, "error": {}}
    real = tmp_path / "real.jsonl"
    real.write_bytes(encode(other))
    real.chmod(0o640)
    desk.errors.symlink_to(real)
    (tmp_path / "real.jsonl.tmp").write_bytes(b"left by a run that was killed")
    desk.run()
    assert [e["custom_id"] for e in desk.failures()] == ["other", "e", None]
    desk.run(FakeLLM(max_model_len=65))
    assert [e["custom_id"] for e in desk.failures()] == ["other", None]
    assert desk.errors.is_symlink() and real.stat().st_mode & 0o777 == 0o640
    assert not (tmp_path / "real.jsonl.tmp").exists()


def test_the_model_must_load_before_an_error_is_removed(finished: Any) -> None:
    desk, _, _ = finished
    before = desk.errors.read_bytes()
    with BatchJob(JobFiles.at(desk.input, desk.output)) as job, pytest.raises(AssertionError):
        job.run(never)
    assert desk.errors.read_bytes() == before


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_errors_are_removed_all_at_once(finished: Any, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    desk, answers, failures = finished
    before = desk.errors.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = job_files.LineFile(desk.errors)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(JobError, match="No space left on device"):
            file.remove({failure["id"] for failure in failures})
    assert desk.errors.read_bytes() == before
    file.close()
    desk.run()
    assert desk.answers() == answers and by_id(desk.failures()) == failures


def test_a_file_that_its_owner_replaces_while_another_process_opens_it_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "errors.jsonl", os.open
    path.write_bytes(b'{"id": "old"}\n')

    def replaced(name: Any, *args: Any) -> int:
        fd = real(name, *args)
        if name == path and b"old" in path.read_bytes():
            (tmp_path / "new").write_bytes(b'{"id": "new"}\n')
            (tmp_path / "new").rename(path)
        return fd

    monkeypatch.setattr(os, "open", replaced)
    file = job_files.LineFile(path)
    assert [line for _, line in file.lines()] == [b'{"id": "new"}\n']
    file.close()


@pytest.mark.parametrize("cut", ["output", "errors"])
def test_a_job_cut_at_any_byte_resumes_to_the_same_answers(
    finished: Any, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of them would take a minute
    desk, answers, failures = finished
    path: Path = getattr(desk, cut)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        llm, num_again = FakeLLM(), num_retried(desk)
        status = desk.run(llm)
        assert desk.answers() == answers and by_id(desk.failures()) == failures
        num_lost = whole.count(b"\n") - whole[:size].count(b"\n")
        assert status.num_done - status.num_resumed == num_lost + num_again
        assert len(llm.pulled) <= num_lost + num_again


@pytest.mark.parametrize("kept", [0, 5, 40])
def test_a_tail_of_zeros_is_cut(finished: Any, kept: int) -> None:
    desk, answers, _ = finished
    *lines, last = desk.output.read_bytes().splitlines(keepends=True)
    desk.output.write_bytes(b"".join(lines) + last[:kept] + b"\0" * 100)
    desk.run()
    assert desk.answers() == answers


class Killed(BaseException):
    """What the process would not live to see."""


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_kill_at_any_write_loses_nothing(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, ordered: bool
) -> None:
    _, answers, failures = finished
    real = os.write
    for k in range(10):
        (tmp_path / str(k)).mkdir()
        desk = Desk(tmp_path / str(k), MIXED)
        num_writes = 0

        def write(fd: int, data: Any, k: int = k) -> int:
            nonlocal num_writes
            num_writes += 1
            if num_writes <= k:
                return real(fd, data)
            real(fd, bytes(data)[: int(len(data) * share)])
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            patch.setattr(os, "ftruncate", lambda *_: None)  # the dead tidy nothing up
            with pytest.raises(Killed):
                desk.run(ordered=ordered)
        written = desk.output.read_bytes().count(b"\n")
        if desk.errors.exists():
            written += desk.errors.read_bytes().count(b"\n")
        assert written == k + (share == 1.0)
        num_again = num_retried(desk)
        status = desk.run(ordered=ordered)
        assert status.num_resumed == written - num_again
        assert desk.answers() == answers and by_id(desk.failures()) == failures


SCRIPT = """
import sys, time
from moe_lightning.jobs import BatchJob, JobFiles
from fake_llm import FakeLLM
with BatchJob(JobFiles.at(sys.argv[1], sys.argv[2])) as job:
    job.run(FakeLLM, lambda status: time.sleep(600 if status.num_done == 20 else 0.02))  # it never gets further
"""


def test_a_job_resumes_after_sigkill(tmp_path: Path) -> None:
    desk = Desk(tmp_path, encode(*(completion(f"r{i}") for i in range(60))))
    paths = [str(Path(job_files.__file__).parents[2]), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", SCRIPT, str(desk.input), str(desk.output)]
    with subprocess.Popen(command, env=environment) as process:
        while not desk.output.exists() or desk.output.read_bytes().count(b"\n") < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    num_answered = desk.output.read_bytes().count(b"\n")
    assert 3 <= num_answered <= 21
    status = desk.run()
    assert (status.num_resumed, len(desk.answers())) == (num_answered, 60)


def test_unseeded_requests_get_the_same_seed_whatever_runs_before_them(tmp_path: Path) -> None:
    desk = Desk(tmp_path, encode(chat("a"), chat("b"), chat("c", seed=1), chat("d", seed=1)))
    desk.run()
    whole = desk.answers()
    texts = {i: line["response"]["body"]["choices"][0]["message"]["content"] for i, line in whole.items()}
    assert texts["a"] != texts["b"] and texts["c"] == texts["d"]
    desk.output.write_bytes(b"")
    desk.input.write_bytes(encode(chat("b"), chat("a")))
    desk.run(FakeLLM(capacity=1))
    assert desk.answers() == {i: whole[i] for i in "ab"}
    desk.output.write_bytes(b"")
    desk.run(FakeLLM(seed=1))
    assert desk.answers()["a"] != whole["a"]


def test_lines_may_move_and_be_added_between_runs(finished: Any) -> None:
    desk, answers, failures = finished
    lines = MIXED.splitlines()
    lines[0], lines[1] = lines[1], lines[0]
    desk.input.write_bytes(encode(*lines, completion("new")))
    status = desk.run()
    assert (status.num_resumed, status.num_done) == (10 - len(RETRIED), 11)
    assert {i: a for i, a in desk.answers().items() if i != "new"} == answers
    assert by_id(desk.failures()) == failures


def test_the_same_body_with_its_keys_in_another_order_is_the_same_request(tmp_path: Path) -> None:
    line = completion("a", temperature=0.5)
    desk = Desk(tmp_path, encode(line))
    desk.run()
    desk.input.write_bytes(encode(line | {"body": dict(reversed(line["body"].items()))}))
    with BatchJob(JobFiles.at(desk.input, desk.output)) as job:
        job.run(never)


@pytest.mark.parametrize(("custom_id", "file"), [("b", "out.jsonl"), ("e", "out.errors.jsonl")])
def test_a_changed_body_under_a_known_id_is_refused(finished: Any, custom_id: str, file: str) -> None:
    desk, _, _ = finished
    before = desk.output.read_bytes(), desk.errors.read_bytes()
    lines = [json.loads(line) for line in MIXED.splitlines() if line != b"{broken"]
    changed = [chat(custom_id, "new") if r["custom_id"] == custom_id else r for r in lines]
    desk.input.write_bytes(encode(*changed))
    with pytest.raises(JobError, match=rf"'{custom_id}' has changed .*{file}.* new custom_id.*--no-resume"):
        desk.run()
    assert (desk.output.read_bytes(), desk.errors.read_bytes()) == before
    desk.run(resume=False)
    assert len(desk.answers()) + len(desk.failures()) == 8


def test_a_repaired_line_is_refused_too_until_its_error_is_removed(tmp_path: Path) -> None:
    desk = Desk(tmp_path, encode(completion("a") | {"method": "GET"}, completion("b")))
    desk.run()
    desk.input.write_bytes(encode(completion("a"), completion("b")))
    with pytest.raises(JobError, match=r"'a' has changed since line 1 .* remove that line"):
        desk.run()
    desk.errors.write_bytes(b"")
    desk.run()
    assert sorted(desk.answers()) == ["a", "b"]


def test_an_output_of_another_job_is_refused(finished: Any) -> None:
    desk, _, _ = finished
    before = desk.output.read_bytes()
    desk.input.write_bytes(encode(completion("other")))
    with pytest.raises(JobError, match="of another job; choose another -o, or give --no-resume"):
        desk.run()
    assert desk.output.read_bytes() == before
    desk.run(resume=False)
    assert sorted(desk.answers()) == ["other"] and not desk.errors.exists()


def test_an_error_file_may_hold_errors_of_other_jobs(tmp_path: Path) -> None:
    desk = Desk(tmp_path, encode(completion("a"), b"{"))
    other = {"id": "batch_req_1", "custom_id": "other", "response": None, "error": {}}
    desk.errors.write_bytes(encode(other))
    desk.run()
    assert [e["custom_id"] for e in desk.failures()] == ["other", None]


@pytest.mark.parametrize(
    "content", [b"my notes", b"my notes\n", b"[1]\n", b"{}\n", b"\xff\n", b'"id"\n', b'{"id": "x'], ids=repr
)
def test_a_file_that_is_no_batch_output_is_refused_and_left_alone(desk: Desk, content: bytes) -> None:
    desk.output.write_bytes(content)
    with pytest.raises(JobError, match=r"not a batch (answer|output).*--no-resume"):
        desk.run()
    assert desk.output.read_bytes() == content


def test_answers_are_not_discarded_if_the_model_does_not_load(finished: Any) -> None:
    desk, answers, _ = finished
    with BatchJob(JobFiles.at(desk.input, desk.output), resume=False) as job, pytest.raises(AssertionError):
        job.run(never)
    assert desk.answers() == answers
