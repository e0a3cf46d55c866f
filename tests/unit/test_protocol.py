from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lightning.engine.request import CompletionOutput, Logprob, RequestOutput
from moe_lightning.errors import RequestError
from moe_lightning.protocol import (
    ChatCall,
    CompletionCall,
    chat_response,
    completion_response,
    parse_chat,
    parse_completion,
)

HI = [{"role": "user", "content": "Hi"}]


def decode(ids: Any) -> str:
    return "".join(f"<{i}>" for i in ids)


def respond(call: CompletionCall, *outputs: RequestOutput) -> dict[str, Any]:
    return completion_response(call, outputs, response_id="cmpl-1", model="m", created=5, decode=decode)


def answer(**changes: Any) -> CompletionOutput:
    fields: dict[str, Any] = {"index": 0, "text": "ab", "token_ids": (7, 8), "finish_reason": "stop"}
    return CompletionOutput(**(fields | changes))


LOGPROBS = [
    {7: Logprob(-0.5, 2, "a"), 3: Logprob(-0.1, 1, "x")},
    {8: Logprob(-0.2, 1, "b"), 9: Logprob(-math.inf, 2, "y")},
]


# -- requests ----------------------------------------------------------------------------------------------


def test_a_completion_generates_16_tokens_unless_told() -> None:
    call = parse_completion({"model": "m", "prompt": "Hi"})
    assert (call.model, call.prompts, call.params.max_tokens, call.echo) == ("m", ("Hi",), 16, False)


def test_a_chat_generates_up_to_the_models_limit_unless_told() -> None:
    call = parse_chat({"messages": HI})
    assert (call.model, call.messages, call.params.max_tokens) == (None, tuple(HI), None)


def test_sampling_fields_arrive_under_their_names() -> None:
    given_fields = {
        "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 1.0,
        "frequency_penalty": -1.0, "repetition_penalty": 1.1, "seed": 3, "stop_token_ids": [1, 2],
        "stop": ["a"], "ignore_eos": True, "min_tokens": 1, "prompt_logprobs": 2, "max_tokens": 9,
        "skip_special_tokens": False, "include_stop_str_in_output": True,
    }  # fmt: skip
    for call in (
        parse_chat({"messages": HI, **given_fields}),
        parse_completion({"prompt": "", **given_fields}),
    ):
        found = {name: getattr(call.params, name) for name in given_fields}
        assert found == given_fields | {"stop_token_ids": (1, 2), "stop": ("a",)}


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Hi", ("Hi",)),
        ([1, 2], ((1, 2),)),
        (["a", "b"], ("a", "b")),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_a_prompt_takes_each_of_the_apis_four_forms(prompt: Any, prompts: Any) -> None:
    assert parse_completion({"prompt": prompt}).prompts == prompts


def test_null_means_not_given() -> None:
    nulls = dict.fromkeys(("stop", "seed", "max_tokens", "logprobs", "tools", "logit_bias", "stream", "user"))
    assert parse_completion({"prompt": "a", **nulls}) == parse_completion({"prompt": "a"})
    nulls |= dict.fromkeys(("top_logprobs", "max_completion_tokens", "response_format"))
    assert parse_chat({"messages": HI, **nulls}) == parse_chat({"messages": HI})


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    neutral = {"user": "u", "metadata": {"a": "b"}, "store": True, "stream": False, "logit_bias": {}}
    neutral |= {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "best_of": 1}
    assert parse_chat({"messages": HI, **neutral}) == parse_chat({"messages": HI})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stream", True),
        ("stream", 0),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "auto"),
        ("logit_bias", {"5": 1}),
        ("response_format", {"type": "xml"}),
        ("best_of", 2),
        ("best_of", True),
        ("suffix", "x"),
        ("stream_options", {"include_usage": True}),
        ("temprature", 1.0),
        ("", 1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0),
        ("n", 1.0),
        ("n", 0),
        ("seed", 2**70),
        ("stop", 5),
        ("stop", [5]),
        ("stop", [""]),
        ("stop", ["\ud800"]),
        ("stop_token_ids", "a"),
        ("stop_token_ids", ["a"]),
        ("ignore_eos", 1),
        ("max_tokens", "many"),
        ("max_tokens", -1),
        ("min_tokens", 17),
        ("model", 5),
    ],
)
def test_a_field_that_cannot_be_served_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        parse_completion({"prompt": "a", field: value})
    assert (field or "''") in str(caught.value)
    with pytest.raises(RequestError) as caught:
        parse_chat({"messages": HI, "max_tokens": 16, field: value})
    assert (field or "''") in str(caught.value)


