"""A service killed again and again ends with every line exactly once, and asks for none that is answered."""

import json
import os
import subprocess
import sys
from pathlib import Path

from killed_service import BATCHES, POINTS
from service_desk import Desk, asynchronous

KILLS = [
    ("upload-recorded", 1), ("upload-published", 1), ("batch-recorded", 1), ("batch-recorded", 1), ("validated", 1),
    ("change", 1), ("changed", 1), ("opened", 1), ("asked", 5), ("torn", 3), ("written", 7), ("torn", 1),
    ("asked", 1), ("written", 20), ("torn", 14), ("opened", 2), ("torn", 1), ("synced", 1), ("finished", 1),
    ("ending", 1), ("ended", 1),
]  # fmt: skip


def answered(directory):
    """Custom ids in whole lines of all outputs."""
    ids = set()
    for path in (directory / "files").iterdir():
        for row in path.read_bytes().split(b"\n")[:-1]:
            if row.startswith(b'{"id": "batch_req_'):
                ids.add(json.loads(row)["custom_id"])
    return ids


def test_every_line_is_done_exactly_once_whenever_the_service_is_killed(tmp_path):
    directory, logs = tmp_path / "service", tmp_path / "logs"
    logs.mkdir()
    script = Path(__file__).with_name("killed_service.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(directory), str(logs)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert {point for point, _ in KILLS} == set(POINTS)
    with process:
        for number, (point, count) in enumerate([*KILLS, ("none", 0)]):
            before = answered(directory) if directory.exists() else set()
            print(point, count, file=process.stdin, flush=True)
            outcome = process.stdout.readline().strip()
            assert outcome == ("done" if point == "none" else "killed"), (number, point, count)
            again = before & set((logs / str(number)).read_text().split())
            assert not again, f"asked again after {point}: {again}"
        process.stdin.close()
    _require_complete(directory)


@asynchronous
async def _require_complete(directory):
    async with Desk(directory) as desk:
        batches = {b.metadata["name"]: b async for b in desk.client.batches.list()}
        assert set(batches) == set(BATCHES)
        for name, lines in BATCHES.items():
            batch = batches[name]
            done, failed = await desk.lines(batch.output_file_id), await desk.lines(batch.error_file_id)
            ids = {None if isinstance(x, bytes) else x["custom_id"] for x in lines}
            assert done.keys() | failed.keys() == ids and not done.keys() & failed.keys()
            assert batch.status == "completed" and batch.request_counts.to_dict() == {
                "total": len(lines), "completed": len(done), "failed": len(failed)
            }  # fmt: skip
        files = {f.id async for f in desk.client.files.list()}
    assert {p.name for p in (directory / "files").iterdir()} == files
    assert not list((directory / "pending").iterdir())
