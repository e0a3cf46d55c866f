"""Ten thousand bodies that cannot be served: the server stays as it was."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import tracemalloc

from asgi import error_of, send
from test_bodies import GOOD, LOGPROBS, UNSUPPORTED, WRONG, encode

from moe_lightning.server.app import Settings, create_app
from moe_lightning.server.limits import Limits

COUNT = 10_000
WARM_UP = 2_000  # until caches of the interpreter and its libraries are full
GROWTH = 256 * 1024  # bytes that may be left after the other 8,000: not one in forty of these bodies


def torn(rng, good):
    whole = json.dumps(good).encode()
    return whole[: rng.randrange(len(whole))]


def no_utf8(rng, good):
    whole, byte = json.dumps(good).encode(), bytes([rng.randrange(0xF8, 0x100)])
    at = rng.randrange(len(whole))
    return whole[:at] + byte + whole[at + rng.randrange(2) :]


def without_a_mark(rng, good):
    whole = json.dumps(good)
    at = rng.choice([i for i, character in enumerate(whole) if character in '{}[]:,"'])
    return (whole[:at] + whole[at + 1 :]).encode()


def deep(rng, good):
    mark = rng.choice((b"[", b'{"a":', b'[{"prompt":', b'{"messages":['))
    return mark * rng.randrange(1, 5000)


def two_wrong_fields(rng, good):
    name = rng.choice(list(good))
    values = WRONG.get(name) or LOGPROBS["/v1/completions"]
    other = rng.choice(list(UNSUPPORTED))
    return encode({**good, name: rng.choice(values), other: UNSUPPORTED[other]})


def another_kind(rng, good):
    return json.dumps(rng.choice(([good], str(good), rng.random(), None, {}, [[]]))).encode()


KINDS = (torn, no_utf8, without_a_mark, deep, two_wrong_fields, two_wrong_fields, another_kind)


def test_10_000_bad_bodies_get_a_message_each_and_leave_no_memory(alone):
    app = create_app(alone, Settings(limits=Limits(max_choices=64)))  # its engine does not run
    rng, paths = random.Random(10), list(GOOD)

    async def send_bad(count):
        for i in range(count):
            path = paths[i % len(paths)]
            status, _, data = await send(app, path, rng.choice(KINDS)(rng, GOOD[path]))
            error_of(status, data)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    async def send_all():
        tracemalloc.start()
        try:
            before = await send_bad(WARM_UP)
            return before, await send_bad(COUNT - WARM_UP)
        finally:
            tracemalloc.stop()

    before, after = asyncio.run(send_all())
    assert after - before < GROWTH
    assert app.state.service.desk.num_interactive == alone.engine.num_unfinished == 0
    for path, body, method in (("/health", b"", "GET"), ("/tokenize", b'{"prompt": "the fox"}', "POST")):
        assert asyncio.run(send(app, path, body, method))[0] == 200
