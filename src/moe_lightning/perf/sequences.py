"""How many sequences should decode: as many as fit, or fewer where these are faster."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from math import ceil

from moe_lightning.perf.choices import changed, starts, values_of
from moe_lightning.perf.outlook import Outlook
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.sizing import Choice, Problem, most_sequences, sized
from moe_lightning.perf.trials import PROMISING, WORTH, Trials
from moe_lightning.pipeline.task import Lane

# Requests over sequences, in sixteenths: the more, the less is lost by the last ones.
_WAVES = *range(16, 36), *range(36, 64, 2)
_FEWEST = 0.3  # of the sequences that fit
_LIKELY, _OF_EACH, _STARTS = 12, 3, 2  # so many are estimated, of each choice at least, and so many varied
_TURNS = 2  # from the best plan, and then from the next, whose other choices are for fewer sequences already
# Of the sequences with which pages take such shares of another lane's time; with these prompts, as a multiple of a
# steady pass's.
_ABOUT, PAGES, _PREFILLS = (0.9, 0.95, 1.0, 1.05, 1.1), (1.0, 0.0), (1.25, 2.0)
_NEAR = 0.05  # numbers of sequences
# Of what is reached. Choices are for more sequences, so varying them gains more here than elsewhere.
_HOPEFUL = 0.96
_LEAST = 0.99  # of the same, where places are the only thing that is other
_SPARE, _ENOUGH = 8, 0.985  # so many times the sequences with which this share is reached are enough


def with_enough(problem: Problem, rates: Rates) -> Problem:
    """The problem without KV memory for sequences that only make passes longer.

    Where not the link but arithmetic or host memory is the bound, twice the sequences take twice as long. Kept are
    several times as many as the bound needs, so that lanes do not wait for each other either.
    """
    usual = starts(problem).usual

    @cache
    def bound(num_seqs: int) -> float:
        fewer = sized(replace(problem, enough=num_seqs), usual, num_seqs)
        return problem.outlook(fewer, rates).at_best if fewer else 0.0

    most = num_seqs = most_sequences(problem, usual)
    while num_seqs > _SPARE and bound(num_seqs // _SPARE) > _ENOUGH * bound(num_seqs):
        num_seqs = ceil(num_seqs / 2)
    return problem if num_seqs == most else replace(problem, enough=num_seqs)


def of_fewer(
    found: Trials, problem: Problem, most: Problem, rates: Rates, *, is_near: bool
) -> tuple[Trials, Problem]:
    """Trials with other numbers of sequences than now, up to those that fit `most`, where these may be faster.

    The numbers that are tried are the same whatever memory is, as far as they fit: so with more of it a plan is
    seldom slower, and little.
    """
    assert found.best is not None
    best, begin = found.best.choice, starts(problem)
    shares = {best.kv_every, 1} if best.kv_every else set()
    others = [replace(best, kv_every=0), begin.halves]
    others += (replace(begin.bridging, kv_every=every) for every in {0, *shares})
    is_brief = is_near or _all_at_once(most, best)
    if is_brief and rates.knows_cpu_experts:
        # Nothing streams; of all at once the CPU may have more to compute than pays.
        others.append(replace(best, kv_every=1, cpu_every=1, micro_batches=1, groups=1))
    # Which problems are looked at, the first choice tells.
    first = [replace(begin.bridging, kv_every=_fewer_layers(problem, best), prefill=best.prefill)]
    choices = list(dict.fromkeys([*(first if best.kv_every else ()), best, *others]))
    result, fewer = (found, problem), _with_fewer(most, problem, best)
    for _ in range(1 if is_brief else _TURNS):
        reached = result[0].tokens_per_s
        likely, choices = _likely(fewer, choices, rates, reached), []
        for estimate, some, choice in _apart(likely)[: 1 if is_brief else _STARTS]:
            if estimate < _HOPEFUL * reached:
                break
            trials = Trials(some, rates)
            trials.vary(choice)
            if trials.best and not is_near and not choice.kv_every:  # each takes less room there
                bases = [trials.best.choice, replace(trials.best.choice, ring=2.0, groups=2)]
                for start in trials.likeliest(bases, "kv_every", least=trials.tokens_per_s)[:1]:
                    trials.vary(start)
            if trials.best and trials.tokens_per_s > WORTH * result[0].tokens_per_s:
                best = trials.best.choice
                prefills = dict.fromkeys((best.prefill, *values_of(some)["prefill"]))
                result, choices = (trials, some), [changed(best, "prefill", value) for value in prefills]
        if not choices:
            break
    return result


def _fewer_layers(problem: Problem, choice: Choice) -> int:
    """With fewer sequences fewer layers need their KV on the GPU: the next but one of such shares."""
    longer = sorted(every for every in values_of(problem)["kv_every"] if every > choice.kv_every)
    return int(longer[min(1, len(longer) - 1)]) if longer else choice.kv_every


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


def _all_at_once(problem: Problem, choice: Choice) -> bool:
    """A job of no more requests than KV memory holds."""
    requests = problem.workload.num_requests
    return requests is not None and requests <= most_sequences(problem, choice)


def of_undisturbed(found: Trials, problem: Problem, most: Problem, rates: Rates) -> tuple[Trials, Problem]:
    """Trials with so few sequences that there is memory for each to its end, where these may be faster.

    With KV on the GPU, where blocks take room of pages, there is memory for as many at their mean length.
    With as many as fill memory at their mean length some are put back while all are old, and computed anew later:
    that costs nothing where pages are the bound. Numbers are the same whatever memory is, as in `of_fewer`.
    """
    assert found.best is not None
    best = found.best.choice
    if _all_at_once(most, best) or found.best.prediction.bottleneck == "h2d":
        return found, problem
    fitting, longer = most_sequences(most, best), most.blocks_of_longest / most.mean_blocks
    counts = (round(2 ** (step / 2)) for step in range(2 * 20))
    likely = list[tuple[float, Problem, Choice]]()
    for count in counts:
        if _FEWEST * fitting <= count < fitting:
            some = replace(most, most_seqs=count, enough=ceil(longer * count))
            for choice in dict.fromkeys([best, replace(best, kv_every=0), starts(problem).halves]):
                if policy := sized(some, choice, count):
                    likely.append((some.outlook(policy, rates).estimate, some, choice))
    estimate, some, choice = max(likely, key=lambda entry: entry[0], default=(0.0, problem, best))
    if estimate < _LEAST * found.tokens_per_s:
        return found, problem
    trials = Trials(some, rates)
    trials.vary(choice)
    return (trials, some) if trials.tokens_per_s > WORTH * found.tokens_per_s else (found, problem)


def of_balanced(found: Trials, problem: Problem, most: Problem, rates: Rates) -> tuple[Trials, Problem]:
    """Trials with so few sequences that pages are not the bound, or none streams, where these may be faster."""
    assert found.best is not None
    result = found, problem
    for share in PAGES:
        estimate, some, choice = balanced(most, found.best.choice, rates, share)
        if estimate < PROMISING * found.tokens_per_s:
            continue
        trials = Trials(some, rates)
        trials.vary(choice)
        if trials.tokens_per_s > WORTH * result[0].tokens_per_s:
            result = trials, some
    return result


def balanced(problem: Problem, start: Choice, rates: Rates, share: float) -> tuple[float, Problem, Choice]:
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
