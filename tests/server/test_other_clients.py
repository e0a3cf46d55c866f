"""Clients as their makers ship them, against `moe-lightning serve` with the demo model."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from pathlib import Path

import pytest
from server_process import running

from demo_model import DENSE, MOE, ROOT

CLIENTS = ROOT / ".venv-clients" / "bin" / "python"
RUNS = Path(__file__).parent / "client_runs.py"
TASKS = RUNS.parent / "lm_eval_tasks"
ENDPOINTS = "/v1/completions", "/v1/chat/completions"
CHOICE, GENERATION = "moe_lightning_choice", "moe_lightning_generation"
LOG_LIKELIHOOD_ERROR = 2e-4  # of a sum over a dozen float32 tokens, in nats: ours differ by 7e-5 at most

pytestmark = pytest.mark.demo


@pytest.fixture(scope="module")
def url():
    with running(MOE, "--dtype", "float32", "--max-num-seqs", "32") as url:
        yield url


def run(command, **options):
    """Standard output of a command that knows no internet."""
    offline = dict.fromkeys(
        ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"
    )
    done = subprocess.run(
        [*map(str, command)], env={**os.environ, **offline, "OMP_NUM_THREADS": "1", **options.pop("env", {})},
        capture_output=True, text=True, check=False, **options,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def run_client(module, arguments, **options):
    """A client's command, once for each list of arguments."""
    assert CLIENTS.exists(), f"{CLIENTS} is missing; run `make clients`"
    run([CLIENTS, RUNS, module], input=json.dumps([[*map(str, each)] for each in arguments]), **options)


@pytest.fixture(scope="module")
def lm_eval(url, tmp_path_factory):
    """Where lm_eval wrote what it found: through the server, through its chat, and on its own with transformers."""
    out = tmp_path_factory.mktemp("lm_eval")
    common = f"model=demo-model,tokenizer={MOE},num_concurrent=24,max_retries=1"
    completions = f"{common},base_url={url}/v1/completions,tokenizer_backend=huggingface"
    chat = f"{common},base_url={url}/v1/chat/completions"
    runs = {
        "completions": ("local-completions", completions, f"{CHOICE},{GENERATION}"),
        "chat": ("local-chat-completions", chat, GENERATION, "--apply_chat_template"),
        "hf": ("hf", f"pretrained={DENSE},dtype=float32", f"{CHOICE},{GENERATION}", "--device", "cpu",
               "--batch_size", "8"),
    }  # fmt: skip
    arguments = [
        ["run", "--model", model, "--model_args", args, "--tasks", tasks, "--include_path", ".",
         "--output_path", out / name, "--log_samples", *more]
        for name, (model, args, tasks, *more) in runs.items()
    ]  # fmt: skip
    run_client("lm_eval", arguments, cwd=TASKS, env={"HF_HOME": str(out / "cache")})
    return {name: out / name for name in runs}


@pytest.mark.clients
@pytest.mark.timeout(600)  # of imports and of transformers' own passes, most of all
class TestLmEval:
    def scores(self, directory):
        (file,) = directory.glob("*/results_*.json")
        return json.loads(file.read_text())["results"]

    def responses(self, directory, task):
        """What each question got, in order: log-likelihoods with whether they are greedy, or text."""
        (file,) = directory.glob(f"*/samples_{task}_*.jsonl")
        rows = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda r: r["doc_id"])
        return [row["filtered_resps"] for row in rows]

    def test_scores_are_those_of_its_own_backend(self, lm_eval):
        ours, theirs = self.scores(lm_eval["completions"]), self.scores(lm_eval["hf"])
        for task, metric in ((CHOICE, "acc"), (CHOICE, "acc_norm"), (GENERATION, "exact_match")):
            assert ours[task][f"{metric},none"] == theirs[task][f"{metric},none"]
            assert 0.5 < ours[task][f"{metric},none"] < 1, "says nothing of right or wrong"

    def test_so_are_the_log_likelihoods_and_texts(self, lm_eval):
        ours, theirs = (self.responses(lm_eval[name], CHOICE) for name in ("completions", "hf"))
        assert len(ours) == len(theirs) == 6
        assert {greedy for answer in theirs for _, greedy in answer} == {"False", "True"}
        for mine, other in zip(ours, theirs, strict=True):
            assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]
            sums = [[float(value) for value, _ in answer] for answer in (mine, other)]
            assert sums[0] == pytest.approx(sums[1], abs=LOG_LIKELIHOOD_ERROR, rel=0)
        assert self.responses(lm_eval["completions"], GENERATION) == self.responses(lm_eval["hf"], GENERATION)

    def test_chat_answers_every_question(self, lm_eval):
        texts = [text for (text,) in self.responses(lm_eval["chat"], GENERATION)]
        assert len(texts) == 4 and all(text.strip() for text in texts)
        assert "Paris" in texts[0]


