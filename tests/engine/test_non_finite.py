"""A model that computes NaN or infinity ends its requests as errors; what it says is never shown as an answer."""

from __future__ import annotations

import pytest
import torch

from checkpoints import load, prompts_of
from moe_lightning import SamplingParams

BAD_TOKEN = 7
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=1)
(PROMPT,) = prompts_of((9,))
assert BAD_TOKEN not in PROMPT


@pytest.fixture
def llm(mixtral):
    """A model with one token that it cannot read."""
    llm = load(mixtral)
    llm._worker._weights.embed[BAD_TOKEN] = float("nan")
    return llm


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(n=3, seed=1, max_tokens=5, logprobs=0)])
def test_a_prompt_that_overflows_is_an_error_without_tokens(params, llm):
    for answer in llm.generate([*PROMPT, BAD_TOKEN], params)[0].outputs:
        assert (answer.finish_reason, answer.text, answer.token_ids, answer.logprobs) == ("error", "", (), [])
    engine = llm.engine
    assert engine.num_generated_tokens == engine.num_unfinished == engine.num_running == 0
    assert engine._batcher.allocator.num_free == llm.policy.num_blocks


def test_an_answer_that_overflows_later_keeps_what_came_before(llm):
    first = llm.generate(PROMPT, GREEDY)[0].outputs[0]
    llm._worker._weights.embed[first.token_ids[2]] = float("inf")
    count = first.token_ids.index(first.token_ids[2]) + 1
    answer = llm.generate(PROMPT, GREEDY)[0].outputs[0]
    assert (answer.finish_reason, answer.token_ids) == ("error", first.token_ids[:count])
    assert answer.text == llm.tokenizer.decode(first.token_ids[:count])
    assert len(answer.logprobs) == count


def test_scores_of_a_prompt_that_overflows_are_an_error(llm):
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    bad, good = llm.generate([[*PROMPT, BAD_TOKEN, 8], PROMPT], params)
    assert (bad.outputs[0].finish_reason, good.outputs[0].finish_reason) == ("error", "length")


def test_requests_beside_one_that_overflows_are_answered(llm, mixtral):
    alone = load(mixtral).generate(PROMPT, GREEDY)[0].outputs[0]
    bad, good = llm.generate([[*PROMPT, BAD_TOKEN], PROMPT], GREEDY)
    assert bad.outputs[0].finish_reason == "error"
    assert good.outputs[0].token_ids == alone.token_ids
    assert torch.isfinite(torch.tensor(good.outputs[0].cumulative_logprob))
