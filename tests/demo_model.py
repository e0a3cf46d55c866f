"""The demo checkpoint, its dense reference, and what that answers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from moe_lightning import SamplingParams

ROOT = Path(__file__).resolve().parents[1]
MOE, DENSE = ROOT / ".cache" / "demo-model", ROOT / ".cache" / "demo-dense"
# Every prompt under every schedule takes a quarter of an hour; the default schedule always runs them all.
IS_FULL = os.environ.get("MOE_LIGHTNING_FULL_TESTS") == "1"
NEW_TOKENS = 32


def demo_prompts():
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


def dense_tokens(prompts, answers):
    """What the dense model under transformers puts after each prompt and each beginning of its answer.

    Answers that are equal to this are greedy, token by token: each follows those before it. One pass for a whole
    answer takes a seventh of the time of `dense_answers`.
    """
    return [logits.argmax(-1).tolist() for logits in dense_logits(prompts, answers)]


def dense_logits(prompts, answers):
    """For each answer the dense model's logits before each of its tokens, [tokens, vocabulary]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DENSE, dtype=torch.float32).eval()
    for ids, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():  # not while another has the generator's turn
            logits = model(torch.tensor([[*ids, *answer[:-1]]]), logits_to_keep=len(answer)).logits[0]
        yield logits


def are_whole(answers):
    """Each answer ends with the model's end, and has none before, or is as long as answers may be."""
    end = json.loads((DENSE / "generation_config.json").read_text())["eos_token_id"]
    return all(
        end not in answer[:-1] and (len(answer) == NEW_TOKENS or answer[-1] == end) for answer in answers
    )


def answers_of(llm, prompts):
    """Greedy answers of the engine, all prompts in one batch."""
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS),
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]