@pytest.fixture(scope="module")
def guidellm(url, tmp_path_factory):
    """Per endpoint the report of guidellm, which asks for streams."""
    out = tmp_path_factory.mktemp("guidellm")
    reports = {path: out / f"{number}.json" for number, path in enumerate(ENDPOINTS)}
    arguments = []
    for path, report in reports.items():
        backend = {"kind": "openai_http", "target": url, "request_format": path,
                   "extras": {"body": {"temperature": 0}}}  # fmt: skip
        arguments.append([
            "run", "--backend", json.dumps(backend), "--profile", "kind=concurrent,streams=3",
            "--constraint", "kind=max_requests,count=6", "--tokenizer", f"kind=huggingface_auto,model={MOE}",
            "--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=4", "--disable-progress",
            "--output", f"kind=json,path={report}",
        ])  # fmt: skip
    # One process sends all requests: each more would import guidellm for itself.
    settings = {"GUIDELLM__MAX_WORKER_PROCESSES": "1", "GUIDELLM__MP_CONTEXT_TYPE": "forkserver"}
    run_client("guidellm", arguments, env={"HF_HOME": str(out / "cache"), **settings})
    return {path: json.loads(report.read_text()) for path, report in reports.items()}


@pytest.mark.clients
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", ENDPOINTS)
def test_guidellm_gets_all_its_answers_and_they_are_the_right_ones(url, guidellm, path):
    (benchmark,) = guidellm[path]["benchmarks"]
    assert benchmark["metrics"]["request_totals"] == {
        "successful": 6,
        "errored": 0,
        "incomplete": 0,
        "total": 6,
    }
    for request in benchmark["requests"]["successful"]:
        assert request["output_metrics"]["total_tokens"] == 4
        assert request["input_metrics"]["total_tokens"] >= 16
        assert request["output"] == whole_answer(url + path, json.loads(request["request_args"])["body"])


def whole_answer(url, body):
    """What a body of a stream gets in one piece."""
    del body["stream_options"]
    data = json.dumps({**body, "stream": False}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        (choice,) = json.load(response)["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


class TestCurl:
    BODY = {"prompt": "The capital of France is", "max_tokens": 6, "temperature": 0}

    def curl(self, url, body):
        header = "Content-Type: application/json"
        return run(
            ["curl", "-sS", "--fail-with-body", "--no-buffer", url, "-H", header, "-d", json.dumps(body)]
        )

    def test_a_whole_answer(self, url):
        found = json.loads(self.curl(f"{url}/v1/completions", self.BODY))
        assert found["choices"][0]["text"].startswith(" Paris")
        assert found["usage"]["completion_tokens"] == 6

    def test_a_stream_joins_to_the_whole_answer(self, url):
        whole = json.loads(self.curl(f"{url}/v1/completions", self.BODY))["choices"][0]["text"]
        lines = self.curl(f"{url}/v1/completions", {**self.BODY, "stream": True}).split("\n\n")
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert events.pop() == "[DONE]"
        assert len(events) > 1
        assert "".join(c["text"] for e in events for c in json.loads(e)["choices"]) == whole
