"""Batches as openai's own client sees them."""

import asyncio
import json

import openai
import pytest
from openai.types import Batch, FileDeleted, FileObject
from service_desk import QUICK, Desk, FakeEngine, asynchronous, encode, line

from moe_lightning.server.batches import BatchLimits


@asynchronous
async def test_a_batch_answers_each_line_and_has_the_fields_of_the_client_types(tmp_path):
    async with Desk(tmp_path) as desk:
        batch = await desk.run(line("a", "one"), line("b", "two"), metadata={"k": "v"})
        assert batch.status == "completed" and batch.metadata == {"k": "v"} and batch.model == "fake"
        assert batch.request_counts.to_dict() == {"total": 2, "completed": 2, "failed": 0}
        assert (batch.usage.input_tokens, batch.usage.output_tokens, batch.usage.total_tokens) == (6, 4, 10)
        assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
        assert batch.expires_at == batch.created_at + 24 * 3600
        assert batch.error_file_id is None and batch.errors is None and batch.cancelled_at is None
        answers = await desk.lines(batch.output_file_id)
        assert {k: v["response"]["body"]["choices"][0]["text"] for k, v in answers.items()} == {
            "a": "one", "b": "two"
        }  # fmt: skip
        assert all(v["response"]["status_code"] == 200 and v["error"] is None for v in answers.values())
        assert {v["response"]["request_id"] for v in answers.values()} == {i for _, _, i in desk.engine.asked}
        output = await desk.client.files.retrieve(batch.output_file_id)
        assert output.purpose == "batch_output"
        assert output.bytes == len((await desk.client.files.content(output.id)).content)
        for found, kind in ((batch, Batch), (output, FileObject)):
            assert not found.model_extra and set(found.to_dict()) == set(kind.model_fields)
            kind.model_validate(found.to_dict(), strict=True)


@asynchronous
async def test_lines_that_fail_are_in_the_error_file_with_what_was_answered(tmp_path):
    async with Desk(tmp_path) as desk:
        batch = await desk.run(
            line("good"), line("bad", status=400), b"{", line("good"), line("url", url="/v1/x")
        )
        assert batch.status == "completed"
        assert batch.request_counts.to_dict() == {"total": 5, "completed": 1, "failed": 4}
        assert set(await desk.lines(batch.output_file_id)) == {"good"}
        failed = await desk.lines(batch.error_file_id)
        assert failed["bad"]["response"]["status_code"] == 400
        assert failed["bad"]["response"]["body"]["error"]["code"] == "asked"
        codes = {k: v["error"]["code"] for k, v in failed.items()}
        assert codes == {
            "bad": "asked", None: "invalid_json", "good": "duplicate_custom_id", "url": "invalid_url"
        }  # fmt: skip
        assert failed["bad"]["error"]["message"] == "line 2: as asked"
        assert len(desk.engine.asked) == 2


@pytest.mark.parametrize(
    ("content", "limits", "codes"),
    [
        (b"", QUICK, ["empty_file"]),
        (b"\n \n", QUICK, ["empty_file"]),
        (b"\xff\xfe", QUICK, ["invalid_json"]),
        (b"{}\n[]\n", QUICK, ["missing_custom_id", "invalid_line"]),
        (encode(line("a"), line("b")), BatchLimits(requests=1), ["too_many_requests"]),
        (encode(line("a", x="y" * 500)), BatchLimits(line_bytes=300), ["line_too_long"]),
        (encode(line("a", x=[[[]]])), BatchLimits(body_depth=3), ["invalid_body"]),
    ],
)
@asynchronous
async def test_an_input_without_one_usable_line_fails_with_the_lines_that_are_wrong(
    tmp_path, content, limits, codes
):
    async with Desk(tmp_path, limits=limits) as desk:
        file_id = await desk.upload(content)
        batch = await desk.client.batches.create(
            input_file_id=file_id, endpoint="/v1/completions", completion_window="24h"
        )
        batch = await desk.ended(batch.id)
        assert batch.status == "failed" and batch.failed_at and batch.errors.object == "list"
        assert [e.code for e in batch.errors.data] == codes
        if codes[0] not in ("empty_file", "too_many_requests"):
            assert [e.line for e in batch.errors.data] == list(range(1, len(codes) + 1))
        assert not batch.output_file_id and not batch.error_file_id and not desk.engine.asked


