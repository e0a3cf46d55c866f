"""The demo model's experts are disguised copies of a dense model's layers: both must give the same answers."""

from __future__ import annotations

import pytest

from demo_model import MOE, answers_of, are_whole, demo_prompts, dense_tokens
from moe_lightning import LLM

pytestmark = [pytest.mark.demo, pytest.mark.timeout(1200)]


def test_every_greedy_answer_is_the_dense_models():
    prompts = demo_prompts()
    answers = answers_of(LLM(MOE, dtype="float32"), prompts)
    assert are_whole(answers)
    assert answers == dense_tokens(prompts, answers)
