"""Endpoints beside OpenAI's own: tokens, /generate, health, metrics, what the server says of itself."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moe_lightning import SamplingParams
from moe_lightning.engine.prompts import render
from moe_lightning.pipeline.task import Lane

PROMPT = "the quick brown fox"
MESSAGES = [{"role": "user", "content": "the lazy dog"}]


class TestTokens:
    def test_a_prompt_goes_to_tokens_and_back(self, live, alone):
        status, body = live.post("/tokenize", {"prompt": PROMPT, "return_token_strs": True})
        ids = alone.tokenizer(PROMPT)["input_ids"]
        assert (status, body["tokens"], body["count"]) == (200, ids, len(ids))
        assert body["max_model_len"] == alone.max_model_len
        assert body["token_strs"] == alone.tokenizer.convert_ids_to_tokens(ids)
        assert live.post("/detokenize", {"tokens": ids}) == (200, {"prompt": PROMPT})

    def test_a_conversation_has_the_tokens_that_chat_runs(self, live, alone):
        _, body = live.post("/tokenize", {"messages": MESSAGES})
        assert tuple(body["tokens"]) == render(alone.tokenizer, MESSAGES)[0]
        _, shorter = live.post("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False})
        assert body["tokens"][: shorter["count"]] == shorter["tokens"]
        assert shorter["count"] < body["count"]

    def test_the_tokenizer_is_described(self, live, alone):
        _, body = live.get("/tokenizer_info")
        assert (body["bos_token"], body["eos_token"]) == ("<s>", "</s>")
        assert body["chat_template"] == alone.tokenizer.chat_template

    def test_half_a_request_is_refused(self, live):
        for body in ({}, {"prompt": "a", "messages": MESSAGES}):
            assert "either prompt or messages" in live.post("/tokenize", body)[1]["error"]["message"]


class TestGenerate:
    def test_text_and_ids_are_answered_as_by_generate(self, live, alone):
        params = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
        (want,) = alone.generate(
            [PROMPT], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), use_tqdm=False
        )
        ids = list(want.prompt_token_ids)
        for body in ({"text": PROMPT}, {"input_ids": ids}):
            status, answer = live.post("/generate", {**body, "sampling_params": params, "rid": "mine"})
            assert status == 200
            assert answer["text"] == want.outputs[0].text
            assert answer["output_ids"] == list(want.outputs[0].token_ids)
            meta = answer["meta_info"]
            assert meta["finish_reason"] == {"type": "length", "length": 6}
            assert (meta["id"], meta["prompt_tokens"], meta["completion_tokens"]) == ("mine", len(ids), 6)

    def test_lists_and_n_give_lists(self, live, alone):
        params = {"max_new_tokens": 2, "temperature": 0}
        _, answers = live.post("/generate", {"text": [PROMPT, "dog"], "sampling_params": params})
        assert [a["meta_info"]["prompt_tokens"] for a in answers] == [
            len(alone.tokenizer(prompt)["input_ids"]) for prompt in (PROMPT, "dog")
        ]
        _, answers = live.post("/generate", {"text": PROMPT, "sampling_params": {**params, "n": 3}})
        assert len(answers) == 3

    def test_log_probabilities_are_triples(self, live, alone):
        params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=2)
        (want,) = alone.generate([PROMPT], params, use_tqdm=False)
        body = {
            "text": PROMPT, "sampling_params": {"max_new_tokens": 3, "temperature": 0}, "return_logprob": True,
            "top_logprobs_num": 2, "logprob_start_len": 0,
        }  # fmt: skip
        meta = live.post("/generate", body)[1]["meta_info"]
        answer = want.outputs[0]
        assert meta["output_token_logprobs"] == [
            [entry[token].logprob, token, None]
            for token, entry in zip(answer.token_ids, answer.logprobs, strict=True)
        ]
        assert meta["input_token_logprobs"][0] == [None, want.prompt_token_ids[0], None]
        assert len(meta["input_token_logprobs"]) == len(want.prompt_token_ids)
        assert all(len(top) == 2 for top in meta["output_top_logprobs"])

    def test_a_stream_grows_to_the_whole_answer(self, live):
        body = {"text": [PROMPT, "dog"], "sampling_params": {"max_new_tokens": 12, "temperature": 0}}
        _, whole = live.post("/generate", body)
        texts = {0: "", 1: ""}
        for event in live.open_stream("/generate", {**body, "stream": True}).events():
            assert event["text"].startswith(texts[event["index"]])
            texts[event["index"]] = event["text"]
            last = event["meta_info"]["finish_reason"]
        assert texts == {i: answer["text"] for i, answer in enumerate(whole)}
        assert last is not None


class TestOperation:
    def test_health_and_what_it_is(self, live, alone):
        assert live.get("/health") == (200, {"status": "ok"})
        assert live.get("/health/ready") == (200, {"status": "ok"})
        status, info = live.get("/get_server_info")
        assert (status, info["status"], info["max_model_len"]) == (200, "ready", alone.max_model_len)
        assert info["plan"]["num_blocks"] == alone.policy.num_blocks
        assert "api_key" not in json.dumps(info)

    def test_metrics_count_what_was_done(self, live):
        before = metrics(live)
        live.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 5, "ignore_eos": True, "n": 2})
        live.open_stream("/v1/completions", {"prompt": PROMPT, "max_tokens": 5, "ignore_eos": True,
                                             "stream": True}).events()  # fmt: skip
        live.until(lambda: live.engine.num_unfinished == 0)
        grown = {name: value - before.get(name, 0) for name, value in metrics(live).items()}
        assert grown["generation_tokens_total"] == 15
        assert grown["prompt_tokens_total"] == 8
        assert grown["request_success_total"] == 3
        assert grown["e2e_request_latency_seconds_count"] == 2
        assert grown["time_to_first_token_seconds_count"] == 1
        assert grown["passes_total"] >= 10
        assert grown["page_bytes_total"] > 0
        now = metrics(live)
        assert now["num_requests_running"] == now["num_requests_waiting"] == now["kv_cache_usage_perc"] == 0

    def test_lanes_are_shares_once_a_pass_was_recorded(self, live):
        live.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 2})
        live.until(lambda: live.get("/get_server_info")[1]["lanes"] != {}, 60)
        lanes = live.get("/get_server_info")[1]["lanes"]
        assert set(lanes) == {lane.value for lane in Lane}
        assert all(0 <= share <= 1 for share in lanes.values())

    def test_the_page_needs_nothing_from_elsewhere(self, live):
        status, headers, page = live.send("GET", "/")
        assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "default-src 'none'" in headers["content-security-policy"]
        text = page.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
        assert "innerHTML" not in text

    def test_unknown_paths_and_methods_are_errors_of_the_same_form(self, live):
        for method, path, wanted in (("GET", "/nothing", 404), ("GET", "/v1/completions", 405)):
            status, _, body = live.send(method, path)
            assert status == wanted
            assert json.loads(body)["error"]["message"]

    def test_a_form_of_a_foreign_page_is_refused(self, live):
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            body = json.dumps({"prompt": "a"}).encode()
            status, headers, _ = live.send("POST", "/v1/completions", body, {"Content-Type": kind})
            assert (status, "access-control-allow-origin" in headers) == (415, False)

    def test_a_body_of_megabytes_is_read(self, live):
        body = {"prompt": "a", "max_tokens": 1, "user": "x" * 12_000_000}
        assert live.post("/v1/completions", body)[0] == 200
        status, answer = live.post("/v1/completions", {**body, "user": "x" * 17_000_000})
        assert (status, answer["error"]["code"]) == (413, "body_too_large")

    @pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
    def test_curl_streams(self, live):
        body = json.dumps({"messages": MESSAGES, "max_tokens": 3, "stream": True})
        command = ["curl", "-sN", f"{live.url}/v1/chat/completions", "-H", "Content-Type: application/json",
                   "-d", body]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.startswith('data: {"id":"chatcmpl-')
        assert done.stdout.endswith("data: [DONE]\n\n")


def metrics(live):
    """Sums over all labels."""
    status, headers, body = live.send("GET", "/metrics")
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/plain")
    found = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                name = sample.name.removeprefix("moe_lightning:")
                found[name] = found.get(name, 0) + sample.value
    return found
