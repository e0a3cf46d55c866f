"""Layers of Mixtral's true shapes: lanes at once give the bits of one task after the other."""

from __future__ import annotations

import random

import pytest
import torch
from shapes import write_config
from test_cuda_executor import Delayed

from moe_lightning import LLM, SamplingParams
from moe_lightning.policy import Policy
from moe_lightning.runtime.cuda_executor import CudaExecutor
from moe_lightning.runtime.executor import SerialExecutor

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
NUM_LAYERS = 3
NEW_TOKENS = 12


def drawn_policy(number, packed):
    """Micro-batches, groups, residency and ring at random; the ring is as small as it may be in every third.

    In every third other the second layer's experts are on the CPU.
    """
    draw = random.Random(number)
    pages = draw.choice([2, 7, 14])
    resident = tuple(draw.randint(0, 8 * pages) for _ in range(NUM_LAYERS))
    cpu_every = 2 if number % 3 == 1 else 0
    if cpu_every:
        resident = (resident[0], 0, resident[2])
    parts = (1, 2, 4, 8)[number % 4]
    smallest = min(8 * pages - min(resident), 8 // parts * pages)
    return Policy(
        max_num_seqs=64, micro_batch_size=draw.choice([9, 22, 64]), group_size=draw.choice([1, 2, 100]),
        look_ahead=draw.choice([0, 2, 100]), prefill_tokens=1024, chunk_tokens=draw.choice([200, 512]),
        pages_per_expert=pages, resident_pages=resident,
        num_frames=smallest + (0 if number % 3 == 0 else draw.randint(0, smallest)), num_blocks=640,
        expert_parts=parts, first_part_at_once=number != 3, packed=packed, cpu_every=cpu_every,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("mixtral"), NUM_LAYERS)


def load(model, number, *, packed=False):
    policy = drawn_policy(number, packed)
    return LLM(model, load_format="dummy", device="cuda", policy=policy, seed=number)


def drawn_prompts(draw):
    return [[draw.randrange(3, 32000) for _ in range(draw.choice([1, 16, 17, 90, 250]))] for _ in range(60)]


def answers_of(llm, prompts):
    params = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=NEW_TOKENS, ignore_eos=True, seed=1)
    return [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("number", range(6))
def test_packed_pages_give_the_bits_of_plain_ones(number, model, monkeypatch):
    prompts = drawn_prompts(random.Random(number))
    llm = load(model, number)
    expected = answers_of(llm, prompts)
    del llm
    packed, draw = load(model, number, packed=True), random.Random(number)
    assert answers_of(packed, prompts) == expected
    monkeypatch.setattr(packed._worker, "_wrap", lambda runner: Delayed(runner, draw, 3.0))
    assert answers_of(packed, prompts) == expected, "each lane late now and then"


@pytest.mark.parametrize("number", range(6))
def test_executors_agree_over_many_passes_with_delays(number, model, monkeypatch):
    llm = load(model, number)
    draw = random.Random(number)
    prompts = drawn_prompts(draw)

    def answers():
        return answers_of(llm, prompts)

    worker = llm._worker
    worker._executor = SerialExecutor(torch.cuda.synchronize)
    expected = answers()
    worker._executor = CudaExecutor(llm._device)
    assert answers() == expected, "lanes at once"
    monkeypatch.setattr(worker, "_wrap", lambda runner: Delayed(runner, draw, 3.0))
    assert answers() == expected, "lanes at once, each late now and then"
