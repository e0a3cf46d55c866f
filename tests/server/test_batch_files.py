"""Files as clients upload, list, read and delete them."""

import asyncio
import hashlib
import os
import tracemalloc

import openai
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from service_desk import Desk, asynchronous

from moe_lightning.server.batches import BatchLimits
from moe_lightning.server.batches.uploads import receive
from moe_lightning.server.errors import HttpError

CONTENT = os.urandom(3 * 2**20)
FORM = {"content-type": "multipart/form-data; boundary=b"}


def form(*parts):
    """A form of (headers, content) pairs, with the boundary `b`."""
    return (
        b"".join(b"--b\r\n" + headers + b"\r\n\r\n" + content + b"\r\n" for headers, content in parts)
        + b"--b--\r\n"
    )


def part(name, content, more=b""):
    return b'Content-Disposition: form-data; name="' + name + b'"' + more, content


FILE, PURPOSE = part(b"file", b"{}\n", b'; filename="a.jsonl"'), part(b"purpose", b"batch")


def stored(directory):
    """Names of all contents."""
    return sorted(p.name for d in ("files", "pending") for p in (directory / d).iterdir())


@asynchronous
async def test_a_file_comes_back_as_it_was_sent_until_it_is_deleted(tmp_path):
    async with Desk(tmp_path) as desk:
        file = await desk.client.files.create(file=("in.jsonl", CONTENT), purpose="batch")
        assert (file.bytes, file.filename, file.purpose, file.status) == (
            len(CONTENT),
            "in.jsonl",
            "batch",
            "processed",
        )
        assert file.expires_at is None and not file.model_extra
        assert await desk.client.files.retrieve(file.id) == file
        response = await desk.client.files.content(file.id)
        assert response.content == CONTENT
        assert response.response.headers["content-length"] == str(len(CONTENT))
        assert (await desk.client.files.delete(file.id)).deleted
        for call in (desk.client.files.retrieve, desk.client.files.content, desk.client.files.delete):
            with pytest.raises(openai.NotFoundError):
                await call(file.id)
        assert stored(tmp_path) == []


@asynchronous
async def test_a_large_file_is_never_whole_in_memory(tmp_path):
    size, piece = 64 * 2**20, bytes(2**16)
    digest = hashlib.sha256(bytes(size)).hexdigest()

    async def body():
        yield form(PURPOSE, FILE).removesuffix(b"\r\n--b--\r\n")[:-3]
        for _ in range(size // len(piece)):
            yield piece
        yield b"\r\n--b--\r\n"

    async with Desk(tmp_path) as desk:
        tracemalloc.start()
        file = (await desk.http.post("/files", content=body(), headers=FORM)).json()
        found = hashlib.sha256()
        body_of, _ = await _stream(desk.app, f"/v1/files/{file['id']}/content", found.update)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (file["bytes"], body_of, found.hexdigest()) == (size, size, digest)
        assert peak < 8 * 2**20


async def _stream(app, path, take):
    """Bytes and status of a response, each piece given to `take`: httpx's transport would gather them."""
    total, status = 0, None

    async def send(message):
        nonlocal total, status
        status = message.get("status", status)
        total += len(message.get("body", b""))
        take(message.get("body", b""))

    async def receive():
        await asyncio.Event().wait()

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "GET",
        "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [], "scheme": "http",
    }  # fmt: skip
    await app(scope, receive, send)
    return total, status