def test_a_misspelt_field_is_refused_with_the_right_spelling() -> None:
    with pytest.raises(RequestError, match="unknown field 'temprature'; did you mean 'temperature'"):
        parse_chat({"messages": HI, "temprature": None})


@pytest.mark.parametrize("field", ["echo", "prompt"])
def test_chat_refuses_the_fields_of_completions(field: str) -> None:
    with pytest.raises(RequestError, match=field):
        parse_chat({"messages": HI, field: "x"})


@pytest.mark.parametrize("field", ["messages", "max_completion_tokens", "top_logprobs"])
def test_completions_refuse_the_fields_of_chat(field: str) -> None:
    with pytest.raises(RequestError, match=field):
        parse_completion({"prompt": "x", field: 1})


@pytest.mark.parametrize(
    "prompt", [None, [], {}, 5, [True], [-1], [1, "a"], ["a", 1], [[]], [1.5], "\udfff", ["a", "\ud800"]]
)
def test_a_prompt_that_is_none_is_refused(prompt: Any) -> None:
    with pytest.raises(RequestError, match="prompt"):
        parse_completion({"prompt": prompt})


@pytest.mark.parametrize(
    "message",
    [
        "Hi",
        {},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": 5},
        {"role": "user", "content": []},
        {"role": "user", "content": ["Hi"]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": "\ud800"},
        {"role": "tool", "content": "5"},
        {"role": ["user"], "content": "5"},
        {"role": "assistant", "content": "a", "tool_calls": [{}]},
        {"role": "user", "content": "a", "name": 5},
    ],
)
def test_a_bad_message_is_refused_with_its_place(message: Any) -> None:
    with pytest.raises(RequestError, match=r"messages\[1\]"):
        parse_chat({"messages": [*HI, message]})


@pytest.mark.parametrize("messages", [None, [], "Hi", {}])
def test_chat_without_messages_is_refused(messages: Any) -> None:
    with pytest.raises(RequestError, match="messages"):
        parse_chat({"messages": messages})


def test_text_parts_become_one_content() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = parse_chat({"messages": [{"role": "user", "content": parts, "name": "ann", "refusal": None}]})
    assert call.messages == ({"role": "user", "content": "a\nb", "name": "ann"},)


def test_developer_is_the_newer_name_of_system() -> None:
    call = parse_chat({"messages": [{"role": "developer", "content": "Be brief"}]})
    assert call.messages == ({"role": "system", "content": "Be brief"},)


def test_chat_takes_either_name_of_the_token_limit_but_not_two_limits() -> None:
    assert parse_chat({"messages": HI, "max_completion_tokens": 5}).params.max_tokens == 5
    assert parse_chat({"messages": HI, "max_completion_tokens": 5, "max_tokens": 5}).params.max_tokens == 5
    with pytest.raises(RequestError, match="max_tokens=4 and max_completion_tokens=5"):
        parse_chat({"messages": HI, "max_completion_tokens": 5, "max_tokens": 4})


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
    ],
)
def test_chat_logprobs_are_a_switch_and_a_count(fields: dict[str, Any], logprobs: int | None) -> None:
    assert parse_chat({"messages": HI, **fields}).params.logprobs == logprobs


