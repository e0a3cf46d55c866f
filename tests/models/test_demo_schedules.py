"""The demo model's answers are the dense model's under every schedule, with pages that stream and lanes at once.

In a file of its own, so that it can run beside the tests of the default schedule.
"""

from __future__ import annotations

import pytest

from demo_model import IS_FULL, MOE, answers_of, demo_prompts, dense_answers
from moe_lightning import LLM
from moe_lightning.models import registry
from moe_lightning.perf.default_policy import Memory, default_policy, override
from moe_lightning.pipeline.baselines import SCHEDULES

pytestmark = [pytest.mark.demo, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def prompts():
    """Of each category one or two, or all of them."""
    return demo_prompts()[:: 1 if IS_FULL else 6]


@pytest.fixture(scope="module")
def answers(prompts):
    return dense_answers(prompts)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_answers_do_not_depend_on_schedule_streaming_or_lanes(schedule, prompts, answers):
    spec = registry.resolve(str(MOE))
    base, _ = default_policy(spec, 4, Memory(host=8 * 2**30, gpu=None), max_num_seqs=32)
    # Three of eight experts' pages resident, two pages an expert, micro-batches and chunks that cut prompts.
    values = {
        "schedule": schedule, "pages_per_expert": 2, "resident_pages": [6] * spec.num_layers, "num_frames": 13,
        "micro_batch_size": 5, "group_size": 3, "chunk_tokens": 200,
    }  # fmt: skip
    llm = LLM(MOE, dtype="float32", executor="threads", policy=override(base, values))
    assert answers_of(llm, prompts) == answers
