"""Decode attention on the GPU over KV of host memory (the paper's A_g = 1): FlexGen's schedule instead of ours."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from moe_lightning.perf.rates import Rates
from moe_lightning.perf.sizing import Choice, Problem, largest_policy
from moe_lightning.perf.trials import WORTH, Planned
from moe_lightning.policy import Policy

SCHEDULE = "flexgen"
# Beside the plan's room for prompts, as little as any: staged KV takes as much as the longest sequence may.
_MICRO_BATCHES, _RINGS, _LEAST_PREFILL = (1, 2), (1.2, 2.0), 1.25


def kv_bytes(problem: Problem, planned: Planned) -> float:
    """Read by the decode sequences of a pass."""
    spec, window = problem.spec, problem.spec.attention.sliding_window
    context = min(problem.workload.mean_context, window or problem.length)
    return planned.prediction.num_seqs * context * spec.kv_bytes_per_token(problem.dtype_bytes)


def attending_on_gpu(problem: Problem, planned: Planned, rates: Rates) -> Planned | None:
    """The fastest of some ways to attend on the GPU, to as much KV as the plan has or as fits; None: none fits.

    Args:
        problem: what was planned for.
        planned: the plan.
        rates: of the machine.
    """
    same = replace(problem, enough=planned.prediction.num_seqs)
    found = dict[Policy, Choice]()
    whole = replace(planned.choice, groups=1, parts=1, kv_every=0, cpu_every=0)  # all that the schedule knows
    prefills = dict.fromkeys((_LEAST_PREFILL, whole.prefill))
    for some, prefill, micro_batches, ring in product((same, problem), prefills, _MICRO_BATCHES, _RINGS):
        choice = replace(whole, prefill=prefill, micro_batches=micro_batches, ring=ring)
        if policy := _sized(some, choice):
            found.setdefault(policy, choice)
    plans = [Planned(problem.outlook(policy, rates), choice) for policy, choice in found.items()]
    return max(plans, key=lambda plan: plan.tokens_per_s, default=None)


def where_faster(problem: Problem, planned: Planned, rates: Rates) -> Planned:
    """The plan, or one that attends on the GPU where that is faster: few sequences decode, over an idle link."""
    if kv_bytes(problem, planned) > planned.prediction.pass_s * rates.h2d:
        return planned
    other = attending_on_gpu(problem, planned, rates)
    if other is None or other.tokens_per_s <= WORTH * planned.tokens_per_s:
        return planned
    return replace(other, runners_up=(planned, *planned.runners_up)[: len(planned.runners_up) or 1])


def _sized(problem: Problem, choice: Choice) -> Policy | None:
    """The choice's policy with room for KV that is on its way."""
    policy = largest_policy(problem, choice)
    if policy is None:
        return None
    assert problem.memory.gpu is not None
    staging = problem.use(replace(policy, schedule=SCHEDULE)).gpu_bytes - problem.use(policy).gpu_bytes
    memory = replace(problem.memory, gpu=problem.memory.gpu - staging)
    policy = largest_policy(replace(problem, memory=memory), choice)
    if policy is None:
        return None
    policy = replace(policy, schedule=SCHEDULE)
    use = problem.use(policy)
    fits = use.gpu_bytes <= problem.memory.gpu and use.host_bytes <= problem.memory.host
    return policy if fits else None
