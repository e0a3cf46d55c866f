"""Policies beside a plan: one choice of the planner's a step up or down, or fewer sequences."""

from __future__ import annotations

from dataclasses import replace

from moe_lightning.perf.choices import changed, values_of
from moe_lightning.perf.sizing import Problem, largest_policy, sized
from moe_lightning.perf.trials import Planned
from moe_lightning.policy import Policy

# In this order, so that a run that is cut short has tried the choices that matter most. Rings are listed finely.
_STEPS = {"micro_batches": 1, "prefill": 1, "ring": 3, "parts": 1, "pages": 1, "groups": 1, "ahead": 1}
_FEWER = (0.9, 0.75)  # of the plan's sequences


def neighbours(problem: Problem, planned: Planned) -> dict[str, Policy]:
    """Other policies by what is different, all of which fit; each is another than the plan and those before it."""
    found: dict[str, Policy] = {}

    def add(name: str, policy: Policy | None) -> bool:
        is_new = policy is not None and policy != planned.policy and policy not in found.values()
        if policy is not None and is_new:
            found[name] = policy
        return is_new

    if planned.policy.expert_parts > 1:  # the planner's are always so, and this shows what that is worth
        add("first part late", replace(planned.policy, first_part_at_once=False))
    for up in (True, False):
        for name, steps in _STEPS.items():
            for value in _beyond(values_of(problem)[name], getattr(planned.choice, name), steps, up):
                if add(f"{name} {value:g}", largest_policy(problem, changed(planned.choice, name, value))):
                    break
    for share in _FEWER:
        num_seqs = int(share * planned.prediction.num_seqs)
        fewer = replace(problem, most_seqs=num_seqs)
        add(f"seqs {num_seqs}", sized(fewer, planned.choice, num_seqs) if num_seqs else None)
    return found


def _beyond(values: tuple[float, ...], value: float, steps: int, up: bool) -> list[float]:
    """Values on one side, from the one that is so many steps away on: several may come to the same policy."""
    side = sorted((x for x in values if (x > value if up else x < value)), reverse=not up)
    return side[min(steps, len(side)) - 1 :] if side else []
