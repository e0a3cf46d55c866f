"""Full disks, damaged files, a directory that is in use: clear errors, and nothing half-written."""

import asyncio
import errno
import os
import random
import resource
import shutil

import openai
import pytest
from service_desk import Desk, FakeEngine, asynchronous, encode, line

from moe_lightning.errors import JobError
from moe_lightning.server.batches import BatchLimits
from moe_lightning.server.batches.run import Run
from moe_lightning.server.batches.shelf import Shelf


@asynchronous
async def test_answers_wait_until_the_disk_has_room(tmp_path, monkeypatch):
    is_full, write, sizes = [False], os.write, []

    def fills_up(fd, data):
        if not is_full[0]:
            return write(fd, data)
        if len(data) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if bytes(data[:1]) == b"{":  # a line begins: what did the one before leave?
            sizes.append(os.fstat(fd).st_size)
        return write(fd, data[:-1])

    engine = FakeEngine(is_open=False)
    async with Desk(tmp_path, engine) as desk:
        batch = await desk.begin(*(line(f"id-{i}") for i in range(20)), line("bad", status=400))
        await engine.until(lambda: engine.running == 21)
        monkeypatch.setattr(os, "write", fills_up)
        is_full[0] = True
        engine.gate.set()
        while not (found := await desk.client.batches.retrieve(batch.id)).errors:
            await asyncio.sleep(0.001)
        assert found.status == "in_progress" and found.errors.data[0].code == "waiting"
        assert "No space left on device" in found.errors.data[0].message
        assert str(tmp_path) not in found.errors.data[0].message
        while len(sizes) < 50:  # of lines that are tried more than once
            await asyncio.sleep(0.001)
        assert not any(sizes)
        is_full[0] = False
        batch = await desk.ended(batch.id)
        assert batch.status == "completed" and batch.errors is None
        assert len(await desk.lines(batch.output_file_id)) == 20 and len(engine.asked) == 21


@asynchronous
async def test_a_line_that_could_not_be_made_durable_is_written_again_and_not_twice(tmp_path, monkeypatch):
    failures, fsync = [errno.EIO, errno.ENOSPC], os.fsync

    def fails(fd):
        path = os.readlink(f"/proc/self/fd/{fd}")
        if failures and "/files/" in path:
            code = failures.pop()
            raise OSError(code, os.strerror(code))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fails)
    async with Desk(tmp_path) as desk:
        batch = await desk.run(*(line(f"id-{i}") for i in range(80)))
        assert not failures and batch.request_counts.completed == 80
        assert len(await desk.lines(batch.output_file_id)) == 80


