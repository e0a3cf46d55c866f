from __future__ import annotations

import pytest

from moe_lightning.errors import RequestError
from moe_lightning.protocol.stream_options import StreamOptions, split_stream


def test_fields_about_streaming_are_taken_out_and_read():
    body = {
        "prompt": "a",
        "stream": True,
        "stream_options": {"include_usage": True, "include_obfuscation": False},
    }
    assert split_stream(body) == ({"prompt": "a"}, StreamOptions(include_usage=True))
    assert split_stream({"prompt": "a", "stream": True}) == ({"prompt": "a"}, StreamOptions())
    for body in ({}, {"stream": False}, {"stream": None, "stream_options": None}):
        assert split_stream(body) == ({}, None)


@pytest.mark.parametrize(
    "body, message",
    [
        ({"stream": "yes"}, "stream='yes': give true or false"),
        ({"stream": 1}, "stream=1"),
        ({"stream_options": {}}, "stream_options needs stream=true"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options needs stream=true"),
        ({"stream": True, "stream_options": 5}, "stream_options=5"),
        ({"stream": True, "stream_options": {"usage": True}}, r"stream_options\.usage is not supported"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, r"stream_options\.include_usage=1"),
    ],
)
def test_what_cannot_be_used_is_named(body, message):
    with pytest.raises(RequestError, match=message):
        split_stream(body)
