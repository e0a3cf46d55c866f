from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.presets import preset
from moe_lightning.models.registry import resolve
from moe_lightning.models.spec import EXPERT_ROLES, Role
from moe_lightning.perf.cost import Cost, PassWork, task_cost, task_seconds
from moe_lightning.pipeline.baselines import SCHEDULES
from moe_lightning.pipeline.task import Lane, PassShape, Task, TaskKind

MIXTRAL, DENSE = resolve("mixtral-8x7b"), resolve("llama-2-7b")
H, I, V, Q, KV, E, K = 4096, 14336, 32000, 4096, 1024, 8, 2  # noqa: E741  the letters of the formulas
# A prefill chunk of 3 tokens and two decode micro-batches.
WORK = PassWork(MIXTRAL, "bfloat16", 4, (3, 5, 7), (6, 500, 910), (1, 5, 7))
LANES = {
    TaskKind.OFFLOAD_QKV: Lane.D2H, TaskKind.STORE_KV: Lane.D2H, TaskKind.ATTENTION: Lane.CPU,
    TaskKind.LOAD_HIDDEN: Lane.H2D, TaskKind.LOAD_KV: Lane.H2D, TaskKind.LOAD_PAGE: Lane.H2D,
}  # fmt: skip


def _task(kind: TaskKind, *micro_batches: int) -> Task:
    return Task(kind, LANES.get(kind, Lane.GPU), 0, micro_batches, (), ())


def _cost(kind: TaskKind, *micro_batches: int, work: PassWork = WORK) -> Cost:
    return task_cost(_task(kind, *micro_batches), work)


@pytest.mark.parametrize(
    ("kind", "flops", "elements"),
    [
        (TaskKind.EMBED, 0, 2 * 5 * H),
        (TaskKind.PRE_ATTENTION, 2 * 5 * H * (Q + 2 * KV), H + H * (Q + 2 * KV) + 5 * (H + Q + 2 * KV)),
        (TaskKind.GPU_ATTENTION, 4 * 500 * Q, 495 * 2 * KV + 5 * (2 * Q + 2 * KV)),
        (TaskKind.POST_ATTENTION, 2 * 5 * H * (Q + E), H * (Q + E) + H + 5 * (Q + 3 * H)),
        (TaskKind.EXPERTS, 6 * K * H * I * 5, 3 * E * H * I + 3 * 5 * H),
        (TaskKind.SAMPLE, 2 * 5 * H * V, H + H * V + 5 * (H + V)),
    ],
)
def test_a_gpu_task_costs_its_products_weights_and_buffers(kind: TaskKind, flops: int, elements: int) -> None:
    assert _cost(kind, 1) == Cost(flops=flops, device_bytes=2 * elements)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_of_the_experts_cost_what_all_do_together_and_more_rows(parts: int) -> None:
    work = replace(WORK, tokens=(6, 24, 48), expert_parts=parts)
    costs = [task_cost(replace(_task(TaskKind.EXPERTS, 1, 2), part=part), work) for part in range(parts)]
    whole = _cost(TaskKind.EXPERTS, 1, 2, work=replace(work, expert_parts=1))
    assert sum(cost.flops for cost in costs) == whole.flops
    rows = 2 * 3 * 72 * H  # each part reads its input and the residual stream and writes it
    assert sum(cost.device_bytes for cost in costs) == whole.device_bytes + (parts - 1) * rows


def test_prefill_attention_costs_the_causal_pairs_of_query_and_key() -> None:
    assert _cost(TaskKind.PREFILL_ATTENTION, 0) == Cost(
        flops=4 * (1 + 2 + 3) * 32 * 128, device_bytes=2 * 3 * (2 * Q + 2 * KV)
    )