@asynchronous
async def test_a_batch_that_waits_for_the_disk_can_be_stopped_and_goes_on_later(tmp_path, monkeypatch):
    def full(fd, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        async with Desk(tmp_path) as desk:
            file_id = await desk.upload(encode(line("a"), line("b")))
            patch.setattr(os, "write", full)
            given = {"endpoint": "/v1/completions", "completion_window": "24h"}
            batch = await desk.client.batches.create(input_file_id=file_id, **given)
            while not (await desk.client.batches.retrieve(batch.id)).errors:
                await asyncio.sleep(0.001)
            await desk.client.batches.cancel(batch.id)
    async with Desk(tmp_path) as desk:
        batch = await desk.ended(batch.id)
        assert batch.status == "cancelled"
        assert set(await desk.lines(batch.error_file_id)) == {"a", "b"}


@asynchronous
async def test_files_that_may_not_grow_are_errors_that_pass(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with Desk(tmp_path) as desk:
        lines = [line(f"id-{i}", "x" * 700) for i in range(300)]
        kept = await desk.upload(encode(*lines))
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (192 * 1024, hard))
            with pytest.raises(openai.InternalServerError, match="disk takes nothing more"):
                await desk.upload(bytes(2**20))
            assert [p.name for p in (tmp_path / "files").iterdir()] == [kept]
            assert not list((tmp_path / "pending").iterdir())
            given = {"endpoint": "/v1/completions", "completion_window": "24h", "input_file_id": kept}
            created = []
            with pytest.raises(openai.InternalServerError) as caught:
                for _ in range(20):
                    created.append((await desk.client.batches.create(**given)).id)
            assert caught.value.status_code == 507
            assert [b.id async for b in desk.client.batches.list()] == created[::-1]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert created
        for batch_id in created:
            batch = await desk.ended(batch_id)
            assert batch.status == "completed" and len(await desk.lines(batch.output_file_id)) == 300
        assert len(desk.engine.asked) == 300 * len(created)


@asynchronous
async def test_a_full_database_refuses_and_keeps_what_it_has(tmp_path):
    async with Desk(tmp_path) as desk:
        file_id = await desk.upload(encode(line("a")))
        database = desk.service._running.shelf.store._db
        database.execute("PRAGMA max_page_count = 1")
        with pytest.raises(openai.InternalServerError, match="full"):
            for _ in range(50):
                await desk.upload(b"x" * 100)
        files = [f.id async for f in desk.client.files.list()]
        assert sorted(files) == sorted(p.name for p in (tmp_path / "files").iterdir()) and file_id in files
        assert not list((tmp_path / "pending").iterdir())
        database.execute("PRAGMA max_page_count = 1000000")
        assert await desk.upload(b"x")


@pytest.fixture(scope="module")
def parked(tmp_path_factory):
    """Directory with a batch that has ended and one that has not."""
    directory = tmp_path_factory.mktemp("parked") / "service"

    @asynchronous
    async def fill():
        engine = FakeEngine()
        async with Desk(directory, engine, BatchLimits(requests_in_flight=1)) as desk:
            await desk.run(
                *(line(f"id-{i}") for i in range(3)), line("bad", status=400), metadata={"a": "b" * 400}
            )
            for _ in range(20):  # more pages
                await desk.upload(b"x", "n" * 250)
            engine.gate.clear()
            await desk.begin(*(line(f"id-{i}") for i in range(4)))
            await engine.until(lambda: engine.running == 1)

    fill()
    return directory


async def _seen(desk):
    files = [f.to_dict() async for f in desk.client.files.list()]
    batches = [b.to_dict() async for b in desk.client.batches.list()]
    return files, [{**b, "status": None, "errors": None} for b in batches]


async def _all_done(desk):
    async for batch in desk.client.batches.list():
        ended = await desk.ended(batch.id)
        assert ended.status == "completed"
        done, failed = await desk.lines(ended.output_file_id), await desk.lines(ended.error_file_id)
        assert ended.request_counts.to_dict() == {
            "total": 4, "completed": len(done), "failed": len(failed)
        }  # fmt: skip
        assert len(done.keys() | failed.keys()) == 4


PAGE = 4096


@pytest.mark.parametrize("kind", ["noise", "zeros", "one byte"])
def test_a_damaged_database_is_refused_or_makes_no_difference(parked, tmp_path, kind):
    draw, refused = random.Random(5), 0
    size = (parked / "batches.sqlite").stat().st_size
    assert size >= 4 * PAGE
    spots = range(0, size, PAGE) if kind != "one byte" else [draw.randrange(size) for _ in range(12)]

    seen = []

    @asynchronous
    async def look(directory):
        engine = FakeEngine(is_open=False)
        async with Desk(directory, engine) as desk:
            seen.append(await _seen(desk))
            engine.gate.set()
            await _all_done(desk)

    for spot in [None, *spots]:
        directory = tmp_path / str(spot)
        shutil.copytree(parked, directory)
        if spot is not None:
            _damage(directory / "batches.sqlite", spot, kind, draw)
        try:
            look(directory)
        except JobError as error:
            assert "damaged" in str(error) and str(directory / "batches.sqlite") in str(error)
            refused += 1
            continue
        assert seen.pop() == seen[0] if spot is not None else seen
    assert refused


def _damage(path, spot, kind, draw):
    with path.open("r+b") as file:
        file.seek(spot)
        old = file.read(1)
        file.seek(spot)
        one = bytes([old[0] ^ (1 << draw.randrange(8))])
        file.write({"noise": draw.randbytes(PAGE), "zeros": bytes(PAGE), "one byte": one}[kind])


@pytest.mark.parametrize("change", ["truncated", "emptied", "removed"])
@asynchronous
async def test_a_database_that_lacks_something_is_not_begun_anew(parked, tmp_path, change):
    directory = tmp_path / "service"
    shutil.copytree(parked, directory)
    database = directory / "batches.sqlite"
    if change == "removed":
        database.unlink()
    else:
        os.truncate(database, 0 if change == "emptied" else database.stat().st_size - PAGE)
    files = sorted(p.name for p in (directory / "files").iterdir())
    with pytest.raises(JobError, match=r"damaged|put batches\.sqlite back"):
        await Desk(directory).service.start()
    assert sorted(p.name for p in (directory / "files").iterdir()) == files


@asynchronous
async def test_a_damaged_output_fails_its_batch_and_can_be_read(parked, tmp_path):
    directory = tmp_path / "service"
    shutil.copytree(parked, directory)
    shelf = Shelf(directory)
    (record,) = shelf.store.open_batches()
    shelf.close()
    (directory / "files" / record.answers_id).write_bytes(b"noise\n")
    async with Desk(directory) as desk:
        batch = await desk.ended(record.batch.id)
        assert batch.status == "failed" and batch.errors.data[0].code == "storage_damaged"
        assert (await desk.client.files.content(batch.output_file_id)).content == b"noise\n"
        assert not desk.engine.asked


@asynchronous
async def test_a_batch_whose_input_is_gone_fails_and_others_go_on(tmp_path):
    engine = FakeEngine(is_open=False)
    async with Desk(tmp_path, engine) as desk:
        first, second = await desk.begin(line("a")), await desk.begin(line("b"))
    (tmp_path / "files" / first.input_file_id).unlink()
    async with Desk(tmp_path) as desk:
        first, second = await desk.ended(first.id), await desk.ended(second.id)
        assert first.status == "failed" and first.errors.data[0].code == "unreadable_file"
        assert second.status == "completed"


@asynchronous
async def test_a_directory_serves_one_service_at_a_time(tmp_path):
    async with Desk(tmp_path):
        with pytest.raises(JobError, match="another process is writing"):
            await Desk(tmp_path).service.start()
    async with Desk(tmp_path):
        pass
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(JobError, match="cannot write"):
        await Desk(tmp_path / "file").service.start()


@asynchronous
async def test_an_end_that_is_interrupted_is_brought_to_its_end_by_the_next_start(tmp_path, monkeypatch):
    refuse, left = Run.refuse, [2]

    def breaks(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("secret")
        refuse(self, *args)

    engine = FakeEngine(is_open=False)
    now = [1000.0]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "refuse", breaks)
        async with Desk(tmp_path, engine, clock=lambda: now[0]) as desk:
            cancelled = await desk.begin(*(line(f"id-{i}") for i in range(5)))
            expired = await desk.begin(line("a"))
            await engine.until(lambda: engine.running == 6)
            await desk.client.batches.cancel(cancelled.id)
            while not (found := await desk.client.batches.retrieve(cancelled.id)).errors:
                await asyncio.sleep(0.001)
            assert found.status == "cancelling" and "secret" not in found.errors.data[0].message
            assert (await desk.client.batches.retrieve(expired.id)).status == "in_progress"
    now[0] = 1000.0 + 25 * 3600
    async with Desk(tmp_path, FakeEngine(is_open=False), clock=lambda: now[0]) as desk:
        for batch_id, status, ids in (
            (cancelled.id, "cancelled", {f"id-{i}" for i in range(5)}),
            (expired.id, "expired", {"a"}),
        ):
            batch = await desk.ended(batch_id)
            failed = await desk.lines(batch.error_file_id)
            assert batch.status == status and set(failed) == ids
            assert {row["error"]["code"] for row in failed.values()} == {f"batch_{status}"}
            assert batch.request_counts.failed == batch.request_counts.total == len(ids)
