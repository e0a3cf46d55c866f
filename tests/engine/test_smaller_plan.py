"""Where the GPU has less memory than was planned with, the next smaller plan runs."""

from __future__ import annotations

import logging
import weakref
from dataclasses import replace
from math import ceil

import pytest
import torch

from checkpoints import greedy, prompts_of
from moe_lightning import LLM, SamplingParams
from moe_lightning.config import EngineConfig
from moe_lightning.engine import build
from moe_lightning.engine.plan import make_plan
from moe_lightning.engine.smaller_plan import built
from moe_lightning.errors import ConfigError, GPUMemoryError, NoFeasiblePolicyError
from moe_lightning.memory.weights import allocate
from moe_lightning.units import MIB

LENGTHS, NEW_TOKENS = [1, 9, 17], 6
SETTINGS = {"dtype": "float32", "device": "cpu", "host_memory": 2048 * MIB, "max_num_seqs": 4}


@pytest.fixture
def refused(monkeypatch):
    """Policies that the GPU did not hold: the first so many."""
    refused, to_refuse = [], [0]

    def refuse(spec, layout, placement, *more):
        if len(refused) < to_refuse[0]:
            refused.append(placement)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.27 GiB.\nmore")
        return allocate(spec, layout, placement, *more)

    monkeypatch.setattr(build, "allocate", refuse)
    return refused, to_refuse


def test_the_next_smaller_plan_gives_the_same_tokens_and_says_so(refused, mixtral, mixtral_reference, caplog):
    (placements, to_refuse), prompts = refused, prompts_of(LENGTHS)
    to_refuse[0], allowed = 2, ceil(least_gpu_memory(mixtral) / 0.95**2) + 2
    with caplog.at_level(logging.WARNING):
        llm = LLM(mixtral, gpu_memory=allowed, **SETTINGS)
    assert len(placements) == 2
    resident = [sum(placement.resident) for placement in placements] + [sum(llm.policy.resident_pages)]
    assert resident == sorted(resident, reverse=True) and resident[0] > resident[-1]
    assert llm.engine._batcher.policy == llm.policy and llm.max_model_len <= llm.policy.prefill_tokens
    said = [record.message for record in caplog.records]
    assert "7.27 GiB" in said[0] and "planning again for" in said[0] and len(said) == 2
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    found = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params)]
    assert found == [greedy(mixtral_reference, prompt, NEW_TOKENS)[0] for prompt in prompts]


def test_a_gpu_that_holds_none_of_several_plans_is_an_error_with_a_remedy(refused, mixtral):
    placements, to_refuse = refused
    to_refuse[0] = 100
    with pytest.raises(ConfigError, match=r"7\.27 GiB.*lower gpu_memory"):
        LLM(mixtral, gpu_memory=2 * least_gpu_memory(mixtral), **SETTINGS)
    assert len(placements) == 4


def test_a_policy_that_was_given_is_not_replaced(refused, mixtral):
    placements, to_refuse = refused
    to_refuse[0] = 1
    policy = make_plan(EngineConfig(str(mixtral), device="cpu")).policy
    with pytest.raises(GPUMemoryError):
        LLM(mixtral, device="cpu", gpu_memory="2MiB", policy=policy)
    assert len(placements) == 1


@pytest.mark.parametrize(
    ("message", "is_memory"),
    [
        ("CUDA error: out of memory", True), ("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)  # fmt: skip
def test_what_the_driver_says_of_memory_counts_too_and_nothing_else(mixtral, monkeypatch, message, is_memory):
    def fail(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(build, "allocate", fail)
    with pytest.raises(GPUMemoryError if is_memory else RuntimeError, match=message[:10]) as caught:
        LLM(mixtral, **SETTINGS)
    assert isinstance(caught.value, GPUMemoryError) == is_memory


class Tensor:
    """Stands for memory that a build had taken."""


def test_what_was_taken_is_let_go_before_another_plan_is_made(mixtral):
    config = EngineConfig(str(mixtral), gpu_memory="512MiB", **SETTINGS)
    taken, budgets = [], []

    def fail_once(plan):
        tensor = Tensor()
        tensor.itself = tensor  # counting references does not let it go
        if not taken:
            taken.append(weakref.ref(tensor))
            raise GPUMemoryError("too large")
        return "worker"

    def plan_for(config):
        assert taken[0]() is None
        budgets.append(config.gpu_memory)
        return make_plan(config)

    assert built(config, make_plan(config), plan_for, fail_once)[0] == "worker"
    assert budgets == [int(0.95 * 512 * MIB)]


def test_no_plan_of_ours_is_left_to_whoever_builds(mixtral):
    def fail(plan):
        raise GPUMemoryError("too large")

    with pytest.raises(GPUMemoryError):
        built(EngineConfig(str(mixtral), gpu_memory="2MiB"), None, pytest.fail, fail)


def test_where_no_smaller_plan_is_possible_that_is_said(refused, mixtral):
    _, to_refuse = refused
    to_refuse[0] = 100
    with pytest.raises(NoFeasiblePolicyError):
        LLM(mixtral, gpu_memory=least_gpu_memory(mixtral), **SETTINGS)


def least_gpu_memory(model):
    config, low, high = EngineConfig(str(model), **SETTINGS), 1, 512 * MIB
    while low < high:
        middle = (low + high) // 2
        try:
            make_plan(replace(config, gpu_memory=middle))
        except NoFeasiblePolicyError:
            low = middle + 1
        else:
            high = middle
    return low
