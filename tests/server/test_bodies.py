"""Bodies that cannot be served: each gets a message, and none reaches the engine."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from functools import partial
from itertools import count

import pytest
from asgi import error_of, send

from moe_lightning.engine.structured import StructuredOutputsParams
from moe_lightning.server import forms
from moe_lightning.server.app import Settings, create_app
from moe_lightning.server.errors import HttpError
from moe_lightning.server.forms import FormCompiler
from moe_lightning.server.limits import Limits
from moe_lightning.server.responses import JsonResponse

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the fox"}]
GOOD = {
    "/v1/completions": {
        "prompt": "the fox", "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "n": 2,
        "seed": 3, "stop": ["x"], "stop_token_ids": [7], "presence_penalty": 0.1, "frequency_penalty": 0.1,
        "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 1, "logprobs": 1, "echo": True,
        "stream": True, "stream_options": {"include_usage": True}, "model": None,
    },
    "/v1/chat/completions": {
        "messages": MESSAGES, "max_completion_tokens": 4, "logprobs": True, "top_logprobs": 2, "n": 1,
        "temperature": 0.5, "stream": False, "stop": "x", "prompt_logprobs": 1,
    },
    "/generate": {
        "text": ["the fox", "dog"], "sampling_params": {"max_new_tokens": 4, "temperature": 0.5, "top_k": 3},
        "return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 0, "stream": False,
    },
    "/tokenize": {"prompt": "the fox", "add_special_tokens": True, "return_token_strs": True},
    "/detokenize": {"tokens": [4, 5, 6]},
}  # fmt: skip
NUMBERS = ["1", [], {}, True, -1e9, 1e400, 10**30, [1]]
INTEGERS = [*NUMBERS, 1.5, -7]
FLAGS = ["true", 1, 0, [], {}, 0.0]
PROMPTS = [
    5,
    1.5,
    True,
    {},
    [],
    [[]],
    [1.5],
    [-1],
    [True],
    [["a"]],
    ["a", 5],
    "\ud800",
    "",
    [10**9],
    [[3], "", []],
]
TEXTS = [5, 1.5, True, {}, [1], "\ud800"]
WRONG = {
    "temperature": NUMBERS, "top_p": [*NUMBERS, 0, 1.1], "top_k": INTEGERS, "min_p": [*NUMBERS, 1.1],
    "n": [*INTEGERS, 0, 2000], "seed": ["1", [], {}, True, 1.5, 10**30], "stop": [5, [5], [""], "", {}, ["a"] * 65,
    "a" * 2000, ["\ud800"]], "stop_token_ids": [5, "5", ["5"], [-1], [1.5], [2**40], {}, [1] * 65],
    "presence_penalty": [*NUMBERS, 2.1], "frequency_penalty": [*NUMBERS, -2.1],
    "repetition_penalty": [*NUMBERS, 0, 101], "ignore_eos": FLAGS, "min_tokens": [*INTEGERS, 100], "echo": FLAGS,
    "prompt_logprobs": [*INTEGERS, 101], "stream": FLAGS,
    "stream_options": [5, "x", [], {"include_usage": 1}, {"x": True}, True], "model": [*TEXTS, "gpt-9", ""],
    "prompt": PROMPTS, "max_tokens": INTEGERS, "max_completion_tokens": INTEGERS,
    "messages": [5, "x", {}, [], [5], [{}], [{"role": "user"}], [{"role": "x", "content": "a"}], [MESSAGES],
                 [{"role": "user", "content": 5}], [{"role": "user", "content": []}],
                 [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
                 [{"role": "user", "content": "a", "tool_calls": []}], [{"role": "user", "content": "\ud800"}]],
    "top_logprobs": [*INTEGERS, 101], "text": PROMPTS, "input_ids": ["a", 5],
    "sampling_params": [5, "x", [], {"x": 1}, {"temperature": "1"}, {"max_new_tokens": 1.5}, {"stop": 5},
                        {"n": 0}, {"json_schema": "{}"}, {"max_new_tokens": -1}],
    "return_logprob": FLAGS, "top_logprobs_num": [*INTEGERS, 101], "logprob_start_len": [*INTEGERS, 5],
    "add_special_tokens": FLAGS, "return_token_strs": FLAGS,
    "response_format": [5, "json", {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_object", "x": 1},
                        {"type": "json_schema", "json_schema": {"schema": 5}}, {"type": "structural_tag"},
                        {"type": "json_schema", "json_schema": {"schema": {"type": "cat"}}}],
    "structured_outputs": [5, "x", {}, {"x": 1}, {"regex": "a", "choice": ["b"]}, {"json_object": False},
                           {"regex": ""}, {"choice": []}, {"choice": [5]}, {"json": 5}, {"grammar": 5}],
    "guided_regex": [5, "", "(", "[a", {}, "x" * 10**5], "guided_choice": [5, "a", [], [""], [5], {}],
    "guided_json": [5, "{", [], {"type": "cat"}], "guided_grammar": [5, "", "root ::= other", "x", {}],
    "tokens": [5, "x", {}, ["a"], [1.5], [-1], [True], [10**9], [2**40], [None]],
}  # fmt: skip
LOGPROBS = {"/v1/completions": [*INTEGERS, 101], "/v1/chat/completions": FLAGS}
# Messages about these speak of what is in them.
_INNER = ("prompt", "text", "tokens", "model", "sampling_params")
NAMED = [(path, name) for path in GOOD for name in GOOD[path] if name in WRONG and name not in _INNER]
UNSUPPORTED = {
    "best_of": 2, "logit_bias": {"5": 1}, "suffix": "x", "tools": [{"type": "function"}], "tool_choice": "auto",
    "audio": {}, "modalities": ["audio"], "prediction": {}, "unheard_of": 1,
    "Temperature": 1, "": 1, "\ud800": 1, "__class__": {}, "extra_body": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def app(alone):
    """Its engine does not run: a body that got there would never come back."""
    return create_app(alone, Settings(limits=Limits(max_choices=64)))


def encode(value) -> bytes:
    return json.dumps(value).replace("Infinity", "1e400").encode()


def bad_bodies(path: str) -> list[bytes]:
    """Bodies that have one thing wrong each."""
    good, found = GOOD[path], []
    for name in good:
        wrong = LOGPROBS.get(path, []) if name == "logprobs" else WRONG[name]
        wrong = [
            value for value in wrong if (path, value) != ("/tokenize", "")
        ]  # has no tokens, and that is all
        found += [encode({**good, name: value}) for value in wrong]
    found += [encode({**good, name: value}) for name, value in UNSUPPORTED.items()]
    whole = json.dumps(good).encode()
    rng = random.Random(path)
    found += [whole[: rng.randrange(len(whole))] for _ in range(250)]  # torn
    found += [whole + bytes([rng.randrange(33, 127)]) for _ in range(50)]
    for _ in range(150):  # a byte that UTF-8 never has
        at = rng.randrange(len(whole))
        found.append(whole[:at] + bytes([rng.randrange(0xF8, 0x100)]) + whole[at + 1 :])
    found += [json.dumps(value).encode() for value in ([], 5, "x", None, True, [good], {})]
    found += [b"", b"{" * 10**5, b"[" * 10**5, b'{"a":' * 10**5, b"nan", b'{"n": NaN}', b"9" * 10**5]
    return found


@pytest.mark.parametrize("path", GOOD)
def test_each_bad_body_gets_a_message_and_none_reaches_the_engine(path, app, alone):
    bodies = bad_bodies(path)
    assert len(bodies) > 450

    async def send_all():
        for body in bodies:
            status, _, data = await send(app, path, body)
            assert len(data) < 2000, "a message does not repeat the body"
            error_of(status, data)

    asyncio.run(send_all())
    assert app.state.service.desk.num_interactive == alone.engine.num_unfinished == 0


def test_half_surrogates_and_deep_nesting_are_refused_wherever_they_are(app):
    key, deep = "\ud800" + "x" * 10**5, json.loads('{"not":' * 800 + "{}" + "}" * 800)
    chat, prompt = {"messages": MESSAGES}, {"prompt": "a"}
    part = {"type": "text", "text": "a"}
    bodies = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a", key: 1}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{**part, key: 1}]}]}),
        ("/v1/chat/completions", {**chat, "stream": True, "stream_options": {key: True}}),
        ("/v1/chat/completions", {**chat, key: 1}),
        ("/v1/completions", {**prompt, "guided_json": deep}),
        ("/v1/completions", {**prompt, "guided_json": {"properties": {key: {}}}}),
        ("/v1/completions", {**prompt, "structured_outputs": {key: 1}}),
        ("/v1/completions", {**prompt, "response_format": {"type": key}}),
        ("/v1/completions", {**prompt, "logit_bias": deep}),
        ("/generate", {"text": "a", "sampling_params": {key: 1}}),
        ("/generate", {"text": "a", "sampling_params": [deep]}),
    ]
    for name in ("guided_regex", "guided_grammar", "guided_json"):
        bodies.append(("/v1/completions", {**prompt, name: 'root ::= "\ud800"'}))
    bodies.append(("/v1/completions", {**prompt, "guided_choice": ["a", "\ud800"]}))
    for path, body in bodies:
        status, _, data = asyncio.run(send(app, path, json.dumps(body).encode()))
        assert status == 400, (body.keys(), data)
        assert len(error_of(status, data)) < 400


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": 3}, "one request gets 2 at most"),
        ({"stop": ["a", "b"]}, "stop has 2 entries; give 1 at most"),
        ({"stop_token_ids": [3, 4]}, "stop_token_ids has 2 entries; give 1 at most"),
        ({"guided_json": {"type": "object", "properties": {"a": {}}}}, "nested more than 2 levels deep"),
        ({"guided_regex": "a{5}"}, "more than 4 times in sum"),
    ],
)
def test_what_is_larger_than_the_limits_is_refused(alone, body, message):
    limits = Limits(max_choices=2, max_stops=1, max_form_depth=2, max_form_count=4)
    app = create_app(alone, Settings(limits=limits))
    status, _, data = asyncio.run(send(app, "/v1/completions", encode({"prompt": "a", **body})))
    assert message in error_of(status, data)


class EndlessForms:
    """Compilations that end when they are let. Waits for them end, whatever the clock says, once two are at work
    and as many wait as are expected to."""

    def __init__(self, monkeypatch) -> None:
        self.threads, self._is_over = [], threading.Event()
        self.waits = self.expected_waits = 0
        monkeypatch.setattr(asyncio, "wait", self._wait)
        monkeypatch.setattr(forms, "monotonic", count(0, Limits().form_seconds).__next__)

    def compile(self, _) -> None:
        self.threads.append(threading.current_thread().name)
        assert self._is_over.wait(120)

    async def _wait(self, *_, timeout) -> None:
        assert timeout == Limits().form_seconds
        self.waits += 1
        await asyncio.sleep(0.001)  # others that are ready come first
        while len(self.threads) < 2 or self.waits < self.expected_waits:
            await asyncio.sleep(0.001)

    def end(self) -> None:
        self._is_over.set()


@pytest.fixture
def endless(monkeypatch):
    forms = EndlessForms(monkeypatch)
    yield forms
    forms.end()


def statuses_of_forms(app, *forms: str) -> list[int]:
    """Of bodies that come at a time, each with a form."""
    bodies = [b'{"prompt": "a", "guided\\u005fregex": "%s"}' % form.encode() for form in forms]

    async def send_all():
        return await asyncio.gather(*(send(app, "/v1/completions", body) for body in bodies))

    return [status for status, *_ in asyncio.run(send_all())]


def test_forms_are_compiled_apart_however_their_field_is_written_and_not_for_ever(
    alone, endless, monkeypatch
):
    monkeypatch.setattr(alone, "prepare_form", endless.compile)
    app, endless.expected_waits = create_app(alone), 4
    assert statuses_of_forms(app, "a", "a", "b", "c") == [400, 400, 400, 503], "two are compiled at a time"
    assert [name[:7] for name in endless.threads] == ["compile"] * 2, "and none of them twice"


def test_no_more_forms_wait_than_may(alone, endless, monkeypatch):
    monkeypatch.setattr(alone, "prepare_form", endless.compile)
    app, endless.expected_waits = create_app(alone, Settings(limits=Limits(max_forms=3))), 3
    assert statuses_of_forms(app, *"abcde") == [400, 400, 503, 503, 503]


def test_forms_that_go_on_for_ever_hold_up_no_others(endless, monkeypatch):
    compiler = FormCompiler(endless.compile, Limits(), lambda: 7)

    async def refusal(form):
        with pytest.raises(HttpError) as refused:
            await compiler.prepare(StructuredOutputsParams(regex=form))
        return refused.value

    async def ask():
        both = await asyncio.gather(refusal("a"), refusal("b"))
        assert ["not compiled within 20 s" in error.message for error in both] == [True, True]
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "wait", None)  # nobody waits any more
            for _ in range(10):
                assert (await refusal("a")).status == 400
                assert ((await refusal("c")).status, (await refusal("c")).retry_after) == (503, 7)
        monkeypatch.undo()
        endless.end()
        for job in compiler._jobs.values():
            job.result(120)
        await compiler.prepare(StructuredOutputsParams(regex="c"))

    asyncio.run(ask())
    compiler.close()
    assert len(endless.threads) == 3


def test_batches_leave_a_thread_for_forms_that_somebody_waits_for():
    is_over, begun = threading.Event(), []

    def compile_form(form):
        begun.append(form.regex)
        assert form.regex == "a" or is_over.wait(120)

    async def ask():
        compiler = FormCompiler(compile_form, Limits(), lambda: 1)
        ask_for = partial(compiler.prepare, is_background=True)
        tasks = [asyncio.create_task(ask_for(StructuredOutputsParams(regex=form))) for form in "bcd"]
        while not begun:
            await asyncio.sleep(0.001)
        await compiler.prepare(StructuredOutputsParams(regex="a"))
        assert begun == ["b", "a"]
        is_over.set()
        await asyncio.gather(*tasks)
        compiler.close()

    try:
        asyncio.run(ask())
    finally:
        is_over.set()


def test_forms_of_batches_that_take_too_long_leave_a_thread_for_others(monkeypatch):
    is_over, begun = threading.Event(), []

    def compile_form(form):
        begun.append(form.regex)
        assert form.regex == "fast" or is_over.wait(120)

    async def status(compiler, form, *, is_background):
        try:
            await compiler.prepare(StructuredOutputsParams(regex=form), is_background=is_background)
        except HttpError as error:
            return error.status
        return 200

    monkeypatch.setattr(forms, "monotonic", count(0, 20).__next__)

    async def ask():
        compiler = FormCompiler(compile_form, Limits(form_seconds=0.02), lambda: 1)
        while (of_batch := await status(compiler, "slow", is_background=True)) == 503:
            pass  # until a thread has begun with it
        assert of_batch == 400
        assert await status(compiler, "slower", is_background=True) == 503, "it may be tried again"
        assert await status(compiler, "fast", is_background=False) in (200, 503)
        assert "slower" not in begun
        is_over.set()
        while await status(compiler, "slower", is_background=True) != 200:
            await asyncio.sleep(0.001)
        compiler.close()

    try:
        asyncio.run(ask())
    finally:
        is_over.set()


def test_a_form_that_waited_for_a_thread_may_come_again():
    is_over, begun = threading.Event(), threading.Semaphore(0)

    def compile_form(form):
        begun.release()
        assert is_over.wait(120)

    async def ask(monkeypatch):
        compiler = FormCompiler(compile_form, Limits(form_seconds=0.001), lambda: 1)
        monkeypatch.setattr(forms, "monotonic", lambda: 5.0)  # for which nothing has run long yet
        while True:
            with pytest.raises(HttpError) as refused:
                await compiler.prepare(StructuredOutputsParams(regex="a"))
            assert refused.value.status == 503
            if begun.acquire(blocking=False):
                break
        is_over.set()
        compiler.close()

    with pytest.MonkeyPatch.context() as patch:
        asyncio.run(ask(patch))


def test_a_body_counts_as_held_until_it_is_made_into_a_request(alone):
    app = create_app(alone, Settings(limits=Limits(max_bodies_bytes=150_000)))
    body = json.dumps({"prompt": "fox " * 25_000}).encode()
    assert 75_000 < len(body) < 150_000
    is_over = threading.Event()
    app.state.service._tokenizing.submit(is_over.wait, 120)

    async def send_all():
        waiting = asyncio.create_task(send(app, "/tokenize", body))
        while not app.state.service.bodies._held:
            await asyncio.sleep(0)
        refused = await send(app, "/tokenize", body)
        is_over.set()
        return refused, await waiting, await send(app, "/tokenize", body)

    try:
        refused, *answered = asyncio.run(send_all())
    finally:
        is_over.set()
    assert (refused[0], json.loads(refused[2])["error"]["code"]) == (503, "busy")
    assert [status for status, *_ in answered] == [200, 200]
    assert app.state.service.bodies._held == 0


def test_large_bodies_with_a_form_are_made_into_requests_too(live):
    body = {"prompt": "the fox", "max_tokens": 3, "guided_choice": ["yes", "no"], "user": "x" * 100_000}
    status, answer = live.post("/v1/completions", body)
    assert status == 200, answer
    assert any(word.startswith(answer["choices"][0]["text"]) for word in ("yes", "no"))
    assert live.post("/v1/completions", {**body, "guided_choice": [5]})[0] == 400


def test_an_answer_with_half_a_surrogate_is_still_one():
    assert json.loads(JsonResponse({"a": "x\ud800"}).body) == {"a": "x?"}


@pytest.mark.parametrize("name", [n for n in UNSUPPORTED if n.isidentifier()])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_field_that_is_not_supported_is_named(path, name, app):
    body = json.dumps({**GOOD[path], name: UNSUPPORTED[name]}).encode()
    status, _, data = asyncio.run(send(app, path, body))
    assert status == 400
    assert name in error_of(status, data)


@pytest.mark.parametrize("path, name", NAMED)
def test_a_field_with_a_wrong_value_is_named(path, name, app):
    for value in WRONG[name]:
        status, _, data = asyncio.run(send(app, path, encode({**GOOD[path], name: value})))
        assert name.removeprefix("max_completion_").removesuffix("_num") in error_of(status, data)


@pytest.mark.parametrize(
    "name",
    [
        "response_format",
        "structured_outputs",
        "guided_regex",
        "guided_choice",
        "guided_json",
        "guided_grammar",
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_form_that_cannot_be_is_refused_with_a_reason(path, name, app):
    good = {"prompt": "a"} if path == "/v1/completions" else {"messages": MESSAGES}
    for value in WRONG[name]:
        status, _, data = asyncio.run(send(app, path, encode({**good, name: value})))
        assert any(word in error_of(status, data) for word in (name, "structured_outputs"))
    for other in ({"ignore_eos": True}, {"min_tokens": 1}, {"response_format": {"type": "json_object"},
                                                             "structured_outputs": {"regex": "b"}}):  # fmt: skip
        body = {**good, "guided_regex": "a", **other}
        assert asyncio.run(send(app, path, encode(body)))[0] == 400


def test_log_probabilities_of_the_prompt_do_not_come_in_a_stream(app):
    for path, good in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": MESSAGES}),
    ):
        body = {**good, "stream": True, "prompt_logprobs": 0}
        status, _, data = asyncio.run(send(app, path, encode(body)))
        assert (status, error_of(status, data)[:15]) == (400, "prompt_logprobs")


def test_more_answers_than_one_request_may_have_are_refused(app):
    for body in ({"prompt": ["a"] * 65}, {"prompt": ["a"] * 8, "n": 9}):
        status, _, data = asyncio.run(send(app, "/v1/completions", json.dumps(body).encode()))
        assert (status, "64 at most" in error_of(status, data)) == (400, True)


def test_text_that_cannot_fit_is_refused_without_tokenizing_it(app, alone, monkeypatch):
    monkeypatch.setattr(alone, "tokenizer", None)
    long = "fox " * 10**6
    for path, body in (
        ("/v1/completions", {"prompt": ["a", long]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
        ("/generate", {"text": long}),
    ):
        status, _, data = asyncio.run(send(app, path, json.dumps(body).encode()))
        assert (status, "4000000 characters" in error_of(status, data)) == (400, True)


def test_a_template_cannot_reach_out_of_its_sandbox(app, alone, monkeypatch):
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    monkeypatch.setattr(alone.tokenizer, "chat_template", template)
    status, _, data = asyncio.run(
        send(app, "/v1/chat/completions", json.dumps({"messages": MESSAGES}).encode())
    )
    assert "unsafe" in error_of(status, data)
