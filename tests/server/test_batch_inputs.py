"""Whatever the input's bytes are, each of its lines ends once, as an answer or as a failure that says why."""

import asyncio
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from service_desk import Desk, encode, line, without_power_cuts

from moe_lightning.server.batches import BatchLimits

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from(["custom_id", "method", "url", "body", "\ud800"])
GOOD = json.dumps(line("good")).encode()


@st.composite
def changed_lines(draw):
    record = line(draw(st.sampled_from("abc")))
    target = record["body"] if draw(st.booleans()) else record
    target[draw(fields)] = draw(values)
    return json.dumps(record).encode()


raws = st.sampled_from(
    [b"", b" ", b"{", b"\xff", b"[" * 5000, b"\xef\xbb\xbf" + GOOD, GOOD, b'{"a":' * 40, b"\x00"]
)


def reply(body):
    """Echoes what the client sent, whatever it is."""
    return 200, {"object": "text_completion", "echo": body}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A service and the loop that it runs in; one for all examples."""
    with asyncio.Runner() as runner, pytest.MonkeyPatch.context() as patch:
        without_power_cuts(patch)
        desk = Desk(tmp_path_factory.mktemp("inputs"), limits=BatchLimits(files=10_000, tick_seconds=0.01))
        desk.engine.reply = reply
        runner.run(desk.__aenter__())
        yield desk, runner.run
        runner.run(desk.__aexit__())


@given(st.lists(raws | changed_lines() | st.binary(max_size=20), max_size=8))
@example([GOOD, GOOD, b"", encode(line("deep", x=json.loads("[" * 31 + "]" * 31)))])
@example([encode(line("inf")).replace(b'"hi"', b"1e999")])
@settings(deadline=None, max_examples=60)
def test_each_line_that_is_not_blank_ends_once(service, lines):
    desk, run = service
    content = b"\n".join(lines)
    desk.engine.asked.clear()
    batch, rows = run(_outcome(desk, content))
    if batch.status == "failed":
        assert not desk.engine.asked and batch.errors.data and not rows
        return
    expected = [x for x in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if x.strip()]
    assert batch.status == "completed"
    assert len({row["id"] for row in rows}) == len(rows) == len(expected) == batch.request_counts.total
    assert all((row["error"] is None) == (row["response"] is not None) for row in rows)
    assert all(isinstance(body, dict) for _, body, _ in desk.engine.asked)
    answered = {row["custom_id"] for row in rows if row["error"] is None}
    assert len(answered) == len(desk.engine.asked) - sum(b"inf" in x for x in lines)


async def _outcome(desk, content):
    given = {"endpoint": "/v1/completions", "completion_window": "24h"}
    batch = await desk.client.batches.create(input_file_id=await desk.upload(content), **given)
    batch = await asyncio.wait_for(desk.ended(batch.id), 60)
    rows = []
    for output in filter(None, (batch.output_file_id, batch.error_file_id)):
        rows += map(json.loads, (await desk.client.files.content(output)).content.splitlines())
    return batch, rows
