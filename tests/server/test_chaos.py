"""A server that is killed and stopped with batches and clients at work: nothing is lost or done twice."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
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


def begin(server, asked):
    """Id of a new batch with these bodies."""
    content = encode(*(line(f"id-{i}", **body) for i, body in enumerate(asked)))
    file = server.client.files.create(file=("in.jsonl", content), purpose="batch")
    return server.client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h").id


def ended(server, batch_id):
    """The batch, once it has ended."""
    while (batch := server.client.batches.retrieve(batch_id)).status not in ENDED:
        time.sleep(0.01)
    return batch


def rows_of(server, batch):
    """Lines of both files of a batch, by custom_id; none of them twice."""
    files = filter(None, (batch.output_file_id, batch.error_file_id))
    texts = [server.client.files.content(file_id).text for file_id in files]
    rows = [json.loads(row) for text in texts for row in text.splitlines()]
    assert len({row["custom_id"] for row in rows}) == len(rows)
    return {row["custom_id"]: row for row in rows}


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
    ids = [begin(server, asked) for asked in lines]
    # Comes last and takes minutes, so that there is always something left to kill.
    endless = begin(server, [{"prompt": "the", "max_tokens": 400, "ignore_eos": True}] * 1000)
    # Requests go before batches: as many at a time as leave half of the engine.
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(server.ask, body) for body in waiting]
        for kill in range(KILLS):
            found = until_done(server, ids, 5 + 15 * kill)
            if kill == 1:
                os.kill(server.process.pid, signal.SIGSTOP)
                os.kill(server.process.pid, signal.SIGCONT)
                found = until_done(server, ids, 1 + sum(b.request_counts.completed for b in found))
            server.kill()
            server.start()
        assert server.num_asked_again, "no client noticed"
        assert [answer.result(120) for answer in answers] == want[2]
    for batch, texts in zip(until_done(server, ids, 60), want[:2], strict=True):
        batch = ended(server, batch.id)
        assert (batch.status, batch.error_file_id) == ("completed", None)
        got = {i: row["response"]["body"]["choices"][0]["text"] for i, row in rows_of(server, batch).items()}
        assert got == {f"id-{i}": text for i, text in enumerate(texts)}
    server.client.batches.cancel(endless)
    batch = ended(server, endless)
    assert batch.status == "cancelled"
    assert len(rows_of(server, batch)) == 1000
