"""Batches on a live server with a model: right answers, clients that wait first, and a server that is killed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
from openai import OpenAI
from service_desk import encode, line

from checkpoints import tiny_policy
from moe_lightning import SamplingParams

URL = "/v1/completions"
PROMPTS = ["the quick", "brown fox", "jumps over", "the lazy dog", "fox", "dog over the fox"]
NUM_KILLS = 20 if os.environ.get("MOE_LIGHTNING_FULL_TESTS") == "1" else 1  # each takes a start of the server
GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture
def client(batching):
    with OpenAI(base_url=f"{batching.url}/v1", api_key="none") as client:
        yield client


def begin(client, *lines):
    file = client.files.create(file=("in.jsonl", encode(*lines)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")


def ended(client, batch):
    deadline = time.monotonic() + 120
    while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
    return batch


def rows(client, file_id):
    """Lines of a file, by custom_id; none of them twice."""
    found = [json.loads(row) for row in client.files.content(file_id).text.splitlines()] if file_id else []
    assert len({row["custom_id"] for row in found}) == len(found)
    return {row["custom_id"]: row for row in found}


def text_of(row):
    return row["response"]["body"]["choices"][0]["text"]


def test_answers_are_those_of_the_model_alone_and_failures_those_of_the_endpoint(batching, client, alone):
    lines = [line(f"id-{i}", prompt, **GREEDY) for i, prompt in enumerate(PROMPTS)]
    wrong = [line("model", model="other"), line("field", temprature=1), line("list", prompt=["a", 1])]
    batch = ended(client, begin(client, *lines, *wrong))
    assert batch.status == "completed" and batch.model == client.models.list().data[0].id
    want = alone.generate(PROMPTS, SamplingParams(**GREEDY), use_tqdm=False)
    got = rows(client, batch.output_file_id)
    assert {k: text_of(row) for k, row in got.items()} == {
        f"id-{i}": output.outputs[0].text for i, output in enumerate(want)
    }
    assert batch.usage.output_tokens == sum(len(output.outputs[0].token_ids) for output in want)
    for custom_id, row in rows(client, batch.error_file_id).items():
        (asked,) = (x["body"] for x in wrong if x["custom_id"] == custom_id)
        status, body = batching.post(URL, asked)
        assert (row["response"]["status_code"], row["response"]["body"]) == (status, body)
        assert body["error"]["message"] in row["error"]["message"]
    assert batch.request_counts.failed == 3


def test_a_request_that_somebody_waits_for_does_not_wait_for_a_batch(batching, client):
    model = client.models.list().data[0].id
    with batching.held() as held, ThreadPoolExecutor(1) as threads:
        batch = begin(client, *(line(f"id-{i}", max_tokens=40, ignore_eos=True) for i in range(40)))
        batching.until(lambda: batching.desk.num_background == 4)  # as many as run, and as many again
        asked = threads.submit(client.completions.create, model=model, prompt="the", max_tokens=2)
        batching.until(lambda: batching.desk.num_interactive == 1)
        held.let_pass(100)  # two of the batch's end, then this one
        asked.result()
        _, _, metrics = batching.send("GET", "/metrics")
        assert re.search(rb'^moe_lightning:open_batches\{model_name="[^"]+"\} 1.0$', metrics, re.MULTILINE)
        assert re.search(rb"^moe_lightning:batch_requests_in_flight\{[^}]+\} [1-9]", metrics, re.MULTILINE)
        assert client.batches.retrieve(batch.id).status == "in_progress"
    client.batches.cancel(batch.id)
    batch = ended(client, batch)
    done, failed = rows(client, batch.output_file_id), rows(client, batch.error_file_id)
    assert batch.status == "cancelled" and failed and len(done) + len(failed) == 40
    batching.until(lambda: batching.desk.num_background == 0)


@pytest.fixture
def serve(mixtral, tmp_path):
    """Starts `moe-lightning serve` on the directory of this test; its process and a client."""
    started = []

    def start():
        (tmp_path / "policy.json").write_text(json.dumps(asdict(tiny_policy(max_num_seqs=2))))
        command = [
            sys.executable, "-m", "moe_lightning", "serve", mixtral, "--port", "0", "--device", "cpu",
            "--policy", tmp_path / "policy.json", "--data-dir", tmp_path / "data",
        ]  # fmt: skip
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        url = process.stdout.readline().split()[-1]
        return process, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.timeout(300 * NUM_KILLS)
def test_a_killed_server_goes_on_with_its_batch_as_if_nothing_had_happened(serve, alone, tmp_path):
    draw = random.Random(3)
    prompts = {f"id-{i}": " ".join(PROMPTS[i % 6 :]) for i in range(24 * NUM_KILLS)}
    lines = [line(i, prompt, max_tokens=20, ignore_eos=True, temperature=0) for i, prompt in prompts.items()]
    lines.append(line("sampled", PROMPTS[0], max_tokens=20, seed=5))
    process, client = serve()
    batch = begin(client, *lines)
    for kill in range(NUM_KILLS):
        client.completions.create(model=client.models.list().data[0].id, prompt="the", max_tokens=2)
        wanted = draw.randrange(5) if kill else 5
        counts = client.batches.retrieve(batch.id).request_counts
        enough = counts.completed + wanted
        while (found := client.batches.retrieve(batch.id)).request_counts.completed < enough:
            if found.completed_at:  # before anybody looked
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process, client = serve()
    batch = ended(client, client.batches.retrieve(batch.id))
    assert batch.status == "completed" and batch.error_file_id is None
    got = {k: text_of(row) for k, row in rows(client, batch.output_file_id).items()}
    params = [SamplingParams(max_tokens=20, ignore_eos=True, temperature=0)] * len(prompts)
    params.append(SamplingParams(max_tokens=20, seed=5))
    want = alone.generate([*prompts.values(), PROMPTS[0]], params, use_tqdm=False)
    assert got == dict(zip([*prompts, "sampled"], (o.outputs[0].text for o in want), strict=True))
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert not (tmp_path / "data" / "batches.sqlite-wal").exists()  # the database was closed
