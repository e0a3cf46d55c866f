"""The commands of docs/batch.md, against a live server; blocks marked `server` need one at port 30000."""

import asyncio
import json
import re
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from service_desk import Desk, FakeEngine, asynchronous

DOCUMENT = Path(__file__).parents[2] / "docs" / "batch.md"
CHAT = "/v1/chat/completions"


def blocks(kind):
    """Blocks of one kind, in order; of console blocks what follows the prompts."""
    found = re.findall(rf"^```{kind} server\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    if kind == "console":
        found = ["\n".join(x.removeprefix("$ ") for x in b.splitlines() if x.startswith("$ ")) for b in found]
    return found


def example_line():
    return re.search(r"^```json\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)[1]


@asynccontextmanager
async def live(desk):
    """Port of a server with the desk's app."""
    server = uvicorn.Server(uvicorn.Config(desk.app, port=0, log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.001)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


async def execute(program, script, port, directory):
    """What a block prints."""
    script = (
        script.replace(":30000/", f":{port}/")
        .replace("sleep(1)", "sleep(0.01)")
        .replace("sleep 1;", "sleep 0.01;")
    )
    process = await asyncio.create_subprocess_exec(
        *program, script, cwd=directory, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


@asynchronous
async def test_the_documents_commands_do_what_it_says(tmp_path):
    engine = FakeEngine()
    engine.reply = lambda body: (200, {"model": "m", "choices": [{"message": body["messages"][0]}]})
    (python,), (curl, cancel) = blocks("python"), blocks("console")
    (tmp_path / "requests.jsonl").write_text(example_line())
    async with Desk(tmp_path / "batches", engine) as desk, live(desk) as port:
        printed = await execute([sys.executable, "-c"], python, port, tmp_path)
        status, answer, _ = printed.splitlines()
        assert status.startswith("completed") and json.loads(answer)["custom_id"] == "1"
        printed = await execute(["bash", "-ec"], curl, port, tmp_path)
        assert json.loads((tmp_path / "answers.jsonl").read_text())["custom_id"] == "1"
        assert '"deleted":true' in printed and '"has_more":false' in printed
        engine.gate.clear()
        batch = await desk.begin(json.loads(example_line()), endpoint=CHAT)
        await engine.until(lambda: engine.running == 1)
        assert '"status":"cancelling"' in await execute(["bash", "-ec"], cancel, port, tmp_path)
        assert (await desk.ended(batch.id)).status == "cancelled"
