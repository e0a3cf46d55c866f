"""Commands of docs/serving.md and docs/batch.md that start a server; and that no other is left without a test."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tomllib
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

from demo_model import ROOT

DOCUMENTS = ROOT / "docs" / "serving.md", ROOT / "docs" / "batch.md"
# test_serve.py runs them, with the demo model.
ARTIFACT = "python -m moe_lightning.launch_server ", "python benchmarks/mtbench/bench.py "


def commands():
    """All of blocks that are not marked as needing a server; those that are, test_serve and test_batch_docs run."""
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    blocks = [
        b for text in texts for b in re.findall(r"^```console\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]
    return [
        line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")
    ]


@contextmanager
def started(command, directory):
    """The port of the server that a command starts, and its first line; it ends with the block."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    server = subprocess.Popen(
        ["bash", "-c", f"{command} --port 0"], stdout=subprocess.PIPE, text=True, cwd=directory,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    try:
        assert select.select([server.stdout], [], [], 120)[0], "it has not said anything yet"
        line = server.stdout.readline()
        found = re.search(r":(\d+)$", line)
        assert found, f"it said {line!r}"
        yield int(found[1]), line
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        server.stdout.close()


def get(port, path, key=None):
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
    response = connection.getresponse()
    found = response.status, response.read()
    connection.close()
    return found


def test_commands_that_start_a_server_do(mixtral, tmp_path):
    (tmp_path / "my-mixtral").symlink_to(mixtral)
    serving = [command for command in commands() if "moe-lightning serve" in command]
    assert len(serving) == 3
    for command in serving:
        with started(command, tmp_path) as (port, line):
            said = "http://0.0.0.0" if "--host 0.0.0.0" in command else "http://127.0.0.1"
            assert line == f"my-mixtral is served at {said}:{port}\n"
            assert line.replace(str(port), "30000") in DOCUMENTS[0].read_text() or "--host" in command
            key = re.search("API_KEY=(.*?) ", command)
            assert get(port, "/v1/models")[0] == (401 if key else 200)
            assert json.loads(get(port, "/v1/models", key and key[1])[1])["data"][0]["id"] == "my-mixtral"
            assert get(port, "/v1/batches", key and key[1])[0] == (200 if "--data-dir" in command else 404)
            assert (tmp_path / "batches").exists() == ("--data-dir" in command)


def test_no_command_is_left_that_no_test_runs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for command in commands():
        if not command.startswith(ARTIFACT) and "moe-lightning serve" not in command:
            assert command.startswith("pip install "), f"no test runs {command!r}"
    for path in DOCUMENTS:
        for name, extra in re.findall(r"pip install '([\w-]+)\[(\w+)\]'", path.read_text()):
            assert (name, extra in project["optional-dependencies"]) == (project["name"], True)
    kinds = [k for path in DOCUMENTS for k in re.findall(r"^```(\w.*)$", path.read_text(), re.MULTILINE)]
    assert set(kinds) == {"console", "console server", "python server", "json"}