@asynchronous
async def test_cancelling_aborts_what_runs_and_keeps_what_is_done(tmp_path):
    engine = FakeEngine(is_open=False)
    engine.reply = lambda body: (200, {"choices": []})
    async with Desk(tmp_path, engine, BatchLimits(requests_in_flight=3, tick_seconds=0.01)) as desk:
        batch = await desk.begin(*(line(f"id-{i}") for i in range(10)))
        await engine.until(lambda: engine.running == 3)
        assert (await desk.client.batches.retrieve(batch.id)).status == "in_progress"
        engine.gate.set()
        engine.gate.clear()
        await engine.until(lambda: len(engine.asked) == 6)
        cancelled = await desk.client.batches.cancel(batch.id)
        assert cancelled.status == "cancelling" and cancelled.cancelling_at
        batch = await desk.ended(batch.id)
        assert batch.status == "cancelled" and batch.cancelled_at and len(engine.cancelled) == 3
        assert batch.request_counts.to_dict() == {"total": 10, "completed": 3, "failed": 7}
        answered, failed = await desk.lines(batch.output_file_id), await desk.lines(batch.error_file_id)
        assert set(answered) | set(failed) == {f"id-{i}" for i in range(10)} and len(answered) == 3
        assert {v["error"]["code"] for v in failed.values()} == {"batch_cancelled"}
        with pytest.raises(openai.BadRequestError, match="is cancelled"):
            await desk.client.batches.cancel(batch.id)


@asynchronous
async def test_a_batch_that_waits_for_another_can_be_cancelled(tmp_path):
    engine = FakeEngine(is_open=False)
    async with Desk(tmp_path, engine, BatchLimits(requests_in_flight=1)) as desk:
        await desk.begin(line("a"), line("b"))
        waiting = await desk.begin(line("c"))
        await desk.client.batches.cancel(waiting.id)
        waiting = await desk.ended(waiting.id)
        assert waiting.status == "cancelled"
        assert set(await desk.lines(waiting.error_file_id)) == {"c"}


@asynchronous
async def test_a_batch_expires_by_the_clock_and_keeps_what_is_done(tmp_path):
    now = [1000.0]
    engine = FakeEngine(is_open=False)
    limits = BatchLimits(requests_in_flight=1, tick_seconds=0.005)
    async with Desk(tmp_path, engine, limits, clock=lambda: now[0]) as desk:
        batch = await desk.begin(line("a"), line("b"), line("c"))
        await engine.until(lambda: engine.running == 1)
        engine.gate.set()
        engine.gate.clear()
        await engine.until(lambda: len(engine.asked) == 2)
        now[0] = 1000.0 + 24 * 3600 - 1
        assert (await desk.client.batches.retrieve(batch.id)).status == "in_progress"
        now[0] += 1
        batch = await desk.ended(batch.id)
        assert batch.status == "expired" and batch.expired_at == 1000 + 24 * 3600
        assert set(await desk.lines(batch.output_file_id)) == {"a"}
        failed = await desk.lines(batch.error_file_id)
        assert {k: v["error"]["code"] for k, v in failed.items()} == {
            "b": "batch_expired",
            "c": "batch_expired",
        }


@asynchronous
async def test_a_batch_that_expired_while_no_server_ran_asks_for_nothing_more(tmp_path):
    now, engine = [1000.0], FakeEngine(is_open=False)
    async with Desk(tmp_path, engine, clock=lambda: now[0]) as desk:
        batch = await desk.begin(line("a"))
        await engine.until(lambda: engine.running == 1)
    now[0] += 24 * 3600
    limits, engine = BatchLimits(tick_seconds=3600), FakeEngine()
    async with Desk(tmp_path, engine, limits, clock=lambda: now[0]) as desk:
        batch = await desk.ended(batch.id)
        assert (batch.status, engine.asked) == ("expired", [])
        assert set(await desk.lines(batch.error_file_id)) == {"a"}


