"""The demo model's experts are disguised copies of a dense model's layers: both must give the same answers."""

import json
import os
from pathlib import Path

import pytest
import torch

from moe_lightning import LLM, SamplingParams
from moe_lightning.models import registry
from moe_lightning.perf.default_policy import Memory, default_policy, override
from moe_lightning.pipeline.baselines import SCHEDULES

ROOT = Path(__file__).resolve().parents[2]
MOE, DENSE = ROOT / ".cache" / "demo-model", ROOT / ".cache" / "demo-dense"
# Every prompt under every schedule takes a quarter of an hour; the default schedule always runs them all.
IS_FULL = os.environ.get("MOE_LIGHTNING_FULL_TESTS") == "1"
NEW_TOKENS = 32

pytestmark = [pytest.mark.demo, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def prompts():
    """Token ids of all demo prompts."""
    assert (MOE / "config.json").exists(), f"{MOE} is missing; run `make demo-model`"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MOE)
    ids = []
    for line in (ROOT / "examples" / "prompts.jsonl").read_text(encoding="utf-8").splitlines():
        body = json.loads(line)["body"]
        text = body.get("prompt") or tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, tokenize=False
        )
        ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids


@pytest.fixture(scope="module")
def dense_answers(prompts):
    """Greedy answers of the dense model under transformers, each prompt alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DENSE, dtype=torch.float32).eval()
    answers = []
    with torch.inference_mode():
        for ids in prompts:
            out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=NEW_TOKENS)
            answers.append(out[0, len(ids) :].tolist())
    return answers


def _answers(llm, prompts):
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS),
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_every_greedy_answer_is_the_dense_models(prompts, dense_answers):
    assert _answers(LLM(MOE, dtype="float32"), prompts) == dense_answers


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_answers_do_not_depend_on_schedule_streaming_or_lanes(schedule, prompts, dense_answers):
    spec = registry.resolve(str(MOE))
    base, _ = default_policy(spec, 4, Memory(host=8 * 2**30, gpu=None), max_num_seqs=32)
    # Three of eight experts' pages resident, two pages an expert, micro-batches and chunks that cut prompts.
    values = {
        "schedule": schedule, "pages_per_expert": 2, "resident_pages": [6] * spec.num_layers, "num_frames": 13,
        "micro_batch_size": 5, "group_size": 3, "chunk_tokens": 200,
    }  # fmt: skip
    executor = "serial" if schedule == "flexgen" and torch.cuda.is_available() else "threads"
    llm = LLM(MOE, dtype="float32", executor=executor, policy=override(base, values))
    chosen = range(len(prompts)) if IS_FULL else range(0, len(prompts), 6)
    assert _answers(llm, [prompts[i] for i in chosen]) == [dense_answers[i] for i in chosen]
