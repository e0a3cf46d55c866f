"""Many clients at a time: no answer is lost or somebody else's."""

from __future__ import annotations

import asyncio
import json
import random

import pytest
from live import serving

from checkpoints import load, prompts_of
from moe_lightning import SamplingParams

NUM_STREAMS = 200
MAX_TOKENS = 24
WIDE = {"max_num_seqs": 64, "micro_batch_size": 16, "num_blocks": 512}


@pytest.fixture(scope="module")
def live(mixtral):
    with serving(load(mixtral, **WIDE)) as server:
        yield server


@pytest.fixture(scope="module")
def outputs(mixtral):
    """What `generate` gives for each body."""
    asked = bodies()
    params = [SamplingParams(seed=b["seed"], max_tokens=b["max_tokens"], n=b["n"]) for b in asked]
    return load(mixtral, **WIDE).generate([b["prompt"] for b in asked], params, use_tqdm=False)


def bodies():
    """A body per client: lengths, seeds and numbers of answers all differ."""
    rng = random.Random(4)
    prompts = prompts_of(tuple(rng.randrange(1, 40) for _ in range(NUM_STREAMS)), seed=3)
    return [
        {"prompt": prompt, "seed": i, "max_tokens": rng.randrange(1, MAX_TOKENS), "n": 1 + i % 2}
        for i, prompt in enumerate(prompts)
    ]


async def stream(port, body, stop_after):
    """Texts of the choices; of a client that goes after some events, None."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    texts, usage, num_events = dict.fromkeys(range(body["n"]), ""), None, 0
    try:
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                is_done = line.startswith(b"data: [DONE]")
                if is_done:
                    return texts, usage
                continue
            event = json.loads(line[6:])
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
            usage = event["usage"]
            num_events += 1
            if num_events == stop_after:
                return None
            if stop_after == 0:  # a reader that takes its time
                await asyncio.sleep(0.01)
    finally:
        writer.close()
    raise AssertionError("the stream ended before it was done")


def test_200_streams_at_once_get_each_its_own_answer_while_others_drop_out(live, outputs):
    asked = bodies()
    # Every fifth goes after two events, every seventh reads slowly.
    stops = [2 if i % 5 == 0 else 0 if i % 7 == 0 else None for i in range(NUM_STREAMS)]

    async def all_streams():
        return await asyncio.gather(*(stream(live.port, b, s) for b, s in zip(asked, stops, strict=True)))

    got = asyncio.run(all_streams())
    complete = 0
    for answer, output, stop in zip(got, outputs, stops, strict=True):
        if answer is None:
            assert stop == 2
            continue
        complete += 1
        texts, usage = answer
        assert texts == {c.index: c.text for c in output.outputs}
        assert usage["completion_tokens"] == sum(len(c.token_ids) for c in output.outputs)
    assert complete >= NUM_STREAMS * 4 // 5
    live.until(lambda: live.engine.num_unfinished == 0 and live.desk.num_interactive == 0)


def test_whole_answers_and_background_work_among_them(live, outputs):
    asked = bodies()[:60]
    jobs = [live.background("/v1/completions", body, str(i)) for i, body in enumerate(asked)]
    for job, output in zip(jobs, outputs[:60], strict=True):
        status, body = job.result(120)
        assert status == 200
        assert [c["text"] for c in body["choices"]] == [c.text for c in output.outputs]
