"""The policy that should be fastest on a machine: searched against the simulated schedule."""

from __future__ import annotations

from dataclasses import replace
from math import floor

from moe_lightning.errors import ConfigError
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.attending import where_faster
from moe_lightning.perf.choices import changed, starts, values_of
from moe_lightning.perf.default_policy import Memory
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.sequences import PAGES, balanced, of_balanced, of_fewer, of_undisturbed, with_enough
from moe_lightning.perf.shortfall import no_feasible_policy
from moe_lightning.perf.sizing import (
    MOST_PREFILL,
    MOST_SEQS,
    Choice,
    Problem,
    largest_policy,
)
from moe_lightning.perf.slack import with_slack
from moe_lightning.perf.trials import PROMISING, WORTH, Planned, Trials
from moe_lightning.perf.workload import Workload

_WORTH_PACKING = 0.995  # where plain experts reach this share, they are left as they are
_ROUNDS = 2  # at most, from places for experts and KV to numbers of sequences and back


def search(
    spec: ModelSpec,
    dtype: str,
    memory: Memory,
    rates: Rates,
    workload: Workload,
    *,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    expert_bytes: int | None = None,
    near: Planned | None = None,
    packs: bool = True,
) -> Planned:
    """The policy that finishes the workload first, of all that fit, with some slack for slower attention.

    One choice is varied at a time, from several starts and once more from the best that was found; rings are also
    varied together with parts of layers. Values whose
    lanes alone, or first layers, take longer than what was found are not simulated to the end. bfloat16 experts are
    packed: that takes 25 % off what the link carries and memory holds. Where plain ones might be faster, as where
    all of them fit on the GPU, they are looked at too, and at last FlexGen's schedule.

    Args:
        spec: the model.
        dtype: of weights, activations and KV.
        memory: what may be used; there is a GPU.
        rates: of the machine.
        workload: what is to be computed.
        max_model_len: tokens of the longest sequence; default: the workload's.
        max_num_seqs: sequences that may run at once; default: as many as fit.
        expert_bytes: of a weight of an expert; default: the dtype's.
        near: a plan for a machine that differs a little: it is tried too, and each choice varied once from there
            and from one of the starts.
        packs: experts may be packed.

    Raises:
        NoFeasiblePolicyError: nothing fits.
        ConfigError: max_model_len is more than the model was made for.
    """
    problem = problem_of(
        spec, dtype, memory, workload,
        max_model_len=max_model_len, max_num_seqs=max_num_seqs, expert_bytes=expert_bytes,
    )  # fmt: skip
    if not (packs and _is_packable(problem)):
        return _searched(problem, rates, near)
    packed = _searched(replace(problem, packed=True), rates, near)
    return _as_fast_as_they_are(problem, packed, rates) or packed


def _is_packable(problem: Problem) -> bool:
    """Experts are bfloat16, and some of them stream."""
    if problem.dtype != "bfloat16" or problem.expert_bytes is not None:
        return False
    usual = largest_policy(problem, starts(problem).usual)
    return usual is None or usual.num_frames > 0


def _as_fast_as_they_are(problem: Problem, packed: Planned, rates: Rates) -> Planned | None:
    """A plan with experts as they are that is about as fast as one with packed ones; None where there is none.

    Looked for where one that the search begins with is, or the packed plan's own choice, or experts of some
    layers on the CPU, as large as fits or, with KV on the GPU, with so few sequences that pages are not the bound.
    """
    least = _WORTH_PACKING * packed.tokens_per_s
    choices = [packed.choice, *starts(problem)]
    if rates.knows_cpu_experts:  # packed ones are unpacked on the GPU, all of a layer in each pass
        whole = replace(starts(problem).usual, kv_every=1, micro_batches=1, groups=1)
        choices += (changed(whole, "cpu_every", every) for every in values_of(problem)["cpu_every"] if every)
    some = (largest_policy(problem, choice) for choice in choices)
    is_likely = any(policy and problem.outlook(policy, rates).estimate >= least for policy in some)
    if not is_likely and packed.choice.kv_every:
        is_likely = any(balanced(problem, packed.choice, rates, share)[0] >= least for share in PAGES)
    plain = _searched(problem, rates, packed) if is_likely else None
    return plain if plain and plain.tokens_per_s >= least else None


