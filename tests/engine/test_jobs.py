from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_llm import FakeLLM
from hypothesis import given
from hypothesis import strategies as st

from moe_lightning.engine.request import PassStats, RequestOutput
from moe_lightning.errors import JobError
from moe_lightning.jobs import BatchJob, JobFiles, JobStatus
from moe_lightning.jobs import files as job_files
from moe_lightning.jobs import lines as job_lines
from moe_lightning.jobs.lines import BadLine, BatchLine, parse_line, read_batch

CHAT = "/v1/chat/completions"


def completion(custom_id: str, prompt: Any = "Hi", **body: Any) -> dict[str, Any]:
    body = {"model": "fake", "prompt": prompt, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def chat(custom_id: str, text: str = "Hi", **body: Any) -> dict[str, Any]:
    body = {"model": "fake", "messages": [{"role": "user", "content": text}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def encode(*records: Any) -> bytes:
    lines = (r if isinstance(r, bytes) else json.dumps(r).encode() for r in records)
    return b"".join(line + b"\n" for line in lines)


class Desk:
    """An input file with the job on it."""

    def __init__(self, directory: Path, content: bytes) -> None:
        self.input, self.output = directory / "in.jsonl", directory / "out.jsonl"
        self.errors = directory / "out.errors.jsonl"
        self.input.write_bytes(content)

    def run(self, llm: FakeLLM | None = None, **options: Any) -> JobStatus:
        with BatchJob(JobFiles.at(self.input, self.output), **options) as job:
            return job.run(lambda: llm or FakeLLM())

    def answers(self) -> dict[str, Any]:
        return {r["custom_id"]: without_time(r) for r in read_jsonl(self.output)}

    def failures(self) -> list[dict[str, Any]]:
        return read_jsonl(self.errors) if self.errors.exists() else []


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    records = [json.loads(line) for line in data.split(b"\n")[:-1]]
    assert len({r["id"] for r in records}) == len(records), "a line was written twice"
    return records


def without_time(record: dict[str, Any]) -> dict[str, Any]:
    body = record["response"]["body"]
    return record | {"response": record["response"] | {"body": body | {"created": 0}}}


MIXED = encode(
    completion("a"), chat("b"), b"{broken", completion("c", [72, 105]), chat("d", n=2), b"{broken",
    completion("a", "again"), completion("e", "x" * 65), completion("f", "abort me"), chat("g", "last"),
)  # fmt: skip
VALID = ["a", "b", "c", "d", "g"]
RETRIED = ["e", "f"]  # they fail for what another run may do better


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path, MIXED)


# -- lines in ----------------------------------------------------------------------------------------------


def test_every_line_ends_as_one_answer_or_one_error(desk: Desk) -> None:
    status = desk.run()
    assert sorted(desk.answers()) == VALID
    assert sorted(str(e["custom_id"]) for e in desk.failures()) == ["None", "None", "a", "e", "f"]
    assert (status.num_total, status.num_done, status.num_failed, status.num_resumed) == (10, 10, 5, 0)


def test_an_answer_line_is_as_in_the_openai_batch_api(tmp_path: Path) -> None:
    desk = Desk(tmp_path, encode(completion("a", seed=5)))
    desk.run()
    (line,) = read_jsonl(desk.output)
    assert list(line) == ["id", "custom_id", "response", "error"]
    assert line["id"].startswith("batch_req_") and line["custom_id"] == "a" and line["error"] is None
    assert list(line["response"]) == ["status_code", "request_id", "body"]
    assert line["response"]["status_code"] == 200
    body = line["response"]["body"]
    assert (body["object"], body["model"], body["usage"]["prompt_tokens"]) == (
        "text_completion",
        "fake-model",
        2,
    )
    assert body["choices"][0]["text"].startswith("é\u2028")


def test_answers_have_no_character_that_a_reader_takes_for_a_line_break(desk: Desk) -> None:
    desk.run()
    text = desk.output.read_text(encoding="utf-8")
    assert len(text.splitlines()) == len(VALID)
    assert "é" in text  # other characters stay readable


BAD_LINES: list[tuple[str, bytes, str | None, str]] = [
    ("bad JSON", b"{", None, "not JSON"),
    ("no object", b"[1]", None, "not an object"),
    ("not UTF-8", b'{"custom_id": "\xff"}', None, "not UTF-8 at byte 15"),
    ("NaN", b'{"custom_id": NaN}', None, "NaN"),
    ("endless nesting", b"[" * 200_000, None, "nested too deeply"),
    ("number of 5000 digits", b"1" * 5000, None, "not JSON"),
    ("no custom_id", encode({"method": "POST"})[:-1], None, "custom_id is missing"),
    ("empty custom_id", json.dumps(completion("")).encode(), None, "custom_id is empty"),
    ("custom_id no string", json.dumps(completion(5)).encode(), None, "custom_id=5"),  # type: ignore[arg-type]
    ("half a surrogate pair", json.dumps(completion("\ud800")).encode(), None, "surrogate"),
    ("url", json.dumps(completion("x") | {"url": "/v1/embeddings"}).encode(), "x", "'/v1/embeddings'"),
    ("url no string", json.dumps(completion("x") | {"url": {}}).encode(), "x", "url={}"),
    ("method", json.dumps(completion("x") | {"method": "GET"}).encode(), "x", "method='GET'"),
    ("no method", b'{"custom_id": "x", "url": "/v1/completions", "body": {}}', "x", "method=None"),
    ("no body", b'{"custom_id": "x", "url": "/v1/completions", "method": "POST"}', "x", "body=None"),
    ("unknown field of the line", json.dumps(completion("x") | {"extra": 1}).encode(), "x", "'extra'"),
    ("unknown field of the body", json.dumps(completion("x", extra=1)).encode(), "x", "'extra'"),
    ("unsupported field", json.dumps(chat("x", tools=[{}])).encode(), "x", "tools"),
    ("out of range", json.dumps(chat("x", temperature=-1)).encode(), "x", "temperature=-1"),
    ("empty prompt", json.dumps(completion("x", "")).encode(), "x", "empty"),
    ("over-long prompt", json.dumps(chat("x", "y" * 65)).encode(), "x", "65 tokens"),
    ("list of prompts", json.dumps(completion("x", ["a", "b"])).encode(), "x", "list of 2 prompts"),
    ("lists of ids", json.dumps(completion("x", [[1], [2]])).encode(), "x", "list of 2 prompts"),
    ("duplicate", json.dumps(completion("first", "other")).encode(), "first", "earlier line"),
    ("aborted", json.dumps(completion("x", "abort me")).encode(), "x", "gave up"),
    ("no numbers", json.dumps(completion("x", "overflow", n=2)).encode(), "x", "verify`; or float16 overflowed"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "custom_id", "message"), [b[1:] for b in BAD_LINES], ids=[b[0] for b in BAD_LINES]
)
def test_a_bad_line_is_one_error_and_the_rest_goes_on(
    tmp_path: Path, raw: bytes, custom_id: str | None, message: str
) -> None:
    desk = Desk(tmp_path, encode(completion("first"), raw, completion("last")))
    desk.run()
    assert sorted(desk.answers()) == ["first", "last"]
    (failure,) = desk.failures()
    assert (failure["custom_id"], failure["response"]) == (custom_id, None)
    assert failure["error"]["message"].startswith("line 2: ") and message in failure["error"]["message"]
    assert failure["error"]["code"]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("blank", [b"", b"\n", b" \t\r\n"])
def test_bom_crlf_blank_lines_and_a_missing_last_break_change_nothing(
    tmp_path: Path, bom: bytes, end: bytes, blank: bytes
) -> None:
    plain = Desk(tmp_path, encode(completion("a"), completion("b")))
    plain.run()
    expected = plain.answers()
    plain.output.unlink()
    lines = encode(completion("a"), completion("b")).splitlines()
    dressed = Desk(tmp_path, bom + blank + end.join([lines[0], blank + lines[1]]))
    dressed.run()
    assert dressed.answers() == expected and not dressed.failures()


@pytest.mark.parametrize("prompt", ["Hi", ["Hi"], [72, 105], [[72, 105]]])
def test_one_prompt_is_accepted_in_each_form(tmp_path: Path, prompt: Any) -> None:
    desk = Desk(tmp_path, encode(completion("a", prompt)))
    desk.run()
    assert desk.answers()["a"]["response"]["body"]["usage"]["prompt_tokens"] == 2


def test_an_endless_line_is_one_error_and_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_lines, "MAX_LINE_BYTES", 500)
    desk = Desk(tmp_path, encode(b"\0" * 1700, completion("a")))
    desk.run()
    assert sorted(desk.answers()) == ["a"]
    assert [e["error"]["code"] for e in desk.failures()] == ["line_too_long"]


@given(st.binary(max_size=200))
def test_any_bytes_are_a_line_or_a_bad_line(raw: bytes) -> None:
    line = parse_line(raw, 1)
    assert isinstance(line, BatchLine | BadLine)
    assert isinstance(line, BatchLine) or line.message.startswith("line 1: ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(["custom_id", "method", "url", "body", "\ud800"]), json_values, st.booleans())
def test_any_value_in_any_field_is_a_line_or_a_bad_line(field: str, value: Any, in_body: bool) -> None:
    record = completion("a")
    (record["body"] if in_body else record)[field] = value
    line = parse_line(json.dumps(record).encode(), 7)
    job_files.encode_line(
        {"id": line.line_id, "custom_id": line.custom_id, "e": getattr(line, "message", "")}
    )


@given(
    st.lists(st.sampled_from([b"{", b"", b"\xff", *encode(completion("a"), completion("b")).splitlines()]))
)
def test_ids_of_lines_are_unique_and_every_line_that_is_not_blank_has_one(raws: list[bytes]) -> None:
    lines = list(read_batch(io.BytesIO(b"\n".join(raws))))
    assert len({line.line_id for line in lines}) == len(lines) == sum(bool(raw) for raw in raws)


def test_the_input_is_pulled_as_the_engine_has_room(tmp_path: Path) -> None:
    desk = Desk(tmp_path, encode(*(completion(f"r{i}") for i in range(50))))
    llm = FakeLLM(capacity=3)
    pulled_ahead = 0

    def note(status: JobStatus) -> None:
        nonlocal pulled_ahead
        pulled_ahead = max(pulled_ahead, len(llm.pulled) - status.num_done)

    with BatchJob(JobFiles.at(desk.input, desk.output)) as job:
        job.run(lambda: llm, note)
    assert llm.most_running == 3 and pulled_ahead == 3


# -- before the model loads --------------------------------------------------------------------------------


def never() -> FakeLLM:
    raise AssertionError("the model was loaded")


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_an_input_without_requests_is_refused(tmp_path: Path, content: bytes) -> None:
    desk = Desk(tmp_path, content)
    with pytest.raises(JobError, match="no requests"):
        BatchJob(JobFiles.at(desk.input, desk.output))
    assert not desk.output.exists()


def test_a_missing_input_is_refused(desk: Desk) -> None:
    desk.input.unlink()
    with pytest.raises(JobError, match=r"cannot read .*in\.jsonl: No such file"):
        BatchJob(JobFiles.at(desk.input, desk.output))


def test_an_input_that_cannot_be_read_twice_is_refused(desk: Desk, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    holder = os.open(pipe, os.O_RDWR)
    try:
        with pytest.raises(JobError, match="not a regular file"):
            BatchJob(JobFiles.at(pipe, desk.output))
    finally:
        os.close(holder)


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_an_output_that_is_the_input_is_refused(desk: Desk, tmp_path: Path, link: Any) -> None:
    output = desk.input
    if link:
        output = tmp_path / "other.jsonl"
        link(desk.input, output)
    with pytest.raises(JobError, match="input and output are both"):
        JobFiles.at(desk.input, output)
    with pytest.raises(JobError, match="input and errors are both"):
        JobFiles.at(desk.input, desk.output, output)
    with pytest.raises(JobError, match="output and errors are both"):
        JobFiles.at(desk.input, desk.output, desk.output)
    assert desk.input.read_bytes() == MIXED


def test_an_output_in_a_missing_directory_is_refused(desk: Desk, tmp_path: Path) -> None:
    for paths in ((tmp_path / "no" / "out",), (desk.output, tmp_path / "no" / "errors")):
        with pytest.raises(JobError, match=r"there is no directory .*no; create it"):
            JobFiles.at(desk.input, *paths)


def test_a_directory_or_device_as_output_is_refused(desk: Desk, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="is a directory"):
        JobFiles.at(desk.input, tmp_path)
    with pytest.raises(JobError, match="not a regular file"):
        BatchJob(JobFiles.at(desk.input, "/dev/null", tmp_path / "errors"))


def test_an_output_without_permission_is_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(JobError, match="permission denied"):
        JobFiles.at(desk.input, desk.output)


def test_a_second_process_is_refused_until_the_first_ends(desk: Desk) -> None:
    files = JobFiles.at(desk.input, desk.output)
    with BatchJob(files), pytest.raises(JobError, match=r"another process is writing .*out\.jsonl"):
        BatchJob(files)
    desk.run()
    assert sorted(desk.answers()) == VALID


def test_the_error_file_is_locked_too(desk: Desk) -> None:
    desk.errors.touch()
    with desk.errors.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(JobError, match=r"another process is writing .*errors\.jsonl"):
            desk.run()
    desk.run()


def test_a_job_of_bad_lines_only_needs_no_model(tmp_path: Path) -> None:
    desk = Desk(tmp_path, encode(b"{", b"[]"))
    with BatchJob(JobFiles.at(desk.input, desk.output)) as job:
        assert job.run(never).num_failed == 2
    assert len(desk.failures()) == 2


def test_there_is_no_error_file_without_an_error(tmp_path: Path) -> None:
    desk = Desk(tmp_path, encode(completion("a")))
    desk.run()
    assert not desk.errors.exists()


# -- resume ------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> Iterator[tuple[Desk, dict[str, Any], list[Any]]]:
    (tmp_path / "whole").mkdir()
    desk = Desk(tmp_path / "whole", MIXED)
    desk.run()
    yield desk, desk.answers(), by_id(desk.failures())


def by_id(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(records, key=lambda r: str(r["id"]))


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
    job.run(FakeLLM, lambda status: time.sleep(0.02))
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
    assert 3 <= num_answered < 60
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


# -- options -----------------------------------------------------------------------------------------------


def test_ordered_answers_are_in_the_order_of_the_input(tmp_path: Path) -> None:
    ids = [f"r{i}" for i in range(20)]
    desk = Desk(tmp_path, encode(*(completion(i) for i in ids), b"{", completion("end")))
    desk.run()
    unordered = [r["custom_id"] for r in read_jsonl(desk.output)]
    desk.run(ordered=True, resume=False)
    assert [r["custom_id"] for r in read_jsonl(desk.output)] == [*ids, "end"] != unordered


def test_a_job_knows_whether_all_answers_will_be_in_order(tmp_path: Path) -> None:
    lines = {i: completion(i) for i in "abcd"}
    desk = Desk(tmp_path, encode(*lines.values()))
    desk.run(ordered=True)
    answers = dict(zip("abcd", desk.output.read_bytes().splitlines(keepends=True), strict=True))
    for held, is_in_order in (
        ("", 1),
        ("a", 1),
        ("ab", 1),
        ("abcd", 1),
        ("b", 0),
        ("ba", 0),
        ("abd", 0),
        ("abdc", 0),
    ):
        desk.output.write_bytes(b"".join(answers[i] for i in held))
        with BatchJob(JobFiles.at(desk.input, desk.output)) as job:
            assert job.is_in_order == bool(is_in_order), held
    with BatchJob(JobFiles.at(desk.input, desk.output), resume=False) as job:
        assert job.is_in_order


def test_limit_counts_valid_lines_and_leaves_the_later_ones_alone(desk: Desk) -> None:
    status = desk.run(limit=3)
    assert sorted(desk.answers()) == ["a", "b", "c"]
    assert len(desk.failures()) == 1 and status.num_total == 4
    status = desk.run()
    assert (status.num_resumed, status.num_done) == (4, 10)
    status = desk.run(limit=3)  # what lies past the limit is of this job all the same
    assert (status.num_resumed, status.num_done, status.num_total) == (4, 4, 4)


# -- trouble -----------------------------------------------------------------------------------------------


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
