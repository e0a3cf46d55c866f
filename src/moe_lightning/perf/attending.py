"""Decode attention on the GPU over KV of host memory (the paper's A_g = 1): FlexGen's schedule instead of ours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_lightning.perf.choices import changed, starts, values_of
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.sizing import Choice, Problem, largest_policy
from moe_lightning.perf.trials import Planned
from moe_lightning.policy import Policy

SCHEDULE = "flexgen"
_GAIN = 1.01  # less is no reason for a schedule whose predictions few runs have been compared with
_BEGIN: dict[str, Any] = {
    "ring": 1.2, "prefill": 1.25, "micro_batches": 1, "groups": 1, "parts": 1, "kv_every": 0, "cpu_every": 0,
}  # fmt: skip
_MICRO_BATCHES, _RINGS = (1, 2, 4), (1.0, 1.2, 2.0)


def kv_bytes(problem: Problem, planned: Planned) -> float:
    """Read by the decode sequences of a pass."""
    spec, window = problem.spec, problem.spec.attention.sliding_window
    context = min(problem.workload.mean_context, window or problem.length)
    return planned.prediction.num_seqs * context * spec.kv_bytes_per_token(problem.dtype_bytes)


def attending_on_gpu(problem: Problem, planned: Planned, rates: Rates) -> Planned | None:
    """The fastest way found to attend on the GPU, to as much KV as the plan has or as fits; None: none fits.

    What matters to the schedule is varied, one choice after the other; not from the plan's, so that a plan for a
    better machine, whose choices are others, does not lead to less.

    Args:
        problem: what was planned for.
        planned: the plan.
        rates: of the machine.
    """
    values = values_of(problem)
    varied = {
        "pages": values["pages"], "prefill": values["prefill"], "micro_batches": _MICRO_BATCHES, "ring": _RINGS,
    }  # fmt: skip
    best: Planned | None = None
    for some in (replace(problem, enough=planned.prediction.num_seqs), problem):
        found, choice = dict[Policy, Planned](), replace(starts(problem).usual, **_BEGIN)
        for name, tried in varied.items():
            for value in tried:
                other = changed(choice, name, value)
                policy = _sized(some, other)
                if policy and policy not in found:
                    found[policy] = Planned(problem.outlook(policy, rates), other)
            if found:
                choice = max(found.values(), key=lambda plan: plan.tokens_per_s).choice
        best = max((best, *found.values()), key=lambda plan: plan.tokens_per_s if plan else 0.0)
    return best


def where_faster(problem: Problem, planned: Planned, rates: Rates) -> Planned:
    """The plan, or one that attends on the GPU where that is faster: its KV crosses the link in a pass's time."""
    if problem.workload.longest_answer == 1:  # nothing decodes
        return planned
    if kv_bytes(problem, planned) > planned.prediction.pass_s * rates.h2d:
        return planned
    other = attending_on_gpu(problem, planned, rates)
    if other is None or other.tokens_per_s <= _GAIN * planned.tokens_per_s:
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
