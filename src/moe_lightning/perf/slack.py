"""A ring of frames that bridges attention where it takes longer than usual."""

from __future__ import annotations

from dataclasses import replace

from moe_lightning.perf.choices import RINGS
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.refit import Refitted
from moe_lightning.perf.sizing import Problem, largest_policy
from moe_lightning.perf.trials import Planned
from moe_lightning.pipeline.task import TaskKind

# Attention shares host memory with whatever else the machine does: for seconds at a time it was seen to take up to
# half longer than usual, as were the experts' sweeps by a fifth.
_SLOWER = {TaskKind.ATTENTION: 1.35, TaskKind.CPU_EXPERTS: 1.35, TaskKind.EXPERTS: 1.2}
_PREMIUM = 0.015  # of a plan's speed that is given for a ring without which the link would stand still then


def with_slack(problem: Problem, plan: Planned, rates: Rates) -> Planned:
    """The plan with as much more of a ring as pays where attention is slow; itself where none does.

    Args:
        problem: that the plan solves.
        plan: the fastest at the usual rates.
        rates: the usual ones.
    """
    slower = Refitted(rates, _SLOWER)
    least = (1 - _PREMIUM) * plan.tokens_per_s
    best, reached = plan, problem.outlook(plan.policy, slower).job_tokens_per_s
    for ring in sorted(ring for ring in RINGS if ring > plan.choice.ring):
        if reached >= least:
            break
        choice = replace(plan.choice, ring=ring)
        policy = largest_policy(problem, choice)
        if policy is None or (usual := problem.outlook(policy, rates)).job_tokens_per_s < least:
            break
        value = problem.outlook(policy, slower).job_tokens_per_s
        if value <= reached:
            break
        best, reached = Planned(usual, choice), value
    return best