@asynchronous
async def test_a_line_with_which_passes_fail_again_and_again_becomes_an_error(tmp_path):
    engine = FakeEngine()

    async def answer(url, body, request_id):
        if body["prompt"] == "bad":
            engine.asked.append(body)
            return 503, {"error": {"message": "the engine gave up", "code": "aborted"}}
        return await engine(url, body, request_id)

    async with Desk(tmp_path, answer, BatchLimits(retry_seconds=0.001, aborts=3)) as desk:
        batch = await desk.run(line("a", "bad"), line("b"))
        assert batch.status == "completed" and set(await desk.lines(batch.output_file_id)) == {"b"}
        failed = await desk.lines(batch.error_file_id)
        assert failed["a"]["error"]["code"] == "aborted"
        assert len(engine.asked) == 4


@asynchronous
async def test_the_oldest_batch_goes_first_and_the_next_fills_its_tail(tmp_path):
    engine = FakeEngine(is_open=False)
    async with Desk(tmp_path, engine, BatchLimits(requests_in_flight=4)) as desk:
        batches = [await desk.begin(*(line(f"{name}{i}", f"{name}{i}") for i in range(3))) for name in "abc"]
        await engine.until(lambda: engine.running == 4)
        assert [body["prompt"] for _, body, _ in engine.asked] == ["a0", "a1", "a2", "b0"]
        engine.gate.set()
        for batch in batches:
            assert (await desk.ended(batch.id)).status == "completed"
        assert [body["prompt"][0] for _, body, _ in engine.asked] == list("aaabbbccc")
        assert engine.most_running == 4


@asynchronous
async def test_bytes_in_flight_are_bounded_but_a_line_larger_than_the_bound_is_answered(tmp_path):
    engine = FakeEngine(is_open=False)
    async with Desk(tmp_path, engine, BatchLimits(bytes_in_flight=500)) as desk:
        batch = await desk.begin(line("a"), line("b"), line("large", "x" * 1000), line("c"))
        await engine.until(lambda: engine.running == 2)
        engine.gate.set()
        assert (await desk.ended(batch.id)).request_counts.completed == 4
        assert engine.most_running == 2


@asynchronous
async def test_what_the_engine_cannot_take_now_is_asked_again(tmp_path):
    engine, refusals = FakeEngine(), {"a": [503, 429], "b": []}

    async def answer(url, body, request_id):
        refused = refusals[body["prompt"]]
        return (refused.pop(), {"error": {}}) if refused else await engine(url, body, request_id)

    async with Desk(tmp_path, answer) as desk:
        batch = await desk.run(line("a", "a"), line("b", "b"))
        assert batch.request_counts.completed == 2 and batch.error_file_id is None


@asynchronous
async def test_an_answer_that_raises_or_is_given_up_by_the_engine_loses_no_line(tmp_path):
    given_up = []

    async def answer(url, body, request_id):
        if body["prompt"] == "raise":
            raise RuntimeError("secret")
        if body["prompt"] == "give up" and not given_up:
            given_up.append(request_id)
            raise asyncio.CancelledError
        if body["prompt"] == "nan":
            return 200, {"x": float("nan")}
        return 200, {"x": 1}

    async with Desk(tmp_path, answer) as desk:
        batch = await desk.run(line("a", "raise"), line("b", "give up"), line("c", "nan"), line("d"))
        assert batch.status == "completed" and set(await desk.lines(batch.output_file_id)) == {"b", "d"}
        failed = await desk.lines(batch.error_file_id)
        assert {k: v["error"]["code"] for k, v in failed.items()} == {
            "a": "internal_error",
            "c": "internal_error",
        }
        assert "secret" not in str(failed)


