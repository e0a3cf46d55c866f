"""A server that is killed and stopped with batches and clients at work: nothing is lost or done twice."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
from openai import APIConnectionError, APIStatusError, OpenAI
from server_process import end, start
from service_desk import encode, line

from checkpoints import prompts_of, tiny_policy
from moe_lightning import SamplingParams

URL = "/v1/completions"
KILLS = 3
ENDED = ("completed", "failed", "expired", "cancelled")


def bodies(count, seed):
    rng = random.Random(seed)
    prompts = prompts_of(tuple(rng.randrange(1, 20) for _ in range(count)), seed=seed)
    return [
        {
            "prompt": list(prompt),
            "seed": 100 * seed + i,
            "max_tokens": rng.randrange(4, 16),
        }
        for i, prompt in enumerate(prompts)
    ]


def texts_alone(alone, asked):
    params = [SamplingParams(**{k: v for k, v in body.items() if k != "prompt"}) for body in asked]
    outputs = alone.generate([body["prompt"] for body in asked], params, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


class Server:
    """A server that is started again on the same directory."""

    def __init__(self, model, directory):
        (directory / "policy.json").write_text(json.dumps(asdict(tiny_policy(max_num_seqs=4))))
        self._command = (
            model,
            "--device",
            "cpu",
            "--policy",
            directory / "policy.json",
            "--data-dir",
            directory / "data",
        )
        self._model, self.num_asked_again = model.name, 0
        self.is_up = threading.Event()
        self.start()

    def start(self):
        self.process, url = start(*self._command)
        self.client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self.is_up.set()

    def kill(self):
        self.is_up.clear()
        end(self.process)

    def ask(self, body):
        """An answer, however often one has to ask."""
        while True:
            assert self.is_up.wait(120)
            try:
                return self.client.completions.create(model=self._model, **body).choices[0].text
            except (APIConnectionError, APIStatusError) as error:
                assert getattr(error, "status_code", 503) == 503, error
                self.num_asked_again += 1
                time.sleep(0.02)

    def batches(self, ids):
        return [self.client.batches.retrieve(batch_id) for batch_id in ids]


@pytest.fixture
def server(mixtral, tmp_path):
    server = Server(mixtral, tmp_path)
    yield server
    end(server.process)


def until_done(server, ids, count):
    """Wait until so many lines of the batches are answered; both batches."""
    deadline = time.monotonic() + 120
    while True:
        found = server.batches(ids)
        if sum(b.request_counts.completed for b in found) >= count or all(b.status in ENDED for b in found):
            return found
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_batches_and_waiting_clients_survive_kills(server, alone):
    lines, waiting = [bodies(30, seed) for seed in (1, 2)], bodies(50, 3)
    want = [texts_alone(alone, asked) for asked in (*lines, waiting)]
    ids = []
    for asked in lines:
        content = encode(*(line(f"id-{i}", **body) for i, body in enumerate(asked)))
        file = server.client.files.create(file=("in.jsonl", content), purpose="batch")
        ids.append(
            server.client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h").id
        )
    # Requests go before batches: as many at a time as leave half of the engine.
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(server.ask, body) for body in waiting]
        for kill in range(KILLS):
            found = until_done(server, ids, 5 + 15 * kill)
            if kill == 1:
                os.kill(server.process.pid, signal.SIGSTOP)
                os.kill(server.process.pid, signal.SIGCONT)
                found = until_done(server, ids, 1 + sum(b.request_counts.completed for b in found))
            assert any(batch.status not in ENDED for batch in found), "there was nothing left to kill"
            server.kill()
            server.start()
        assert server.num_asked_again, "no client noticed"
        assert [answer.result(120) for answer in answers] == want[2]
    for batch, texts in zip(until_done(server, ids, 60), want[:2], strict=True):
        while batch.status not in ENDED:
            batch = server.client.batches.retrieve(batch.id)
        assert (batch.status, batch.error_file_id) == ("completed", None)
        rows = [
            json.loads(row) for row in server.client.files.content(batch.output_file_id).text.splitlines()
        ]
        assert set(Counter(row["custom_id"] for row in rows).values()) == {1}
        got = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows}
        assert got == {f"id-{i}": text for i, text in enumerate(texts)}
