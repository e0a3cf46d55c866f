"""The commands that start a server, and those of docs/serving.md, as processes with the demo model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest

from demo_model import MOE, ROOT
from moe_lightning.cli.main import main

DOCUMENT = ROOT / "docs" / "serving.md"


@contextmanager
def process(*arguments, port=0):
    """A server's process, its port, and the lines that it has printed by now."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    small = ["--max-num-seqs", "16", "--max-model-len", "512"]
    command = [sys.executable, *arguments, "--port", str(port), *small]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    printed = []
    try:
        for line in server.stdout:
            printed.append(line)
            if found := re.fullmatch(r".* is served at http://127\.0\.0\.1:(\d+)\n", line):
                break
        else:
            raise AssertionError(f"it ended with status {server.wait()}")
        # Whatever it prints later must not block it.
        threading.Thread(target=server.stdout.read, daemon=True).start()
        yield server, int(found[1]), printed
    finally:
        server.kill()
        server.wait()


def blocks(kind):
    """Blocks that need a server, in order; of console blocks what follows the prompts."""
    text = DOCUMENT.read_text(encoding="utf-8")
    found = re.findall(rf"^```{kind} server\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    if kind == "console":
        found = [[x.removeprefix("$ ") for x in b.splitlines() if x.startswith("$ ")] for b in found]
    return found


def artifact(start, **places):
    """Arguments of the document's command that begins so, with the places that it names where they are here."""
    (line,) = re.findall(rf"^\$ ({re.escape(start)}.*)$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    return [places.get(word, word) for word in line.split()[1:]]


def run(program, script, port):
    done = subprocess.run(
        [*program, script.replace(":30000/", f":{port}/")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.demo
def test_the_documents_commands_and_the_artifacts_work_and_sigterm_lets_a_stream_finish(tmp_path):
    start = artifact("python -m moe_lightning.launch_server", **{"./my-mixtral": str(MOE)})
    assert {"--cpu-mem-bdw", "--avg-prompt-len", "--gen-len"} <= set(start)
    with process(*start) as (server, port, out):
        assert re.search(r"ubs, n_ub\s+\d+, \d+", "".join(out))
        assert re.search(r"throughput\s+[\d.]+ token/s", "".join(out))
        asking, forms, scoring, watching = (
            [run(["bash", "-ec"], command, port) for command in commands] for commands in blocks("console")
        )
        chat, stream, tokens, generated = asking
        assert "Paris" in json.loads(chat)["choices"][0]["message"]["content"]
        assert stream.endswith("data: [DONE]\n\n")
        assert json.loads(tokens)["count"] == 4
        assert "Paris" in json.loads(generated)["text"]
        assert json.loads(forms[0])["choices"][0]["text"] in ("yes", "no")
        scores = json.loads(scoring[0])["choices"][0]["logprobs"]["token_logprobs"]
        assert scores[0] is None
        assert all(score < 0 for score in scores[1:])
        assert run(
            ["curl", "-s", "-H", "Host: evil.example.com"], f"http://127.0.0.1:{port}/health", port
        ).count('"unknown_host"')
        assert json.loads(watching[0]) == {"status": "ok"}
        assert "moe_lightning:generation_tokens_total" in watching[1]
        (python,) = blocks("python")
        assert run([sys.executable, "-c"], python, port).count("Paris") == 2
        script = "benchmarks/mtbench/bench.py"
        bench = artifact(f"python {script}", **{script: str(ROOT / script), "30000": str(port)})
        small = ["--max-new-tokens", "2", "--ubs", "2", "--n-ub", "2"]  # the last of several counts
        subprocess.run(
            [sys.executable, *bench, *small], check=True, timeout=120, capture_output=True, cwd=tmp_path
        )
        measured = json.loads((tmp_path / "mtbench.json").read_text())
        assert (measured["generated_tokens"], measured["workload"]["prompts"]) == (8, 4)
        assert 40 < measured["workload"]["mean_prompt_tokens"] < 120

        connection = HTTPConnection("127.0.0.1", port, timeout=120)
        body = {"prompt": "Once", "max_tokens": 6, "ignore_eos": True, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.readline()
        server.send_signal(signal.SIGTERM)
        assert response.read().endswith(b"data: [DONE]\n\n")
        assert server.wait(60) == -signal.SIGTERM


def test_a_server_may_have_as_many_connections_as_the_system_lets_it():
    code = (
        "import resource as r; from moe_lightning.server.run import allow_connections; "
        "r.setrlimit(r.RLIMIT_NOFILE, (64, 500)); allow_connections(); print(*r.getrlimit(r.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["500", "500"]


def test_the_documents_flags_and_variables_exist(capsys):
    text = DOCUMENT.read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    known = capsys.readouterr().out
    batches = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(--[a-z-]+)", text + batches)) - {"--resume", "--questions"}
    assert {"--max-queue", "--allowed-hosts", "--head-seconds", "--max-uploads"} <= named
    assert not [flag for flag in named if not re.search(rf"^  {flag} ", known, re.MULTILINE)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["serve"], "no model is given"),
        (["serve", "a", "--model", "b"], "contradict each other"),
        (["serve", "a", "--avg-prompt-len", "5"], "avg_prompt_len and gen_len belong together"),
        (["serve", "/nonexistent", "--port", "0"], "neither a path nor a known model"),
        (["serve", "a", "--host", "256.1.1.1", "--port", "0"], "cannot listen on 256.1.1.1"),
        (["serve", "a", "--api-key", "é"], "ASCII"),
    ],
)
def test_what_cannot_be_served_is_said(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag, value",
    [("--port", "70000"), ("--max-queue", "0"), ("--keep-alive", "-1"), ("--shutdown-timeout", "soon")],
)
def test_values_that_cannot_be_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit) as error:
        main(["serve", "m", flag, value])
    assert error.value.code == 2
    assert flag in capsys.readouterr().err


def test_a_chat_template_that_is_not_there_is_said_before_the_model_is_read(mixtral, capsys):
    assert main(["serve", str(mixtral), "--port", "0", "--chat-template", "/nonexistent"]) == 2
    assert "/nonexistent" in capsys.readouterr().err


def test_the_key_comes_from_the_environment_and_stays_out_of_sight(monkeypatch):
    from moe_lightning.cli.flags import settings_of
    from moe_lightning.cli.main import build_parser
    from moe_lightning.server.config import ServerConfig

    monkeypatch.setenv("MOE_LIGHTNING_API_KEY", "sk-secret")
    monkeypatch.setenv("MOE_LIGHTNING_SERVED_MODEL_NAME", "one, two")
    config = settings_of(ServerConfig, build_parser().parse_args(["serve", "m", "--port", "1"]))
    assert (config.api_key, config.served_model_name, config.port) == ("sk-secret", ("one", "two"), 1)
    assert "sk-secret" not in repr(config)


def test_limits_of_batches_are_flags_and_variables(monkeypatch):
    from moe_lightning.cli.flags import settings_of
    from moe_lightning.cli.main import build_parser
    from moe_lightning.server.batch_limits import BatchLimits

    monkeypatch.setenv("MOE_LIGHTNING_MAX_BATCH_LINES", "2k")
    flags = ["--max-file-size", "1MiB", "--max-uploads", "3", "--upload-seconds", "2.5"]
    limits = settings_of(BatchLimits, build_parser().parse_args(["serve", "m", *flags]))
    assert limits == BatchLimits(file_bytes=2**20, uploads=3, upload_idle_seconds=2.5, requests=2048)


def test_limits_of_requests_are_flags(capsys):
    from moe_lightning.cli.flags import settings_of
    from moe_lightning.cli.main import build_parser
    from moe_lightning.server.config import ServerConfig
    from moe_lightning.server.limits import Limits

    def limits_of(*flags):
        return settings_of(ServerConfig, build_parser().parse_args(["serve", "m", *flags])).limits

    assert limits_of() == Limits()
    flags = ["--max-queued-tokens", "2k", "--max-choices", "3", "--max-stops", "4", "--max-form-depth", "5",
             "--max-form-count", "6"]  # fmt: skip
    assert limits_of(*flags) == Limits(
        max_queued_tokens=2048, max_choices=3, max_stops=4, max_form_depth=5, max_form_count=6
    )
    for flag in ("--max-form-depth", "--max-form-count"):
        with pytest.raises(SystemExit):
            limits_of(flag, "1m")
        assert "too large; give" in capsys.readouterr().err


def test_paths_in_the_document_exist():
    for path in re.findall(r"benchmarks/[\w/]+\.py", DOCUMENT.read_text(encoding="utf-8")):
        assert (Path(ROOT) / path).exists()