@asynchronous
async def test_pages_of_batches_are_newest_first_and_hold_each_once(tmp_path):
    async with Desk(tmp_path) as desk:
        ids = [(await desk.run(line("a"))).id for _ in range(7)]
        first = await desk.client.batches.list(limit=3)
        assert [b.id for b in first.data] == ids[:-4:-1] and first.has_more
        assert [b.id async for b in desk.client.batches.list(limit=3)] == ids[::-1]
        last = (await desk.http.get("/batches", params={"after": ids[1]})).json()
        assert [b["id"] for b in last["data"]] == ids[:1] and not last["has_more"]
        assert last["first_id"] == last["last_id"] == ids[0]
        with pytest.raises(openai.NotFoundError, match="there is no batch"):
            await desk.client.batches.list(after="batch_0")
        for limit in (0, 101, "x"):
            assert (await desk.http.get("/batches", params={"limit": limit})).status_code == 400


@asynchronous
async def test_only_so_many_batches_are_open_and_so_many_records_kept(tmp_path):
    engine = FakeEngine(is_open=False)
    async with Desk(tmp_path, engine, BatchLimits(open_batches=2, batches=3, tick_seconds=0.01)) as desk:
        opened = [await desk.begin(line("a")) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as caught:
            await desk.begin(line("a"))
        assert int(caught.value.response.headers["retry-after"]) > 0
        engine.gate.set()
        for batch in opened:
            await desk.ended(batch.id)
        later = [(await desk.run(line("a"))).id for _ in range(4)]
        assert [b.id async for b in desk.client.batches.list()] == later[:0:-1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"completion_window": "1y"}, "24h"),
        ({"completion_window": "8d"}, "168h at most"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"metadata": {f"k{i}": "v" for i in range(17)}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"extra_body": {"priority": 1}}, "priority"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after.seconds"),
    ],
)
@asynchronous
async def test_a_batch_that_cannot_be_is_refused_by_name(tmp_path, changes, says):
    async with Desk(tmp_path) as desk:
        given = {
            "endpoint": "/v1/completions",
            "completion_window": "24h",
            "input_file_id": await desk.upload(b"x"),
        }
        with pytest.raises(openai.BadRequestError) as caught:
            await desk.client.batches.create(**{**given, **changes})
        assert says in caught.value.message
        assert [b async for b in desk.client.batches.list()] == []


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"\xff", b"[" * 50_000, b"null", b'{"input_file_id": 1}', b"{}" + b" " * 70_000,
        b'{"\\ud800": 1}', b'{"input_file_id": "\\ud800", "endpoint": "/v1/completions"}',
        b'{"metadata": {"\\ud800": "x"}}', b'{"completion_window": "\\u0661h"}', b'{"metadata": 1e999}',
    ],
)  # fmt: skip
@asynchronous
async def test_a_body_that_is_no_batch_is_refused_with_a_message(tmp_path, body):
    async with Desk(tmp_path) as desk:
        response = await desk.http.post(
            "/batches", content=body, headers={"content-type": "application/json"}
        )
        assert 400 <= response.status_code < 500 and response.json()["error"]["message"]
        response = await desk.http.post("/batches", content=body, headers={"content-type": "text/plain"})
        assert response.status_code == 415


@asynchronous
async def test_the_body_of_a_batch_may_be_as_large_as_the_limit(tmp_path):
    async with Desk(tmp_path, limits=BatchLimits(order_bytes=300)) as desk:
        given = {"endpoint": "/v1/completions", "completion_window": "24h"}
        file_id = await desk.upload(encode(line("a")))
        body = json.dumps({"input_file_id": file_id, **given}).encode().ljust(300)
        headers = {"Content-Type": "application/json"}
        assert (await desk.http.post("/batches", content=body, headers=headers)).status_code == 200
        refused = await desk.http.post("/batches", content=body + b" ", headers=headers)
        assert refused.status_code == 413 and "larger than 300 bytes" in refused.text