@asynchronous
async def test_pages_of_files_hold_each_once_in_either_order(tmp_path):
    async with Desk(tmp_path) as desk:
        ids = [await desk.upload(b"%d" % i) for i in range(7)]
        assert [f.id async for f in desk.client.files.list(limit=2)] == ids[::-1]
        assert [f.id async for f in desk.client.files.list(limit=3, order="asc")] == ids
        assert [f.id async for f in desk.client.files.list(purpose="batch_output")] == []
        assert [f.id async for f in desk.client.files.list(purpose="batch")] == ids[::-1]
        with pytest.raises(openai.NotFoundError):
            await desk.client.files.list(after=f"file-{'0' * 32}")
        for query in ({"limit": 0}, {"limit": 10_001}, {"order": "up"}, {"after": "x" * 65}):
            response = await desk.http.get("/files", params=query)
            assert response.status_code == 400 and next(iter(query)) in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "../../etc/passwd"),
        ("/etc/passwd", "/etc/passwd"),
        ("a\tb\x1b[2J", "ab[2J"),
        ("ü" * 300, "ü" * 255),
        ("", "file"),
    ],
)
@asynchronous
async def test_a_name_is_shown_and_never_a_path(tmp_path, name, shown):
    inside = tmp_path / "inside"
    async with Desk(inside) as desk:
        named = part(b"file", b"x", b'; filename="' + name.encode() + b'"')
        file = (await desk.http.post("/files", content=form(named, PURPOSE), headers=FORM)).json()
        assert file["filename"] == shown
        assert stored(inside) == [file["id"]] and [p.name for p in tmp_path.iterdir()] == ["inside"]


