"""What a plan leaves out, and what it could gain: attention, KV or experts in another place, simulated."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_lightning.perf.attending import SCHEDULE, attending_on_gpu, kv_bytes
from moe_lightning.perf.choices import changed, values_of
from moe_lightning.perf.operators import decode_attention, experts
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.sizing import Problem, largest_policy
from moe_lightning.perf.trials import Planned
from moe_lightning.units import format_bytes


@dataclass(frozen=True)
class Alternative:
    """A place that the plan does not use.

    Attributes:
        name: what would be where.
        symbol: of the paper's policy.
        gain: of tokens/s; None: it does not fit.
        reason: why.
    """

    name: str
    symbol: str
    gain: float | None
    reason: str


def alternatives(problem: Problem, planned: Planned, rates: Rates) -> tuple[Alternative, ...]:
    """Attention on the GPU, another share of KV there, experts on the CPU or on the GPU alone.

    Args:
        problem: what was planned for.
        planned: the plan.
        rates: of the machine.
    """
    if planned.policy.schedule == SCHEDULE:
        found = [_without_crossing(problem, planned, other) for other in planned.runners_up[:1]]
    else:
        found = [_kv_elsewhere(problem, planned, rates)]
        if planned.choice.kv_every != 1:  # else all of it is there
            found.insert(0, _attention_on_gpu(problem, planned, rates))
    if rates.knows_cpu_experts:
        found.append(_experts_elsewhere(problem, planned, rates))
    return tuple(found)


def _without_crossing(problem: Problem, planned: Planned, other: Planned) -> Alternative:
    """The best plan of CGOPipe where KV crosses the link in this one."""
    every, kv = other.choice.kv_every, format_bytes(kv_bytes(problem, planned))
    where, symbol = {0: ("attention on the CPU", "A_g=0"), 1: ("all KV on the GPU", "r_c=1")}.get(
        every, (f"KV of {_layers(every)} on the GPU", f"r_c={_share(every)}")
    )
    rest = "" if every == 1 else ": the CPU would attend" + (" in the other layers" if every else "")
    return Alternative(
        where, symbol, other.tokens_per_s / planned.tokens_per_s - 1,
        f"{kv} of KV cross the link each pass, and would not{rest}",
    )  # fmt: skip


def _attention_on_gpu(problem: Problem, planned: Planned, rates: Rates) -> Alternative:
    """By the simulation of the schedule that does it."""
    moved = format_bytes(kv_bytes(problem, planned))
    found = attending_on_gpu(problem, planned, rates)
    point = decode_attention(problem.spec, problem.dtype, max(1, round(problem.workload.mean_context)))
    return Alternative(
        "attention on the GPU", "A_g=1", found.tokens_per_s / planned.tokens_per_s - 1 if found else None,
        f"{point.host_intensity:.0f} FLOP for a byte of KV; {moved} would cross the link each pass",
    )  # fmt: skip


def _kv_elsewhere(problem: Problem, planned: Planned, rates: Rates) -> Alternative:
    """With a share on the GPU, or without the plan's."""
    now, (best, gain) = planned.choice.kv_every, _best(problem, planned, rates, "kv_every")
    if now:
        return Alternative(
            "all KV in host memory", "r_c=0", gain,
            f"the CPU would attend in all layers; now the GPU does in {'all' if now == 1 else f'one of {now:g}'}",
        )  # fmt: skip
    if best is None:
        return Alternative("a share of KV on the GPU", "r_c>0", None, "the GPU has no room for it")
    kv, streams = format_bytes(kv_bytes(problem, planned) / best), planned.policy.num_frames > 0
    return Alternative(
        "a share of KV on the GPU", f"r_c={_share(best)}", gain,
        f"that of {_layers(best)}, {kv}, would "
        + ("take the place of experts, which would cross the link" if streams else "be where the GPU attends"),
    )  # fmt: skip


def _experts_elsewhere(problem: Problem, planned: Planned, rates: Rates) -> Alternative:
    """On the CPU in a share of the layers, or in none."""
    now, (best, gain) = planned.choice.cpu_every, _best(problem, planned, rates, "cpu_every")
    if now:
        return Alternative(
            "experts on the GPU alone", "F_g=1", gain,
            f"all would cross the link or stay; now the CPU computes those of {_layers(now)}",
        )  # fmt: skip
    if best is None:
        return Alternative(
            "experts on the CPU", "F_g<1", None, "host memory has no room for any that are not packed"
        )
    p, streams = planned.prediction, planned.policy.num_frames > 0
    per_byte = experts(problem.spec, problem.dtype, p.num_seqs + p.prefill_tokens).host_intensity
    return Alternative(
        "experts on the CPU", f"F_g={'0' if best == 1 else f'1-{_share(best)}'}", gain,
        f"{per_byte:,.0f} FLOP for a byte of experts: those of {_layers(best)} would "
        + ("not cross the link, but the CPU would compute them" if streams else "be computed by the CPU"),
    )  # fmt: skip


def _best(problem: Problem, planned: Planned, rates: Rates, name: str) -> tuple[float | None, float | None]:
    """Of plans that differ in one choice alone, the value of the likeliest and what it gains; None: none fits.

    Where the plan makes use of the choice, without; else with it. They have KV for as many sequences, or for those
    that fit.
    """
    now, problem = getattr(planned.choice, name), replace(problem, enough=planned.prediction.num_seqs)
    others = [value for value in values_of(problem)[name] if bool(value) != bool(now)]
    policies = {value: largest_policy(problem, changed(planned.choice, name, value)) for value in others}
    outlooks = {value: problem.outlook(policy, rates) for value, policy in policies.items() if policy}
    if not outlooks:
        return None, None
    best = max(outlooks, key=lambda value: outlooks[value].estimate)
    return best, outlooks[best].job_tokens_per_s / planned.tokens_per_s - 1


def _share(every: float) -> str:
    return "1" if every == 1 else f"1/{every:g}"


def _layers(every: float) -> str:
    return "all layers" if every == 1 else f"one layer in {every:g}"