@pytest.mark.parametrize(
    ("kind", "elements"),
    [
        (TaskKind.OFFLOAD_QKV, 5 * (Q + 2 * KV)),
        (TaskKind.STORE_KV, 5 * 2 * KV),
        (TaskKind.LOAD_HIDDEN, 5 * Q),
        (TaskKind.LOAD_KV, 495 * 2 * KV),
        (TaskKind.LOAD_PAGE, 3 * (I // 4) * H),
    ],
)
def test_a_copy_moves_the_same_bytes_at_both_ends_and_over_the_link(kind: TaskKind, elements: int) -> None:
    members = () if kind is TaskKind.LOAD_PAGE else (1,)
    size = 2 * elements
    assert _cost(kind, *members) == Cost(device_bytes=size, host_bytes=size, link_bytes=size)


def test_cpu_attention_reads_the_cache_and_appends_to_it_in_host_memory_only() -> None:
    read, appended = 495 * 2 * KV + 5 * (Q + 2 * KV), 5 * 2 * KV
    assert _cost(TaskKind.ATTENTION, 1) == Cost(
        flops=4 * 500 * 32 * 128, host_bytes=2 * (read + appended + 5 * Q)
    )


def test_a_group_reads_the_experts_once_and_computes_for_all_its_tokens() -> None:
    group, one, two = _cost(TaskKind.EXPERTS, 1, 2), _cost(TaskKind.EXPERTS, 1), _cost(TaskKind.EXPERTS, 2)
    assert group.flops == one.flops + two.flops
    assert group.device_bytes == one.device_bytes + two.device_bytes - 2 * 3 * E * H * I


def test_few_tokens_cannot_read_more_experts_than_they_choose() -> None:
    one_token = replace(WORK, tokens=(1, 1, 1), context_tokens=(1, 1, 1))
    assert _cost(TaskKind.EXPERTS, 1, work=one_token).device_bytes == 2 * (K * 3 * H * I + 3 * H)


def test_a_micro_batch_without_sampled_rows_does_not_read_the_head() -> None:
    assert _cost(TaskKind.SAMPLE, 0, work=replace(WORK, sampled_rows=(0, 5, 7))) == Cost()


def test_a_dense_model_has_no_router_and_one_expert() -> None:
    work = replace(WORK, spec=DENSE)
    assert _cost(TaskKind.POST_ATTENTION, 1, work=work).flops == 2 * 5 * H * H
    assert _cost(TaskKind.EXPERTS, 1, work=work).flops == 6 * H * 11008 * 5


@pytest.mark.parametrize("spec", [MIXTRAL, DENSE])
def test_the_pages_of_a_layer_are_exactly_its_expert_weights(spec) -> None:
    work = replace(WORK, spec=spec, pages_per_expert=2)
    pages = spec.num_layers * spec.experts.num_experts * 2
    expert_elements = sum(t.num_elements for t in spec.tensors() if t.role in EXPERT_ROLES)
    assert pages * _cost(TaskKind.LOAD_PAGE, work=work).link_bytes == 2 * expert_elements


def test_the_products_of_a_token_are_two_flops_for_each_active_weight_it_is_multiplied_with() -> None:
    kinds = (TaskKind.PRE_ATTENTION, TaskKind.POST_ATTENTION, TaskKind.EXPERTS)
    work = replace(WORK, tokens=(1, 1, 1), sampled_rows=(1, 1, 1))
    layers = MIXTRAL.num_layers * sum(_cost(kind, 1, work=work).flops for kind in kinds)
    flops = layers + _cost(TaskKind.SAMPLE, 1, work=work).flops
    not_multiplied = {Role.EMBED, Role.FINAL_NORM, Role.INPUT_NORM, Role.POST_NORM}
    looked_up = sum(t.num_elements for t in MIXTRAL.tensors() if t.role in not_multiplied)
    assert flops == 2 * (MIXTRAL.num_active_parameters - looked_up)


def test_bytes_follow_the_dtype_and_flops_do_not() -> None:
    wide = replace(WORK, dtype="float32")
    for kind in TaskKind:
        members = () if kind is TaskKind.LOAD_PAGE else (1,)
        half, full = _cost(kind, *members), _cost(kind, *members, work=wide)
        # Ids and weights of the experts that each row goes to are as wide as ever.
        routes = 5 * 2 * (8 + 4) if kind in (TaskKind.OFFLOAD_INPUTS, TaskKind.CPU_EXPERTS) else 0
        device, link = (routes if size else 0 for size in (half.device_bytes, half.link_bytes))
        assert full == Cost(
            half.flops,
            2 * half.device_bytes - device,
            2 * half.host_bytes - routes,
            2 * half.link_bytes - link,
        )


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_task_of_every_schedule_uses_its_lane(name: str) -> None:
    schedule = SCHEDULES[name](PassShape(2, 1, 2, 3, 1, (2, 2), 4))
    assert schedule.tasks
    hardware = preset("l4")
    for task in schedule.tasks:
        seconds = task_seconds(task_cost(task, WORK), task, hardware, "bfloat16")
        assert hardware.launch_s < seconds < math.inf


@pytest.mark.parametrize(
    ("lane", "cost", "seconds"),
    [
        (Lane.GPU, Cost(flops=121 * 10**12, device_bytes=1), 1.0),
        (Lane.GPU, Cost(flops=1, device_bytes=300 * 10**9), 1.0),
        (Lane.CPU, Cost(flops=16 * 10**11, host_bytes=1), 1.0),
        (Lane.CPU, Cost(flops=1, host_bytes=76 * 2**30), 1.0),
        (Lane.H2D, Cost(link_bytes=255 * 10**8, device_bytes=1, host_bytes=1), 1.0),
        (Lane.H2D, Cost(link_bytes=1, host_bytes=2 * 76 * 2**30), 2.0),
        (Lane.D2H, Cost(link_bytes=51 * 10**8), 1.0),
        (Lane.D2H, Cost(link_bytes=1, device_bytes=3 * 300 * 10**9), 3.0),
    ],
)
def test_a_task_takes_as_long_as_the_slowest_resource_of_its_lane(
    lane: Lane, cost: Cost, seconds: float
) -> None:
    hardware = replace(preset("l4"), d2h=5.1e9)
    task = Task(TaskKind.EMBED, lane, 0, (0,), (), ())
    assert task_seconds(cost, task, hardware, "bfloat16") == pytest.approx(
        seconds + hardware.launch_s, rel=1e-9
    )


def test_larger_micro_batches_never_take_less_time() -> None:
    works = [
        replace(WORK, tokens=(n,) * 3, context_tokens=(n * 100,) * 3, sampled_rows=(n,) * 3)
        for n in (1, 4, 900)
    ]
    for kind in TaskKind:
        task = _task(kind, *(() if kind is TaskKind.LOAD_PAGE else (1,)))
        times = [task_seconds(task_cost(task, w), task, preset("l4"), "bfloat16") for w in works]
        assert all(a <= b for a, b in pairwise(times))


def test_the_experts_of_one_mixtral_layer_take_an_l4_what_their_bytes_take() -> None:
    task = _task(TaskKind.EXPERTS, 1)
    seconds = task_seconds(task_cost(task, WORK), task, preset("l4"), "bfloat16")
    assert seconds == pytest.approx(3 * E * H * I * 2 / 300e9, rel=0.01)


def test_a_gpu_without_the_dtype_is_refused_with_a_remedy() -> None:
    task = _task(TaskKind.EXPERTS, 1)
    with pytest.raises(ConfigError, match="float16"):
        task_seconds(task_cost(task, WORK), task, preset("t4"), "bfloat16")


def test_pages_that_are_not_equal_slices_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"pages_per_expert=3 .* 14336"):
        replace(WORK, pages_per_expert=3)


def test_a_dtype_of_unknown_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="'int3'"):
        replace(WORK, dtype="int3")


def test_planning_imports_no_torch() -> None:
    modules = (
        "moe_lightning.models.registry, moe_lightning.perf.cost, moe_lightning.hardware.presets, "
        "moe_lightning.pipeline.task, moe_lightning.policy"
    )
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
