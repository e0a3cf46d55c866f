"""A job killed again and again ends with every answer exactly once, each as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from forked_job import start_job

NUM_KILLS = 20
NUM_REQUESTS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random Mixtral with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny-mixtral")
    config = MixtralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, num_local_experts=4, num_experts_per_tok=2,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(5)
    MixtralForCausalLM(config).save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<s>", "</s>", *alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)
    return directory


@pytest.fixture
def requests(tmp_path):
    """A batch file with greedy and sampled requests of different lengths; the sampled ones have no seed."""
    path = tmp_path / "in.jsonl"
    with path.open("w") as file:
        for i in range(NUM_REQUESTS):
            body = {
                "prompt": f"request {i} " * (1 + i % 4), "max_tokens": 12 + i % 13,
                "temperature": i % 3 / 2, "ignore_eos": True,
            }  # fmt: skip
            line = {"custom_id": f"id-{i}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path


def _job(model, requests, output):
    return ["run-batch", "-i", requests, "-o", output, "--model", model, "--max-num-seqs", "2"]


def _run_whole(job):
    """Run the command as users do, to its end."""
    done = subprocess.run(
        [*map(str, (sys.executable, "-m", "moe_lightning", *job))],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def _answers(output):
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    answers = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows}
    assert len(answers) == len(rows), "a custom_id was written twice"
    return answers


def _kill_at_random(process, output, log, draw):
    """SIGKILL while it starts, or once it has written a few more lines: anywhere in a pass or a write."""
    lines = draw.choice([0, 1, 1, 2, 3])
    size = output.stat().st_size if output.exists() else 0
    deadline = time.monotonic() + (60 if lines else draw.uniform(0, 0.5))
    seen = 0
    while seen < lines and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
        now = output.stat().st_size if output.exists() else 0
        seen, size = seen + (now > size), max(now, size)
    time.sleep(draw.uniform(0, 0.05) if lines else max(0.0, deadline - time.monotonic()))
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
    return process.exitcode != 0


@pytest.mark.timeout(900)
def test_a_job_killed_at_random_moments_ends_with_each_answer_once(model, requests, tmp_path):
    whole = tmp_path / "whole.jsonl"
    _run_whole(_job(model, requests, whole))
    expected = _answers(whole)
    assert len(expected) == NUM_REQUESTS

    draw, output, log = random.Random(11), tmp_path / "killed.jsonl", tmp_path / "log"
    job = _job(model, requests, output)
    kills = 0
    for _ in range(5 * NUM_KILLS):
        if kills == NUM_KILLS:
            break
        if _kill_at_random(start_job(job, log), output, log, draw):
            kills += 1
        else:  # it was the faster one: the next kills strike a new job
            assert _answers(output) == expected
            output.unlink()
    assert kills == NUM_KILLS
    _run_whole(job)
    assert _answers(output) == expected
    assert not (tmp_path / "killed.errors.jsonl").exists()
