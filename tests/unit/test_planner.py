"""The plan fits, uses what it may, and is no worse for better hardware."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.errors import ConfigError, NoFeasiblePolicyError
from moe_lightning.hardware.presets import PRESETS
from moe_lightning.models import registry
from moe_lightning.perf.default_policy import Memory
from moe_lightning.perf.limit import hardware_limit
from moe_lightning.perf.memory import activation_bytes, host_buffer_bytes
from moe_lightning.perf.outlook import outlook
from moe_lightning.perf.planner import search
from moe_lightning.perf.rates import DatasheetRates
from moe_lightning.perf.workload import Workload
from moe_lightning.pipeline.baselines import SCHEDULES
from moe_lightning.pipeline.shape import check_ring
from moe_lightning.units import GIB

MIXTRAL = registry.resolve("mixtral-8x7b")
H100 = PRESETS["h100-sxm"]
WORK = Workload((20, 30, 40, 214), gen_len=32)
PAGE = 3 * 4096 * 1024 * 2


def gpu_bytes(policy):
    experts = 8 * policy.pages_per_expert * 32 * PAGE
    frames = (sum(policy.resident_pages) + policy.num_frames) * PAGE
    rows = policy.max_num_seqs + policy.prefill_tokens
    return MIXTRAL.num_parameters * 2 - experts + frames + activation_bytes(MIXTRAL, 2, rows)


def host_bytes(policy):
    streamed = sum(8 * policy.pages_per_expert - r for r in policy.resident_pages) * PAGE
    kv = policy.num_blocks * policy.block_size * MIXTRAL.kv_bytes_per_token(2)
    return streamed + kv + host_buffer_bytes(MIXTRAL, 2, policy.max_num_seqs)


@pytest.mark.parametrize("gpu", [10, 16, 24, 48])
@pytest.mark.parametrize("host", [96, 120, 250])
def test_the_plan_fits_both_memories_and_leaves_little_of_them(gpu, host):
    planned = search(MIXTRAL, "bfloat16", Memory(host * GIB, gpu * GIB), DatasheetRates(H100), WORK)
    policy = planned.policy
    assert policy.pages_per_expert == 14
    assert 0.99 * gpu * GIB < gpu_bytes(policy) <= gpu * GIB
    assert 0.99 * host * GIB < host_bytes(policy) <= host * GIB
    check_ring(policy, num_experts=8)
    blocks = policy.max_num_seqs * WORK.mean_blocks(16)
    assert blocks <= policy.num_blocks, "all sequences fit at their mean length"
    assert planned.prediction.num_seqs == policy.max_num_seqs


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_no_other_schedule_is_predicted_faster_than_the_plan(schedule):
    planned = search(MIXTRAL, "bfloat16", Memory(120 * GIB, 24 * GIB), DatasheetRates(H100), WORK)
    policy = replace(planned.policy, schedule=schedule)
    found = outlook(MIXTRAL, "bfloat16", policy, DatasheetRates(H100), WORK)
    assert found.pass_s >= planned.prediction.pass_s * (1 - 1e-9)
    if schedule in ("flexgen", "no_overlap"):
        assert found.pass_s > 1.2 * planned.prediction.pass_s, "the test could not fail otherwise"


def test_a_model_that_fits_on_the_gpu_streams_nothing():
    policy = search(MIXTRAL, "bfloat16", Memory(64 * GIB, 120 * GIB), DatasheetRates(H100), WORK).policy
    assert policy.resident_pages == (112,) * 32
    assert policy.num_frames == 0


@pytest.mark.parametrize("num_layers", [1, 2, 7, 8, 9])
def test_models_of_few_layers_can_be_planned(num_layers):
    spec = replace(MIXTRAL, num_layers=num_layers)
    planned = search(spec, "bfloat16", Memory(100 * GIB, 7 * GIB), DatasheetRates(H100), WORK)
    assert len(planned.policy.resident_pages) == num_layers
    assert planned.prediction.pass_s > 0


def test_prompts_with_answers_of_one_token_are_planned_in_time_and_in_passes_that_can_be_built():
    work = Workload((50,), 1, 200_000)
    policy = search(MIXTRAL, "bfloat16", Memory(120 * GIB, 24 * GIB), DatasheetRates(H100), work).policy
    assert policy.prefill_tokens <= 2**16


def test_a_batch_is_no_larger_than_the_work():
    work = replace(WORK, num_requests=40)
    planned = search(MIXTRAL, "bfloat16", Memory(120 * GIB, 24 * GIB), DatasheetRates(H100), work)
    assert planned.policy.max_num_seqs <= 40
    assert planned.prediction.job_s is not None
    assert planned.prediction.job_tokens_per_s == pytest.approx(40 * 32 / planned.prediction.job_s)


@settings(max_examples=5, deadline=None)
@given(
    gpu=st.sampled_from([12, 16, 20, 24]),
    better=st.sampled_from(["h2d", "cpu", "hbm", "flops", "gpu memory", "host memory"]),
)
def test_better_hardware_is_never_predicted_slower(gpu, better):
    memory, hardware = Memory(110 * GIB, gpu * GIB), H100
    if better == "h2d":
        hardware = replace(hardware, h2d=1.3 * hardware.h2d)
    elif better == "cpu":
        hardware = replace(hardware, cpu=replace(hardware.cpu, bandwidth=1.5 * hardware.cpu.bandwidth))
    elif better == "hbm":
        hardware = replace(hardware, gpu=replace(hardware.gpu, bandwidth=1.5 * hardware.gpu.bandwidth))
    elif better == "flops":
        flops = {dtype: 1.5 * rate for dtype, rate in hardware.gpu.flops.items()}
        hardware = replace(hardware, gpu=replace(hardware.gpu, flops=flops))
    elif better == "gpu memory":
        memory = replace(memory, gpu=memory.gpu + 4 * GIB)
    else:
        memory = replace(memory, host=memory.host + 16 * GIB)
    before = search(MIXTRAL, "bfloat16", Memory(110 * GIB, gpu * GIB), DatasheetRates(H100), WORK).prediction
    after = search(MIXTRAL, "bfloat16", memory, DatasheetRates(hardware), WORK).prediction
    # A search that varies one choice at a time may miss a little.
    assert after.job_tokens_per_s >= 0.995 * before.job_tokens_per_s


@pytest.mark.parametrize("memory", [Memory(110 * GIB, 4 * GIB), Memory(60 * GIB, 16 * GIB)])
def test_what_cannot_fit_says_what_it_needs(memory):
    with pytest.raises(NoFeasiblePolicyError, match=r"of GPU memory .* of host memory .*allow more memory"):
        search(MIXTRAL, "bfloat16", memory, DatasheetRates(H100), WORK)


def test_a_length_that_the_model_cannot_have_is_refused():
    with pytest.raises(ConfigError, match="max_model_len=40000"):
        search(
            MIXTRAL, "bfloat16", Memory(110 * GIB, 24 * GIB), DatasheetRates(H100), WORK, max_model_len=40000
        )


def test_the_hardware_limit_is_the_one_on_paper():
    """Mixtral-8x7B with 125 GiB of host memory: by hand, from sizes and a link of 55.2 GB/s."""
    work = Workload((77,), gen_len=32)
    for gpu, share, tokens_per_s in ((24, 0.25, 4457), (16, 0.155, 3444)):
        limit = hardware_limit(MIXTRAL, 2, gpu * GIB, 125 * GIB, 55.2e9, work)
        assert limit.resident_share == pytest.approx(share, abs=0.003)
        assert limit.tokens_per_s == pytest.approx(tokens_per_s, rel=0.01)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 40), st.integers(1, 20))
def test_mean_blocks_are_those_of_all_ages_counted_one_by_one(prompts, gen_len, block_size):
    work = Workload(tuple(prompts), gen_len)
    counted = [-(-(p + age) // block_size) for p in prompts for age in range(1, gen_len + 1)]
    assert work.mean_blocks(block_size) == pytest.approx(sum(counted) / len(counted))
