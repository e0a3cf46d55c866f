"""What a plan leaves out, and what it could gain at most: attention, KV or experts in another place.

The runtime attends on the GPU in a baseline's schedule only and computes no experts on the CPU. From the seconds of
each lane follows what these would give if nothing ever waited: an upper bound, as the paper's equations have it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_lightning.perf.cost import PassWork, task_cost
from moe_lightning.perf.operators import decode_attention, experts
from moe_lightning.perf.outlook import estimate
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.sizing import Problem
from moe_lightning.perf.trials import Planned
from moe_lightning.pipeline.task import Lane, Task, TaskKind
from moe_lightning.units import format_bytes


@dataclass(frozen=True)
class Alternative:
    """A place that the plan does not use.

    Attributes:
        name: what would be where.
        symbol: of the paper's policy.
        gain: of tokens/s: the least upper bound known; negative where the simulation says so.
        reason: why.
    """

    name: str
    symbol: str
    gain: float
    reason: str


def alternatives(
    problem: Problem, planned: Planned, rates: Rates, cpu_flops: float
) -> tuple[Alternative, ...]:
    """Attention on the GPU, a share of KV there, experts on the CPU.

    Args:
        problem: what was planned for.
        planned: the plan.
        rates: of the machine.
        cpu_flops: FLOP/s of the CPUs in matrix products.
    """
    return (
        _attention_on_gpu(problem, planned, rates),
        _kv_on_gpu(problem, planned, rates),
        _experts_on_cpu(problem, planned, cpu_flops),
    )


def _attention_on_gpu(problem: Problem, planned: Planned, rates: Rates) -> Alternative:
    """By the simulation of the schedule that does it."""
    policy = replace(planned.policy, schedule="flexgen")
    found = estimate(problem.spec, problem.dtype, policy, rates, problem.workload)
    point = decode_attention(problem.spec, problem.dtype, max(1, round(problem.workload.mean_context())))
    moved = _kv_bytes(problem, planned)
    return Alternative(
        "attention on the GPU", "A_g=1", found / planned.tokens_per_s - 1,
        f"{point.host_intensity:.0f} FLOP for a byte of KV; {format_bytes(moved)} would cross the link each pass",
    )  # fmt: skip


def _kv_on_gpu(problem: Problem, planned: Planned, rates: Rates) -> Alternative:
    """A byte of KV there takes the place of a byte of experts, which then crosses the link in every pass.

    So it pays as far as the CPU is what holds the pass back: moved is the share at which both take as long, or what
    the memory of all experts there holds.
    """
    lanes, moved = planned.prediction.lane_s, _kv_bytes(problem, planned)
    if not planned.policy.num_frames:
        return Alternative(
            "a share of KV on the GPU", "r_c>0", _room_for_kv(problem, planned),
            "all experts are on the GPU; what memory is left there could hold KV",
        )  # fmt: skip
    spare = lanes["cpu"] - lanes["h2d"]
    if spare <= 0:
        return Alternative(
            "a share of KV on the GPU", "r_c>0", 0.0,
            "experts would make room for it, and cross the link in each pass: that is busy longer than the CPU",
        )  # fmt: skip
    use = problem.use(planned.policy)
    assert problem.memory.gpu is not None
    room = (use.device.resident + use.device.ring + problem.memory.gpu - use.gpu_bytes) / moved
    even = spare / (lanes["cpu"] + moved / rates.h2d)
    share = min(even, room)
    pass_s = planned.prediction.pass_s
    gain = pass_s / max(pass_s - share * lanes["cpu"], lanes["h2d"]) - 1
    what = "would even them out" if even <= room else "would take the place of all experts there"
    return Alternative(
        "a share of KV on the GPU", "r_c>0", gain,
        f"the CPU is busy longer than the link: {share:.1%} of the KV on the GPU {what}",
    )  # fmt: skip


def _room_for_kv(problem: Problem, planned: Planned) -> float:
    """More sequences that the GPU's unused memory would hold, as a share of those in host memory."""
    use = problem.use(planned.policy)
    assert problem.memory.gpu is not None
    # What nobody needs is left free in host memory first.
    policy = planned.policy
    is_full = policy.num_blocks >= problem.free_blocks(replace(policy, num_blocks=0))
    return max(0, problem.memory.gpu - use.gpu_bytes) / max(use.host.kv, 1) if is_full else 0.0


def _experts_on_cpu(problem: Problem, planned: Planned, cpu_flops: float) -> Alternative:
    """The share at which link and CPU would take as long: what is computed on the CPU is not copied."""
    spec, p = problem.spec, planned.prediction
    tokens = p.num_seqs + p.prefill_tokens
    work = PassWork(spec, problem.dtype, 1, (tokens,), (tokens,), (0,))
    sweep = task_cost(Task(TaskKind.EXPERTS, Lane.GPU, 0, (0,), (), ()), work)
    cpu_s = spec.num_layers * sweep.flops / cpu_flops  # of all experts
    link_s, attention_s = p.lane_s["h2d"], p.lane_s["cpu"]
    share = max(0.0, (link_s - attention_s) / (link_s + cpu_s))
    gain = 1 / (1 - share) - 1
    per_byte = experts(spec, problem.dtype, tokens).host_intensity
    return Alternative(
        "experts on the CPU", "F_g<1", gain,
        f"{per_byte:,.0f} FLOP for a byte of experts: all of them would take it {cpu_s:.3g} s a pass, the link "
        f"{link_s:.3g} s; it has time for {share:.1%}",
    )  # fmt: skip


def _kv_bytes(problem: Problem, planned: Planned) -> float:
    """Read by the decode sequences of a pass."""
    spec, window = problem.spec, problem.spec.attention.sliding_window
    context = min(problem.workload.mean_context(), window or problem.length)
    return planned.prediction.num_seqs * context * spec.kv_bytes_per_token(problem.dtype_bytes)
