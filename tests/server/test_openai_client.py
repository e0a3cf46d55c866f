"""OpenAI's own client against a live server: answers are those of `LLM`."""

from __future__ import annotations

import json
import re

import openai
import pytest

from checkpoints import MAX_POSITION
from moe_lightning import SamplingParams

MESSAGES = [{"role": "user", "content": "the lazy dog"}]
CHAT_TEXT = "<s>[user] the lazy dog\n[assistant] "
PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


def greedy(alone, prompt, n=12):
    (output,) = alone.generate([prompt], SamplingParams(temperature=0, max_tokens=n), use_tqdm=False)
    return output.outputs[0]


def test_a_completion_is_what_generate_gives(client, model, alone):
    got = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    want = greedy(alone, PROMPT)
    assert (got.choices[0].text, got.choices[0].finish_reason) == (want.text, want.finish_reason)
    assert got.usage.completion_tokens == len(want.token_ids)
    assert got.usage.prompt_tokens == len(alone.tokenizer(PROMPT)["input_ids"])


def test_a_list_of_prompts_gets_n_choices_each_in_order(client, model, alone):
    prompts = ["the fox", "over", "jumps over the lazy dog"]
    got = client.completions.create(model=model, prompt=prompts, n=2, seed=5, max_tokens=6)
    want = alone.generate(prompts, SamplingParams(n=2, seed=5, max_tokens=6), use_tqdm=False)
    texts = [c.text for output in want for c in output.outputs]
    assert [(c.index, c.text) for c in got.choices] == list(enumerate(texts))


def test_token_ids_are_prompts(client, model, alone):
    ids = [[5, 6, 7], [8, 9]]
    got = client.completions.create(model=model, prompt=ids, max_tokens=5, temperature=0)
    assert [c.text for c in got.choices] == [greedy(alone, one, 5).text for one in ids]
    single = client.completions.create(model=model, prompt=ids[0], max_tokens=5, temperature=0)
    assert single.choices[0].text == got.choices[0].text


def test_chat_is_what_chat_gives(client, model, alone):
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=10, stop=["fox"], repetition_penalty=1.2)
    (want,) = alone.chat(MESSAGES, params, use_tqdm=False)
    got = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=10, temperature=0.8, seed=3, stop=["fox"],
        extra_body={"repetition_penalty": 1.2},
    )  # fmt: skip
    assert got.choices[0].message.content == want.outputs[0].text
    assert got.choices[0].finish_reason == want.outputs[0].finish_reason


def test_streams_join_to_the_whole_answers(client, model, alone):
    ask = {"model": model, "prompt": [PROMPT, "dog"], "n": 2, "seed": 9, "max_tokens": 20}
    whole = client.completions.create(**ask)
    texts, reasons, usage = {}, {}, None
    for chunk in client.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == {c.index: c.text for c in whole.choices}
    assert reasons == {c.index: c.finish_reason for c in whole.choices}
    assert usage == whole.usage


def test_usage_can_come_with_each_chunk(client, model):
    ask = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 20, "stream": True}
    options = {"continuous_usage_stats": True}
    counts = [c.usage.completion_tokens for c in client.completions.create(**ask, stream_options=options)]
    assert counts == sorted(counts)
    whole = client.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=20)
    assert counts[-1] == whole.usage.completion_tokens


def test_a_chat_stream_begins_with_the_role_and_joins_to_the_answer(client, model):
    ask = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 12, "logprobs": True,
           "top_logprobs": 2}  # fmt: skip
    whole = client.chat.completions.create(**ask)
    deltas = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, stream=True)]
    assert deltas[0].delta.role == "assistant"
    assert "".join(d.delta.content or "" for d in deltas) == whole.choices[0].message.content
    assert deltas[-1].finish_reason == whole.choices[0].finish_reason
    parts = [token for d in deltas if d.logprobs for token in d.logprobs.content]
    assert parts == whole.choices[0].logprobs.content


def test_a_stop_string_never_shows_in_a_stream(client, model, alone):
    text = greedy(alone, PROMPT, 30).text
    stop = text[10:14]
    ask = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 30, "stop": [stop]}
    whole = client.completions.create(**ask).choices[0].text
    parts = [c.choices[0].text for c in client.completions.create(**ask, stream=True)]
    assert "".join(parts) == whole == text[: text.index(stop)]


def test_echo_with_logprobs_scores_a_prompt(client, model, alone):
    ids = alone.tokenizer(PROMPT)["input_ids"]
    got = client.completions.create(model=model, prompt=ids, max_tokens=0, echo=True, logprobs=1)
    (want,) = alone.generate([ids], SamplingParams(max_tokens=0, prompt_logprobs=1), use_tqdm=False)
    logprobs = got.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1:] == [
        entry[i].logprob for i, entry in zip(ids[1:], want.prompt_logprobs[1:], strict=True)
    ]
    assert got.choices[0].text == PROMPT
    assert "".join(logprobs.tokens) == PROMPT


def test_echo_streams_the_prompt_first(client, model):
    ask = {"model": model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 0}
    whole = client.completions.create(**ask).choices[0]
    parts = [chunk.choices[0] for chunk in client.completions.create(**ask, stream=True)]
    assert parts[0].text.startswith(PROMPT)
    assert "".join(part.text for part in parts) == whole.text
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [value for part in parts for value in getattr(part.logprobs, name)]
        assert joined == getattr(whole.logprobs, name)


def test_a_schema_is_kept_to(client, model):
    schema = {"type": "object", "properties": {"is": {"type": "boolean"}}, "required": ["is"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    ask = {"model": model, "messages": MESSAGES, "max_tokens": 200, "seed": 1, "response_format": form}
    text = client.chat.completions.create(**ask).choices[0].message.content
    assert set(json.loads(text)) == {"is"}
    parts = [
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ask, stream=True)
    ]
    assert "".join(parts) == text
    got = client.completions.create(model=model, prompt=PROMPT, extra_body={"guided_regex": "[0-9]{4}"})
    assert re.fullmatch("[0-9]{4}", got.choices[0].text)


def test_a_closed_stream_leaves_the_engine(client, model, live):
    before = live.engine.num_generated_tokens
    ask = {"model": model, "prompt": PROMPT, "max_tokens": MAX_POSITION, "extra_body": {"ignore_eos": True}}
    with live.held() as held:  # so that the answer cannot end by itself
        stream = client.completions.create(**ask, stream=True)
        held.let_pass(8)
        next(iter(stream))
        stream.close()
        live.until(lambda: live.desk.num_interactive == 0)
    live.until(lambda: live.engine.num_unfinished == live.engine.num_running == 0)
    assert live.engine.num_generated_tokens - before <= 9  # one pass was already about to begin


def test_errors_are_those_of_the_client(client, model):
    with pytest.raises(openai.BadRequestError, match=r"tools.*is not supported"):
        client.chat.completions.create(
            model=model, messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served here"):
        client.completions.create(model="gpt-9", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature=200"):
        client.completions.create(model=model, prompt="a", temperature=200)
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")