@pytest.mark.parametrize(
    "fields", [{"top_logprobs": 3}, {"logprobs": 3}, {"logprobs": True, "top_logprobs": True}]
)
def test_chat_refuses_logprobs_in_another_form(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="logprobs"):
        parse_chat({"messages": HI, **fields})


def test_completions_refuse_logprobs_as_a_switch() -> None:
    with pytest.raises(RequestError, match="logprobs=True"):
        parse_completion({"prompt": "a", "logprobs": True})


def test_echo_with_logprobs_asks_for_those_of_the_prompt() -> None:
    assert parse_completion({"prompt": "a", "echo": True, "logprobs": 2}).params.prompt_logprobs == 2
    assert parse_completion({"prompt": "a", "echo": False, "logprobs": 2}).params.prompt_logprobs is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(
    ["prompt", "messages", "stop", "logprobs", "n", "max_tokens", "echo", "tools", "model", "stop_token_ids"]
)


@given(st.dictionaries(names | st.text(max_size=5), json_values, max_size=5), json_values)
def test_any_body_gives_a_call_or_a_request_error(body: dict[str, Any], value: Any) -> None:
    for parse, kind, extra in (
        (parse_completion, CompletionCall, {"prompt": "a"}),
        (parse_chat, ChatCall, {"messages": HI}),
        (parse_chat, ChatCall, {"messages": [value]}),
        (parse_chat, ChatCall, {"messages": [{"role": "user", "content": value}]}),
    ):
        for whole in (body, extra | body, body | extra):
            try:
                call = parse(whole)
            except RequestError as e:
                assert str(e)
            else:
                assert isinstance(call, kind)


# -- responses ---------------------------------------------------------------------------------------------


def test_a_completion_response_has_every_field_of_the_api() -> None:
    output = RequestOutput("r", "Hello", (1, 2, 3), [answer()])
    assert respond(parse_completion({"prompt": "Hello"}), output) == {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 5,
        "model": "m",
        "choices": [{"index": 0, "text": "ab", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def test_a_chat_response_has_every_field_of_the_api() -> None:
    outputs = [answer(), answer(index=1, text="c", token_ids=(9,), finish_reason="length")]
    output = RequestOutput("r", "Hello", (1, 2, 3), outputs)
    body = chat_response(
        parse_chat({"messages": HI, "n": 2}), output,
        response_id="chatcmpl-1", model="m", created=5, decode=decode,
    )  # fmt: skip
    assert body == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 5,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "ab", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            },
            {
                "index": 1,
                "message": {"role": "assistant", "content": "c", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            },
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
    }


def test_completion_logprobs_are_parallel_lists_with_offsets_from_the_prompts_start() -> None:
    call = parse_completion({"prompt": "Hello", "logprobs": 1})
    body = respond(call, RequestOutput("r", "Hello", (1,), [answer(logprobs=LOGPROBS)]))
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -0.2],
        "top_logprobs": [{"x": -0.1, "a": -0.5}, {"b": -0.2, "y": -9999.0}],
        "text_offset": [5, 6],
    }
    json.dumps(body, allow_nan=False)


def test_echo_puts_the_prompt_and_its_logprobs_first() -> None:
    call = parse_completion({"prompt": [1, 2], "logprobs": 0, "echo": True, "max_tokens": 0})
    prompt_logprobs = [None, {2: Logprob(-0.3, 1, None)}]
    empty = answer(text="", token_ids=(), finish_reason="length", logprobs=[])
    choice = respond(call, RequestOutput("r", None, (1, 2), [empty], prompt_logprobs=prompt_logprobs))[
        "choices"
    ][0]
    assert choice["text"] == "<1><2>"
    assert choice["logprobs"] == {
        "tokens": ["<1>", "<2>"],
        "token_logprobs": [None, -0.3],
        "top_logprobs": [None, {"<2>": -0.3}],
        "text_offset": [0, 3],
    }
    assert choice["prompt_logprobs"] == [None, {"2": {"logprob": -0.3, "rank": 1, "decoded_token": "<2>"}}]


