"""The demo model's experts are disguised copies of a dense model's layers: both must give the same answers."""

from __future__ import annotations

import pytest

from demo_model import MOE, answers_of, demo_prompts, dense_answers
from moe_lightning import LLM

pytestmark = [pytest.mark.demo, pytest.mark.timeout(1200)]


def test_every_greedy_answer_is_the_dense_models():
    prompts = demo_prompts()
    assert answers_of(LLM(MOE, dtype="float32"), prompts) == dense_answers(prompts)