@asynchronous
async def test_a_batch_of_an_unknown_or_an_output_file_is_refused(tmp_path):
    async with Desk(tmp_path) as desk:
        done = await desk.run(line("a"))
        given = {"endpoint": "/v1/completions", "completion_window": "24h"}
        for name in ("file-0", "../batches.sqlite", f"file-{'0' * 32}"):
            with pytest.raises(openai.NotFoundError):
                await desk.client.batches.create(input_file_id=name, **given)
        with pytest.raises(openai.BadRequestError, match="batch_output"):
            await desk.client.batches.create(input_file_id=done.output_file_id, **given)


@asynchronous
async def test_output_files_go_when_the_batch_says_so(tmp_path):
    now = [1000.0]
    async with Desk(tmp_path, clock=lambda: now[0]) as desk:
        batch = await desk.run(line("a"), output_expires_after={"anchor": "created_at", "seconds": 3600})
        assert (await desk.client.files.retrieve(batch.output_file_id)).expires_at == 4600
        now[0] = 4600
        while batch.output_file_id in [f.id async for f in desk.client.files.list()]:
            await asyncio.sleep(0.002)
        assert not (tmp_path / "files" / batch.output_file_id).exists()


@asynchronous
async def test_an_input_that_an_open_batch_reads_cannot_be_deleted(tmp_path):
    engine = FakeEngine(is_open=False)
    async with Desk(tmp_path, engine) as desk:
        batch = await desk.begin(line("a"))
        with pytest.raises(openai.BadRequestError, match=batch.id):
            await desk.client.files.delete(batch.input_file_id)
        engine.gate.set()
        await desk.ended(batch.id)
        deleted = await desk.client.files.delete(batch.input_file_id)
        assert deleted == FileDeleted(id=batch.input_file_id, deleted=True, object="file")


@asynchronous
async def test_a_batch_keeps_the_limits_that_it_began_with(tmp_path):
    engine = FakeEngine(is_open=False)
    async with Desk(tmp_path, engine, BatchLimits(requests_in_flight=1)) as desk:
        batch = await desk.begin(*(line(f"id-{i}", "x" * 200) for i in range(3)))
        await engine.until(lambda: engine.running == 1)
        engine.gate.set()
        engine.gate.clear()
        await engine.until(lambda: len(engine.asked) == 2)
    async with Desk(tmp_path, limits=BatchLimits(line_bytes=100, body_depth=1)) as desk:
        batch = await desk.ended(batch.id)
        assert batch.request_counts.completed == batch.request_counts.total == 3


@asynchronous
async def test_stopping_parks_batches_and_starting_goes_on_with_them(tmp_path):
    engine = FakeEngine(is_open=False)
    limits = BatchLimits(requests_in_flight=2)
    lines = [line(f"id-{i}", f"p{i}") for i in range(5)]
    async with Desk(tmp_path, engine, limits) as desk:
        first, second = await desk.begin(*lines), await desk.begin(line("z"))
        await engine.until(lambda: engine.running == 2)
        engine.gate.set()
        engine.gate.clear()
        await engine.until(lambda: len(engine.asked) == 4)
        response = await desk.http.get(f"/batches/{first.id}")
        assert response.json()["status"] == "in_progress"
    assert (await _without_service(desk)).status_code == 503
    async with Desk(tmp_path) as desk:
        batch = await desk.ended(first.id)
        assert batch.status == "completed" and batch.usage.total_tokens == 25
        assert set(await desk.lines(batch.output_file_id)) == {f"id-{i}" for i in range(5)}
        assert {body["prompt"] for _, body, _ in desk.engine.asked} == {"p2", "p3", "p4", "hi"}
        assert {i for _, _, i in desk.engine.asked} >= {i for _, _, i in engine.asked[2:]}
        assert (await desk.ended(second.id)).status == "completed"


async def _without_service(desk):
    import httpx2

    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(desk.app), base_url="http://test/v1"
    ) as http:
        return await http.get("/files")
