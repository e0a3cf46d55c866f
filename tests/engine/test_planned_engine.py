"""A policy that the planner finds runs, and gives the tokens of any other."""

from __future__ import annotations

import pytest
import torch

from checkpoints import greedy, prompts_of
from moe_lightning import LLM, SamplingParams
from moe_lightning.engine.plan import measured_rates
from moe_lightning.hardware.presets import preset
from moe_lightning.models import registry
from moe_lightning.perf.default_policy import Memory
from moe_lightning.perf.memory import memory_use
from moe_lightning.perf.planner import search
from moe_lightning.perf.rates import DatasheetRates
from moe_lightning.perf.workload import Workload
from moe_lightning.units import GIB

LENGTHS = [1, 5, 9, 30, 17, 42]
NEW_TOKENS = 8


@pytest.mark.parametrize("streamed_share", [0.0, 0.3, 0.4, 0.9])
def test_the_planners_policy_gives_the_same_tokens(streamed_share, mixtral, mixtral_reference):
    spec = registry.resolve(str(mixtral))
    rates, work = DatasheetRates(preset("l4")), Workload(tuple(sorted(LENGTHS)), NEW_TOKENS, len(LENGTHS))
    experts = 3 * spec.hidden_size * spec.experts.intermediate_size * spec.experts.num_experts * 4
    all_experts = experts * spec.num_layers
    roomy = search(spec, "float32", Memory(2 * GIB, 4 * GIB), rates, work).policy
    others = memory_use(spec, 4, roomy).gpu_bytes - all_experts
    room = max(all_experts * (1 - streamed_share), 1.1 * experts) if streamed_share else GIB
    policy = search(spec, "float32", Memory(2 * GIB, others + int(room)), rates, work).policy
    # What has no room streams, or the CPU computes it.
    assert bool(policy.num_frames or policy.cpu_every) == bool(streamed_share)
    llm = LLM(mixtral, dtype="float32", device="cpu", policy=policy, executor="threads")
    prompts = prompts_of(LENGTHS)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    found = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params)]
    assert found == [greedy(mixtral_reference, prompt, NEW_TOKENS)[0] for prompt in prompts]


def test_a_card_without_bfloat16_gets_a_plan_for_it_all_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    rates = measured_rates(torch.device("cuda", 0), torch.bfloat16)
    spec = registry.resolve("mixtral-8x7b")
    work = Workload((20, 60, 150), 32)
    planned = search(spec, "bfloat16", Memory(180 * GIB, 14 * GIB), rates, work)
    assert planned.prediction.tokens_per_s > 0
