"""The policy that should be fastest on a machine: searched against the simulated schedule."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from math import ceil, floor

from moe_lightning.errors import ConfigError
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.choices import changed, starts, values_of
from moe_lightning.perf.default_policy import Memory
from moe_lightning.perf.outlook import Outlook
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.shortfall import no_feasible_policy
from moe_lightning.perf.sizing import (
    MOST_PREFILL,
    MOST_SEQS,
    Choice,
    Problem,
    largest_policy,
    most_sequences,
    sized,
)
from moe_lightning.perf.slack import with_slack
from moe_lightning.perf.trials import Planned, Trials
from moe_lightning.perf.workload import Workload
from moe_lightning.pipeline.task import Lane

_WORTH_PACKING = 0.995  # where plain experts reach this share, they are left as they are
# Requests over sequences, in sixteenths: the more, the less is lost by the last ones.
_WAVES = *range(16, 36), *range(36, 64, 2)
_FEWEST = 0.3  # of the sequences that fit
# So many are estimated, and so many varied that should reach such a share of what is reached: from the best plan,
# and then from the next, whose other choices are for fewer sequences already.
_LIKELY, _OF_EACH, _STARTS, _PROMISING = 12, 3, 2, (0.97, 0.97)
# Of the sequences with which pages take such shares of another lane's time; with these prompts, as a multiple of a
# steady pass's.
_ABOUT, _PAGES, _PREFILLS = (0.9, 0.95, 1.0, 1.05, 1.1), (1.0, 0.0), (1.25, 2.0)
_NEAR = 0.05  # numbers of sequences
_ROUNDS = 2  # at most, from places for experts and KV to numbers of sequences and back
_WORTH = 1.002  # a smaller gain is not looked for
_SPARE, _ENOUGH = 8, 0.985  # so many times the sequences with which this share is reached are enough


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

    One choice is varied at a time, from several starts and once more from the best that was found. Values whose
    lanes alone, or first layers, take longer than what was found are not simulated to the end. bfloat16 experts are
    packed: that takes 25 % off what the link carries and memory holds. Where plain ones might be faster, as where
    all of them fit on the GPU, they are looked at too.

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
    usual = largest_policy(problem, starts(problem)[0])
    return usual is None or usual.num_frames > 0


def _as_fast_as_they_are(problem: Problem, packed: Planned, rates: Rates) -> Planned | None:
    """A plan with experts as they are that is about as fast as one with packed ones; None where there is none.

    Looked for where one that the search begins with is, or the packed plan's own choice, as large as fits or, with
    KV on the GPU, with so few sequences that pages are not the bound.
    """
    least = _WORTH_PACKING * packed.tokens_per_s
    some = (largest_policy(problem, choice) for choice in (packed.choice, *starts(problem)))
    is_likely = any(policy and problem.outlook(policy, rates).estimate >= least for policy in some)
    if not is_likely and packed.choice.kv_every:
        is_likely = any(_balanced(problem, packed.choice, rates, share)[0] >= least for share in _PAGES)
    plain = _searched(problem, rates, packed) if is_likely else None
    return plain if plain and plain.tokens_per_s >= least else None


def _searched(problem: Problem, rates: Rates, near: Planned | None) -> Planned:
    """The search for one way to store experts."""
    problem = _with_enough(problem, rates)
    found = Trials(problem, rates)
    if near:
        found.try_plan(near)
        found.vary(near.choice)
    is_near, (usual, fine, whole, bridging, smallest) = found.best is not None, starts(problem)
    # What is mostly fastest comes first: the more is known to be far behind.
    for start in (bridging,) if is_near else (bridging, whole, usual, fine):
        found.vary(start)
    if found.best is None:
        found.vary(smallest)
    if found.best is None:
        some = (replace(smallest, pages=int(pages)) for pages in values_of(problem)["pages"])
        raise no_feasible_policy(problem, tuple(some))
    if not is_near:
        found.vary(found.best.choice)
    found, problem = _settled(found, problem, bridging, rates, is_near=is_near)
    assert found.best is not None
    plan = with_slack(problem, found.best, rates)
    if not is_near:
        found.vary_for_others(plan)
    return found.with_others(plan)


def _settled(
    found: Trials, most: Problem, bridging: Choice, rates: Rates, *, is_near: bool
) -> tuple[Trials, Problem]:
    """Trials after places for experts and KV, then numbers of sequences, have been varied: each changes the other.

    With KV on the GPU bounds are not in the order of what is reached: all shares of it are tried, and in pairs what
    hangs together.
    """
    problem = most
    for _ in range(1 if is_near else _ROUNDS):
        before, reached = found, found.tokens_per_s
        is_job = problem.workload.num_requests is not None
        _look_elsewhere(found, bridging, rates, is_near=is_near, is_job=is_job)
        assert found.best is not None
        if found.best.choice.kv_every and not is_near:
            for other in ("groups", "prefill"):
                found.vary_both(found.best.choice, "micro_batches", other)
            found.vary(found.best.choice, few=None)
        found, problem = _of_fewer_sequences(found, problem, most, rates, is_near=is_near)
        found, problem = _of_balanced(found, problem, most, rates)
        if found is before and found.tokens_per_s <= _WORTH * reached:
            break
    return found, problem


def _look_elsewhere(found: Trials, bridging: Choice, rates: Rates, *, is_near: bool, is_job: bool) -> None:
    """KV on the GPU where the CPU is what takes long, or few sequences take little room; on the CPU, experts.

    Jobs are varied less: they are again with fewer sequences.
    """
    assert found.best is not None
    whole = replace(found.best.choice, micro_batches=1, groups=1)  # nothing is to be hidden behind attention
    likely = [found.best.choice, whole, bridging, replace(bridging, micro_batches=4, groups=4)]
    likely = likely[:2] if is_near else likely
    if _waits_for_pages(found.best) and not found.best.choice.kv_every:
        for start in found.likeliest(likely, "kv_every", least=_PROMISING[0] * found.tokens_per_s)[:1]:
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


def _of_fewer_sequences(
    found: Trials, problem: Problem, most: Problem, rates: Rates, *, is_near: bool
) -> tuple[Trials, Problem]:
    """Trials with other numbers of sequences than now, up to those that fit `most`, where these may be faster.

    The numbers that are tried are the same whatever memory is, as far as they fit: so with more of it a plan is
    seldom slower, and little.
    """
    assert found.best is not None
    best, bridging = found.best.choice, starts(problem)[3]
    shares = {best.kv_every, 1} if best.kv_every else set()
    others = [replace(best, kv_every=0), *(replace(bridging, kv_every=every) for every in {0, *shares})]
    choices = list(dict.fromkeys([best, *others]))
    result, fewer = (found, problem), _with_fewer(most, problem, best)
    for promising in _PROMISING[:1] if is_near else _PROMISING:
        reached = result[0].tokens_per_s
        likely, choices = _likely(fewer, choices, rates, reached), []
        for estimate, some, choice in _apart(likely)[:_STARTS]:
            if estimate < promising * reached:
                break
            trials = Trials(some, rates)
            trials.vary(choice)
            if trials.best and not is_near and not choice.kv_every:  # each takes less room there
                bases = [trials.best.choice, replace(trials.best.choice, ring=2.0, groups=2)]
                for start in trials.likeliest(bases, "kv_every", least=trials.tokens_per_s)[:1]:
                    trials.vary(start)
            if trials.best and trials.tokens_per_s > _WORTH * result[0].tokens_per_s:
                best = trials.best.choice
                prefills = dict.fromkeys((best.prefill, *values_of(some)["prefill"]))
                result, choices = (trials, some), [changed(best, "prefill", value) for value in prefills]
        if not choices:
            break
    return result


def _apart(likely: list[tuple[float, Problem, Choice]]) -> list[tuple[float, Problem, Choice]]:
    """Those whose numbers of sequences are not nearly that of one before: from there the way leads to the same."""
    found: list[tuple[float, Problem, Choice]] = []
    for entry in likely:
        if all(abs(entry[1].enough / other.enough - 1) > _NEAR for _, other, _ in found):
            found.append(entry)
    return found


def _likely(
    problems: list[Problem], choices: list[Choice], rates: Rates, reached: float
) -> list[tuple[float, Problem, Choice]]:
    """Estimates of those that may be faster than what is reached, the highest first, one choice of each problem.

    Which problems, the first choice tells: whether a job's last requests fill passes hardly depends on the choice.
    """

    @cache
    def outlook(problem: Problem, choice: Choice) -> Outlook | None:
        policy = sized(problem, choice, problem.enough)
        return problem.outlook(policy, rates) if policy else None

    def bound(problem: Problem, choice: Choice) -> float:
        found = outlook(problem, choice)
        return found.at_best if found else 0.0

    def estimate(problem: Problem, choice: Choice) -> float:
        found = outlook(problem, choice)
        return found.estimate if found else 0.0

    # With KV on the GPU bounds are not in the order of what is reached.
    value = estimate if choices[0].kv_every else bound
    most = sorted(problems, key=lambda problem: -value(problem, choices[0]))[:_LIKELY]
    likely = list[tuple[Problem, Choice]]()
    for choice in choices:  # some of each: how near estimates come to bounds differs from choice to choice
        pairs = [(problem, choice) for problem in most if bound(problem, choice) > reached]
        likely += sorted(pairs, key=lambda pair: -bound(*pair))[: max(_OF_EACH, _LIKELY // len(choices))]
    found = sorted(((estimate(*pair), *pair) for pair in likely), key=lambda entry: entry[0])
    best = {entry[1]: entry for entry in found}  # the last one of each stays
    return sorted(best.values(), key=lambda entry: -entry[0])


def _with_fewer(most: Problem, now: Problem, best: Choice) -> list[Problem]:
    """The problem with KV memory for fewer sequences than fit, where that may be faster.

    With KV on the GPU each takes room of experts. Jobs of a few times as many requests end in passes nearly empty.
    """
    counts = set()
    if best.kv_every:
        counts |= {round(2 ** (step / 8)) for step in range(8 * 20)}
    if requests := most.workload.num_requests:
        counts |= {ceil(requests * 16 / wave) for wave in _WAVES}
    fitting = most_sequences(most, best)
    others = (
        count for count in sorted(counts) if _FEWEST * fitting <= count < fitting and count != now.enough
    )
    return [replace(most, enough=count) for count in others]


def _of_balanced(found: Trials, problem: Problem, most: Problem, rates: Rates) -> tuple[Trials, Problem]:
    """Trials with so few sequences that pages are not the bound, or none streams, where these may be faster."""
    assert found.best is not None
    result = found, problem
    for share in _PAGES:
        estimate, some, choice = _balanced(most, found.best.choice, rates, share)
        if estimate < _PROMISING[0] * found.tokens_per_s:
            continue
        trials = Trials(some, rates)
        trials.vary(choice)
        if trials.tokens_per_s > _WORTH * result[0].tokens_per_s:
            result = trials, some
    return result


def _balanced(problem: Problem, start: Choice, rates: Rates, share: float) -> tuple[float, Problem, Choice]:
    """The fastest, by estimate, with KV on the GPU and about the most sequences with which pages are not the bound.

    Where nearly all experts fit on the GPU beside KV, a few sequences more make a pass twice as long. The estimate
    is 0 where there is no such number.

    Args:
        problem: with all memory.
        start: the choice but for places for prompts, pages, and one micro-batch.
        rates: of the machine.
        share: of the time of another lane, that pages take at most.
    """
    whole = replace(start, kv_every=1, micro_batches=1, groups=1)
    found = [(0.0, problem, whole)]
    for prefill, pages in product(_PREFILLS, values_of(problem)["pages"]):
        choice = replace(whole, prefill=prefill, pages=int(pages))
        count = _most_balanced(problem, choice, rates, share)
        for num_seqs in {ceil(count * about) for about in _ABOUT if count}:
            some = replace(problem, enough=num_seqs)
            if policy := sized(some, choice, num_seqs):
                found.append((some.outlook(policy, rates).estimate, some, choice))
    return max(found, key=lambda entry: entry[0])


def _most_balanced(problem: Problem, choice: Choice, rates: Rates, share: float) -> int:
    """The most sequences with which pages take no more than such a share of another lane's time; 0 for none."""

    def is_more(num_seqs: int) -> bool:
        some = replace(problem, enough=num_seqs)
        policy = sized(some, choice, num_seqs)
        if policy is None:
            return True
        outlook = some.outlook(policy, rates)
        lanes = outlook.passes.lane_seconds(outlook.num_seqs, outlook.steady_prompts)
        return lanes.pop(Lane.H2D) > share * max(lanes.values())

    least, most = 0, most_sequences(problem, choice)
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (least, middle - 1) if is_more(middle) else (middle, most)
    return least


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


def _with_enough(problem: Problem, rates: Rates) -> Problem:
    """The problem without KV memory for sequences that only make passes longer.

    Where not the link but arithmetic or host memory is the bound, twice the sequences take twice as long. Kept are
    several times as many as the bound needs, so that lanes do not wait for each other either.
    """
    usual = starts(problem)[0]

    @cache
    def bound(num_seqs: int) -> float:
        fewer = sized(replace(problem, enough=num_seqs), usual, num_seqs)
        return problem.outlook(fewer, rates).at_best if fewer else 0.0

    most = num_seqs = most_sequences(problem, usual)
    while num_seqs > _SPARE and bound(num_seqs // _SPARE) > _ENOUGH * bound(num_seqs):
        num_seqs = ceil(num_seqs / 2)
    return problem if num_seqs == most else replace(problem, enough=num_seqs)