@pytest.mark.parametrize(
    "file_id", ["..%2fbatches.sqlite", "batches.sqlite", "%2e%2e", "file-", "%ff", "%00", "a%0a"]
)
@asynchronous
async def test_an_id_that_the_server_did_not_make_finds_nothing(tmp_path, file_id):
    async with Desk(tmp_path) as desk:
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            response = await desk.http.request(method, f"/files/{file_id}{path}")
            assert response.status_code == 404
        for method, path in (("GET", ""), ("POST", "/cancel")):
            assert (await desk.http.request(method, f"/batches/{file_id}{path}")).status_code == 404


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (form(FILE), FORM, 400, "invalid_purpose"),
        (form(FILE, part(b"purpose", b"fine-tune")), FORM, 400, "invalid_purpose"),
        (form(PURPOSE), FORM, 400, "missing_file"),
        (form(FILE, FILE, PURPOSE), FORM, 400, "duplicate_field"),
        (form(FILE, PURPOSE, PURPOSE), FORM, 400, "duplicate_field"),
        (form(*[part(b"%d" % i, b"") for i in range(20)], FILE, PURPOSE), FORM, 400, "too_many_parts"),
        (form(part(b"purpose", b"b" * 2000), FILE), FORM, 400, "field_too_long"),
        (form(PURPOSE, FILE)[:-8], FORM, 400, "malformed_form"),
        (form(PURPOSE, part(b"file", b"x" * 2000)), FORM, 413, "file_too_large"),
        (form(PURPOSE, FILE) + b" " * 2**17, FORM, 413, "file_too_large"),
        (b"nothing", FORM, 400, "malformed_form"),
        (form((b"X: " + b"y" * 10_000, b""), FILE), FORM, 400, "malformed_form"),
        (form(PURPOSE, FILE), {"content-type": "multipart/form-data"}, 400, "no_form"),
        (form(PURPOSE, FILE), {"content-type": FORM["content-type"] + "b" * 999}, 400, "malformed_form"),
        (b"{}", {"content-type": "application/json"}, 400, "no_form"),
        (form(PURPOSE, FILE), {**FORM, "sec-fetch-site": "cross-site"}, 403, "other_site"),
        (form(PURPOSE, FILE, part(b"expires_after[seconds]", b"4000")), FORM, 400, "invalid_value"),
        (
            form(
                PURPOSE, FILE, part(b"expires_after[seconds]", b"1"), part(b"expires_after[anchor]", b"created_at")
            ),
            FORM, 400, "invalid_value",
        ),
    ],
)  # fmt: skip
@asynchronous
async def test_an_upload_that_is_not_right_is_refused_and_leaves_nothing(
    tmp_path, body, headers, status, code
):
    async with Desk(tmp_path, limits=BatchLimits(file_bytes=1000)) as desk:
        response = await desk.http.post("/files", content=body, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert stored(tmp_path) == []
        assert [f async for f in desk.client.files.list()] == []


@asynchronous
async def test_an_upload_that_stalls_or_breaks_off_leaves_nothing(tmp_path):
    never = asyncio.Event()

    async def stalls():
        yield form(PURPOSE, FILE)[:-20]
        await never.wait()

    async with Desk(tmp_path, limits=BatchLimits(upload_idle_seconds=0.02)) as desk:
        assert (await desk.http.post("/files", content=stalls(), headers=FORM)).status_code == 408
        assert stored(tmp_path) == []
    async with Desk(tmp_path) as desk:
        sending = asyncio.ensure_future(desk.http.post("/files", content=stalls(), headers=FORM))
        while not stored(tmp_path):
            await asyncio.sleep(0.001)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        while stored(tmp_path):
            await asyncio.sleep(0.001)
        assert await desk.upload(b"x")


@asynchronous
async def test_an_upload_that_drips_is_ended_though_it_never_pauses(tmp_path):
    async def drips():
        yield form(PURPOSE, FILE)[:-20]
        while True:
            await asyncio.sleep(0.001)
            yield b"x"

    limits = BatchLimits(upload_idle_seconds=0.2, upload_rate=10**9, file_bytes=10**6)
    async with Desk(tmp_path, limits=limits) as desk:
        refused = await desk.http.post("/files", content=drips(), headers=FORM)
        assert (refused.status_code, refused.json()["error"]["code"]) == (408, "slow_upload")
        assert stored(tmp_path) == []


@asynchronous
async def test_uploads_at_a_time_and_files_are_bounded(tmp_path):
    gate = asyncio.Event()

    async def waits():
        yield form(PURPOSE, FILE)[:-20]
        await gate.wait()
        yield form(PURPOSE, FILE)[-20:]

    async with Desk(tmp_path, limits=BatchLimits(uploads=1, files=1)) as desk:
        sending = asyncio.ensure_future(desk.http.post("/files", content=waits(), headers=FORM))
        while not stored(tmp_path):
            await asyncio.sleep(0.001)
        with pytest.raises(openai.RateLimitError):
            await desk.upload(b"x")
        gate.set()
        assert (await sending).status_code == 200
        with pytest.raises(openai.BadRequestError, match="1 files with 3 bytes are stored"):
            await desk.upload(b"x")
    async with Desk(tmp_path, limits=BatchLimits(stored_bytes=3)) as desk:
        with pytest.raises(openai.BadRequestError, match="delete some"):
            await desk.upload(b"x")


@asynchronous
async def test_a_file_expires_by_the_clock(tmp_path):
    now = [1000.0]
    async with Desk(tmp_path, clock=lambda: now[0]) as desk:
        file = await desk.client.files.create(
            file=("a", b"x"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert file.expires_at == 4600
        other = await desk.upload(b"y")
        now[0] = 4600.0
        while (found := stored(tmp_path)) != [other]:
            assert other in found
            await asyncio.sleep(0.001)


PIECES = [
    b"--b\r\n", b"--b--", b"\r\n", b"\r\n\r\n", b"Content-Disposition: form-data;", b' name="file"', b"batch",
    b'; filename="\xff"', b' name="purpose"', b"--", b"\x00", b"b", b"Content-Type: a",
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=20), st.integers(1, 40))
@example([form(FILE, PURPOSE)], 1)
@settings(deadline=None)
def test_any_bytes_as_a_form_are_a_file_or_refused(tmp_path_factory, pieces, step):
    body = b"".join(pieces)
    path = tmp_path_factory.getbasetemp() / "form"
    path.unlink(missing_ok=True)

    async def sent():
        for i in range(0, len(body), step):
            yield body[i : i + step]

    try:
        upload = asyncio.run(receive(sent(), FORM["content-type"], path, BatchLimits()))
    except HttpError as error:
        assert error.status == 400 and body != form(FILE, PURPOSE)
    else:
        assert upload.num_bytes == path.stat().st_size
