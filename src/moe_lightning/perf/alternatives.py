"""What a plan leaves out, and what it could gain at most: attention, KV or experts in another place.

Attention and KV in other places are simulated. The runtime computes no experts on the CPU: from the seconds of each
lane follows what that would give if nothing ever waited, an upper bound, as the paper's equations have it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_lightning.perf.choices import changed, values_of
from moe_lightning.perf.cost import PassWork, task_cost
from moe_lightning.perf.operators import decode_attention, experts
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.sizing import Problem, largest_policy
from moe_lightning.perf.trials import Planned
from moe_lightning.pipeline.task import Lane, Task, TaskKind
from moe_lightning.units import format_bytes


@dataclass(frozen=True)
class Alternative:
    """A place that the plan does not use.

    Attributes:
        name: what would be where.
        symbol: of the paper's policy.
        gain: of tokens/s, by simulation, or at most; None: it does not fit.
        reason: why.
        is_bound: the gain is an upper bound.
    """

    name: str
    symbol: str
    gain: float | None
    reason: str
    is_bound: bool = False


def alternatives(
    problem: Problem, planned: Planned, rates: Rates, cpu_flops: float
) -> tuple[Alternative, ...]:
    """Attention on the GPU, another share of KV there, experts on the CPU.

    Args:
        problem: what was planned for.
        planned: the plan.
        rates: of the machine.
        cpu_flops: FLOP/s of the CPUs in matrix products.
    """
    found = [_kv_elsewhere(problem, planned, rates), _experts_on_cpu(problem, planned, cpu_flops)]
    if planned.choice.kv_every != 1:  # else all of it is there
        found.insert(0, _attention_on_gpu(problem, planned, rates))
    return tuple(found)


def _attention_on_gpu(problem: Problem, planned: Planned, rates: Rates) -> Alternative:
    """By the simulation of the schedule that does it."""
    policy = replace(planned.policy, schedule="flexgen")
    found = problem.outlook(policy, rates).estimate
    point = decode_attention(problem.spec, problem.dtype, max(1, round(problem.workload.mean_context())))
    moved = _kv_bytes(problem, planned)
    return Alternative(
        "attention on the GPU", "A_g=1", found / planned.tokens_per_s - 1,
        f"{point.host_intensity:.0f} FLOP for a byte of KV; {format_bytes(moved)} would cross the link each pass",
    )  # fmt: skip


def _kv_elsewhere(problem: Problem, planned: Planned, rates: Rates) -> Alternative:
    """By the simulation of plans that differ in that alone: with a share on the GPU, or without the plan's.

    They have KV for as many sequences, or for those that fit.
    """
    now, problem = planned.choice.kv_every, replace(problem, enough=planned.prediction.num_seqs)
    shares = [every for every in values_of(problem)["kv_every"] if bool(every) != bool(now)]

    policies = {
        every: largest_policy(problem, changed(planned.choice, "kv_every", every)) for every in shares
    }
    gains = {
        every: problem.outlook(policy, rates).estimate / planned.tokens_per_s - 1
        for every, policy in policies.items()
        if policy
    }
    if now:
        return Alternative(
            "all KV in host memory", "r_c=0", gains.get(0),
            f"the CPU would attend in all layers; now the GPU does in one of {now:g}",
        )  # fmt: skip
    if not gains:
        return Alternative("a share of KV on the GPU", "r_c>0", None, "the GPU has no room for it")
    best = max(gains, key=gains.__getitem__)
    kv = format_bytes(_kv_bytes(problem, planned) / best)
    return Alternative(
        "a share of KV on the GPU", f"r_c=1/{best:g}", gains[best],
        f"that of one layer in {best:g}, {kv}, would take the place of experts, which would cross the link",
    )  # fmt: skip


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
        f"{link_s:.3g} s; it has time for {share:.1%}", is_bound=True,
    )  # fmt: skip


def _kv_bytes(problem: Problem, planned: Planned) -> float:
    """Read by the decode sequences of a pass."""
    spec, window = problem.spec, problem.spec.attention.sliding_window
    context = min(problem.workload.mean_context(), window or problem.length)
    return planned.prediction.num_seqs * context * spec.kv_bytes_per_token(problem.dtype_bytes)