def test_of_tokens_with_one_text_the_likeliest_counts() -> None:
    entry = {7: Logprob(-3.0, 9, "\ufffd"), 3: Logprob(-0.1, 1, "\ufffd")}
    call = parse_completion({"prompt": "a", "logprobs": 1})
    body = respond(call, RequestOutput("r", "a", (1,), [answer(token_ids=(7,), logprobs=[entry])]))
    logprobs = body["choices"][0]["logprobs"]
    assert (logprobs["token_logprobs"], logprobs["top_logprobs"]) == ([-3.0], [{"\ufffd": -0.1}])


def test_chat_logprobs_list_each_token_with_the_likeliest_in_its_place() -> None:
    logprobs = [LOGPROBS[0], {8: Logprob(math.nan, 1, "é"), 9: Logprob(-2.0, 2, "\ufffd")}]
    body = chat_response(
        parse_chat({"messages": HI, "logprobs": True, "top_logprobs": 1}),
        RequestOutput("r", "p", (1,), [answer(logprobs=logprobs)]),
        response_id="c", model="m", created=5, decode=decode,
    )  # fmt: skip
    last = {"token": "é", "logprob": -9999.0, "bytes": [0xC3, 0xA9]}
    assert body["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "a",
                "logprob": -0.5,
                "bytes": [97],
                "top_logprobs": [{"token": "x", "logprob": -0.1, "bytes": [120]}],
            },
            last | {"top_logprobs": [last]},
        ],
        "refusal": None,
    }


def test_a_part_of_a_character_has_no_bytes() -> None:
    body = chat_response(
        parse_chat({"messages": HI, "logprobs": True, "prompt_logprobs": 0}),
        RequestOutput(
            "r", "p", (1,), [answer(token_ids=(7,), logprobs=[{7: Logprob(-1.0, 1, "\ufffd")}])],
            prompt_logprobs=[None],
        ),
        response_id="c", model="m", created=5, decode=decode,
    )  # fmt: skip
    assert body["choices"][0]["logprobs"]["content"][0] == {
        "token": "\ufffd", "logprob": -1.0, "bytes": None, "top_logprobs": [],
    }  # fmt: skip
    assert body["prompt_logprobs"] == [None]


def test_choices_of_several_prompts_are_numbered_through() -> None:
    call = parse_completion({"prompt": ["a", "b"], "n": 2})
    outputs = [RequestOutput(r, r, (1,), [answer(), answer(index=1, text=r)]) for r in "ab"]
    body = respond(call, *outputs)
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "ab"), (1, "a"), (2, "ab"), (3, "b")]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 8, "total_tokens": 10}


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("json_object", True)),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True,
          "schema": {"type": "array"}}}}, ("json", '{"type": "array"}')),
        ({"structured_outputs": {"choice": ["a", "b"]}}, ("choice", ["a", "b"])),
        ({"structured_outputs": {"json": {"type": "array"}, "regex": None}}, ("json", '{"type": "array"}')),
        ({"guided_json": '{"type": "array"}'}, ("json", '{"type": "array"}')),
        ({"guided_regex": "a+", "response_format": {"type": "text"}}, ("regex", "a+")),
        ({"guided_choice": ["a"]}, ("choice", ["a"])),
        ({"guided_grammar": 'root ::= "a"'}, ("grammar", 'root ::= "a"')),
    ],
)  # fmt: skip
def test_each_way_to_ask_for_a_form_is_understood(fields: dict[str, Any], wanted: Any) -> None:
    for call in (parse_completion({"prompt": "a", **fields}), parse_chat({"messages": HI, **fields})):
        form = call.params.structured_outputs
        assert (form and form.kind_and_value) == wanted
