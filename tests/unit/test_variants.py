"""What the ablation's variants take of memory, and how they differ."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_lightning.bench.variants import VARIANTS, paper_plan, policy_of
from moe_lightning.bench.workloads import workload
from moe_lightning.errors import NoFeasiblePolicyError
from moe_lightning.hardware.presets import preset
from moe_lightning.models.registry import resolve
from moe_lightning.perf.default_policy import Memory
from moe_lightning.perf.memory import memory_use
from moe_lightning.perf.paper_model import PaperMachine
from moe_lightning.perf.planner import problem_of
from moe_lightning.policy import Policy
from moe_lightning.units import GIB

SPEC = resolve("mixtral-8x7b")
WORK = workload("mtbench", 64)
PAGE = 3 * 4096 * 1024 * 2
OURS = Policy(2000, 250, 2**16, 16, 8192, 2048, 14, (19,) * 32, 160, 25000)


def policies(gpu, host):
    machine = replace(PaperMachine.of(preset("l4")), gpu_memory=gpu, host_memory=host)
    paper = paper_plan(SPEC, machine, WORK)
    problem = problem_of(SPEC, "bfloat16", Memory(host - 4 * GIB, gpu - GIB), WORK)
    return {name: policy_of(variant, OURS, problem, paper) for name, variant in VARIANTS.items()}


@pytest.mark.parametrize("gpu", [16 * GIB, 24 * GIB])
def test_every_variant_fits_in_both_memories(gpu):
    for name, policy in policies(gpu, 125 * GIB).items():
        assert not policy.packed, "only our planner packs experts"
        if name in ("plan", "plain"):
            assert policy == OURS
            continue
        use = memory_use(SPEC, 2, policy)
        assert use.gpu_bytes <= gpu - GIB
        assert use.host_bytes <= 121 * GIB
        assert policy.num_frames >= 112 - policy.resident_pages[0]


def test_attention_on_the_gpu_takes_its_memory_from_the_ring():
    found = policies(16 * GIB, 125 * GIB)
    frames = {name: p.num_frames + sum(p.resident_pages) for name, p in found.items()}
    staging = {name: memory_use(SPEC, 2, found[name]).device.staging for name in ("flexgen", "paper")}
    assert staging["flexgen"] > 0 == staging["paper"]
    assert frames["flexgen"] < frames["paper"]


def test_a_batch_has_room_until_its_end_and_others_take_the_place_of_those_that_end():
    found = policies(24 * GIB, 125 * GIB)
    paper, continuous = found["paper"], found["continuous"]
    at_end = sum(-(-(n + 64) // 16) for n in WORK.prompt_lens) / len(WORK.prompt_lens)
    assert paper.max_num_seqs * at_end <= paper.num_blocks
    assert continuous.max_num_seqs > paper.max_num_seqs
    assert paper.group_size == continuous.group_size == 1 < found["grouped"].group_size


def test_a_batch_is_as_large_as_the_papers_planner_says_where_memory_holds_it():
    """The more of the experts stays on the GPU, the more sequences have room beside the rest."""
    machine = replace(PaperMachine.of(preset("l4")), gpu_memory=40 * GIB, host_memory=100 * GIB)
    paper = paper_plan(SPEC, machine, WORK)
    policy = policy_of(
        VARIANTS["paper"], OURS, problem_of(SPEC, "bfloat16", Memory(96 * GIB, 39 * GIB), WORK), paper
    )
    at_end = sum(-(-(n + 64) // 16) for n in WORK.prompt_lens) / len(WORK.prompt_lens)
    host = 96 * GIB - PAGE * (32 * 112 - sum(policy.resident_pages))
    room = host / 2**21 / at_end  # and the engine takes half a GiB of it
    assert policy.max_num_seqs >= min(paper.ubs * paper.n_ub, 0.95 * room) - 1


def test_what_does_not_fit_is_an_error_with_a_remedy():
    machine = PaperMachine.of(preset("l4"))
    paper = paper_plan(SPEC, machine, WORK)
    with pytest.raises(NoFeasiblePolicyError, match="raise gpu_memory"):
        policy_of(
            VARIANTS["paper"], OURS, problem_of(SPEC, "bfloat16", Memory(125 * GIB, 6 * GIB), WORK), paper
        )
    with pytest.raises(NoFeasiblePolicyError, match="raise host_memory"):
        policy_of(
            VARIANTS["paper"], OURS, problem_of(SPEC, "bfloat16", Memory(80 * GIB, 23 * GIB), WORK), paper
        )
