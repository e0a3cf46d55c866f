"""Lines in, lines out: each line of a batch file ends once, whatever is in it."""

from __future__ import annotations

import fcntl
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from batch_desk import MIXED, VALID, Desk, chat, completion, encode, never, read_jsonl
from fake_llm import FakeLLM
from hypothesis import given
from hypothesis import strategies as st

from moe_lightning.errors import JobError
from moe_lightning.jobs import BatchJob, JobFiles, JobStatus
from moe_lightning.jobs import files as job_files
from moe_lightning.jobs import lines as job_lines
from moe_lightning.jobs.lines import BadLine, BatchLine, parse_line, read_batch


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
    monkeypatch.setattr(job_lines, "_RULES", job_lines.LineRules(max_bytes=500))
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