def _searched(problem: Problem, rates: Rates, near: Planned | None) -> Planned:
    """The search for one way to store experts."""
    problem = most = with_enough(problem, rates)
    found = Trials(problem, rates)
    if near:
        found.try_plan(near)
        found.vary(near.choice)
    is_near, begin = found.best is not None, starts(problem)
    # What is mostly fastest comes first: the more is known to be far behind.
    first = (
        (begin.bridging,) if is_near else (begin.bridging, begin.halves, begin.whole, begin.usual, begin.fine)
    )
    for start in first:
        found.vary(start)
    if found.best is None:
        found.vary(begin.smallest)
    if found.best is None:
        some = (replace(begin.smallest, pages=int(pages)) for pages in values_of(problem)["pages"])
        raise no_feasible_policy(problem, tuple(some))
    if not is_near:
        found.vary(found.best.choice)
        if found.best.policy.num_frames:
            found.vary_both(found.best.choice, "ring", "parts")
    found, problem = _settled(found, problem, begin.bridging, rates, is_near=is_near)
    assert found.best is not None
    plan = with_slack(problem, found.best, rates)
    if not is_near:
        found.vary_for_others(plan)
    return where_faster(most, found.with_others(plan), rates)


def _settled(
    found: Trials, most: Problem, bridging: Choice, rates: Rates, *, is_near: bool
) -> tuple[Trials, Problem]:
    """Trials after places for experts and KV, then numbers of sequences, have been varied: each changes the other.

    With KV on the GPU bounds are not in the order of what is reached: all shares of it are tried, and in pairs what
    hangs together.
    """
    problem, looked_from = most, None
    for _ in range(1 if is_near else _ROUNDS):
        before, reached = found, found.tokens_per_s
        is_job = problem.workload.num_requests is not None
        _look_elsewhere(found, bridging, rates, is_near=is_near, is_job=is_job)
        assert found.best is not None
        if found.best.choice.kv_every and not is_near:
            for other in ("groups", "prefill"):
                found.vary_both(found.best.choice, "micro_batches", other)
            found.vary(found.best.choice, few=None)
        if looked_from == (found.best.choice, problem):  # nothing else would come of it
            break
        looked_from = found.best.choice, problem
        found, problem = of_fewer(found, problem, most, rates, is_near=is_near)
        found, problem = of_balanced(found, problem, most, rates)
        if found is before and found.tokens_per_s <= WORTH * reached:
            break
    return of_undisturbed(found, problem, most, rates)


def _look_elsewhere(found: Trials, bridging: Choice, rates: Rates, *, is_near: bool, is_job: bool) -> None:
    """KV on the GPU where the CPU is what takes long, or few sequences take little room; on the CPU, experts.

    Jobs are varied less: they are again with fewer sequences.
    """
    assert found.best is not None
    whole = replace(found.best.choice, micro_batches=1, groups=1)  # nothing is to be hidden behind attention
    likely = [found.best.choice, whole, bridging, replace(bridging, micro_batches=4, groups=4)]
    likely = likely[:2] if is_near else likely
    if _waits_for_pages(found.best) and not found.best.choice.kv_every:
        for start in found.likeliest(likely, "kv_every", least=PROMISING * found.tokens_per_s)[:1]:
            found.vary(start)
    else:
        for start in found.likeliest(likely, "kv_every")[: 1 if is_job else 2]:
            found.vary(start)
        if not (is_near or is_job):
            found.vary(found.best.choice)
    if rates.knows_cpu_experts and _waits_for_pages(found.best):
        for start in found.likeliest([found.best.choice, whole, bridging], "cpu_every")[
            : 1 if is_near else 3
        ]:
            found.vary(start)
        if found.best.choice.cpu_every and not is_near:
            found.vary(found.best.choice)


def _waits_for_pages(plan: Planned) -> bool:
    """Rather than for the CPU: KV on the GPU, which takes the place of pages, makes such a plan slower."""
    return plan.prediction.lane_s["h2d"] > plan.prediction.lane_s["cpu"]


def problem_of(
    spec: ModelSpec,
    dtype: str,
    memory: Memory,
    workload: Workload,
    *,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    expert_bytes: int | None = None,
) -> Problem:
    """What a policy has to fit; arguments as `search` has them.

    Raises:
        ConfigError: max_model_len is more than the model was made for.
    """
    if max_model_len and max_model_len > spec.max_position:
        raise ConfigError(
            f"max_model_len={max_model_len} is more than the model's {spec.max_position} positions; lower it"
        )
    return Problem(
        spec, dtype, memory, workload,
        length=max_model_len or min(workload.longest, spec.max_position),
        most_seqs=min(x for x in (max_num_seqs, workload.num_requests, _fed(workload), MOST_SEQS) if x),
        expert_bytes=expert_bytes,
    )  # fmt: skip


def _fed(workload: Workload) -> int:
    """Sequences that passes have room for the prompts of, as fast as others end; more would be slots without."""
    return max(1, floor(MOST_PREFILL * workload.mean_answer / workload.mean_prompt))
