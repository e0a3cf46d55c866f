"""The policy that should be fastest on a machine: searched against the simulated schedule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, floor
from typing import Any

from moe_lightning.errors import ConfigError
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.default_policy import PAGE_BYTES, Memory, pages_per_expert
from moe_lightning.perf.outlook import Prediction, at_best, estimate, outlook
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.shortfall import no_feasible_policy
from moe_lightning.perf.sizing import MOST_PREFILL, MOST_SEQS, Choice, Problem, largest_policy, sized
from moe_lightning.perf.workload import Workload
from moe_lightning.policy import Policy

_VALUES: dict[str, tuple[float, ...]] = {
    "ring": (1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0),
    "parts": (4, 1, 2, 8),
    "prefill": (2.0, 1.25, 1.5, 3.0, 4.0),
    "micro_batches": (8, 2, 4, 12, 16),
    "groups": (1, 2, 4),
    "ahead": (2.0, 1.0, 0.5),
}
_NAMES = (*_VALUES, "pages")
_PAGE_SIZES = (1.0, 0.5, 2.0)  # shares of the usual page's
_ROUNDS = 2
_RUNNERS_UP = 3
_WORTH = 1.002  # a smaller gain is not looked for: where the link is the bound, all plans are about as fast
_BEHIND = 0.95  # of the best that is known: one choice after the other seldom makes up for more
_SPARE, _ENOUGH = 8, 0.985  # so many times the sequences with which this share is reached are enough
_APART = 2e-3  # runners-up that differ by less are one


@dataclass(frozen=True)
class Planned:
    """A policy, what it should reach, and the choices that it came from.

    `runners_up` are the next best of those that were simulated, each slower than the one before.
    """

    policy: Policy
    prediction: Prediction
    choice: Choice
    runners_up: tuple[Planned, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """By which plans are compared: generated, of the whole job."""
        return self.prediction.job_tokens_per_s


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
) -> Planned:
    """The policy that finishes the workload first, of all that fit.

    One choice is varied at a time, twice each, from several starts. Values whose lanes alone, or first layers, take
    longer than what was found are not simulated to the end.

    Args:
        spec: the model.
        dtype: of weights, activations and KV.
        memory: what may be used; there is a GPU.
        rates: of the machine.
        workload: what is to be computed.
        max_model_len: tokens of the longest sequence; default: the workload's.
        max_num_seqs: sequences that may decode at once; default: as many as fit.
        expert_bytes: of a weight of an expert; default: the dtype's.
        near: a plan for a machine that differs a little: it is tried too, and each choice varied from there once.

    Raises:
        NoFeasiblePolicyError: nothing fits.
        ConfigError: max_model_len is more than the model was made for.
    """
    problem = problem_of(
        spec, dtype, memory, workload,
        max_model_len=max_model_len, max_num_seqs=max_num_seqs, expert_bytes=expert_bytes,
    )  # fmt: skip
    problem = _with_enough(problem, rates)
    found = _Search(problem, rates)
    if near:
        found.try_plan(near)
        found.vary(near.choice, _NAMES, 1)
    *starts, smallest = _starts(problem)
    if found.best is None:
        for start in starts:
            found.vary(start, _NAMES, _ROUNDS)
    if found.best is None:
        found.vary(smallest, _NAMES, _ROUNDS)
    if found.best is None:
        raise no_feasible_policy(problem, smallest)
    return found.best_with_others()


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
    return max(1, floor(MOST_PREFILL * workload.gen_len / workload.mean_prompt))


def _with_enough(problem: Problem, rates: Rates) -> Problem:
    """The problem without sequences that only make passes longer.

    Where not the link but arithmetic or host memory is the bound, twice the sequences take twice as long. Kept are
    several times as many as the bound needs, so that lanes do not wait for each other either.
    """
    usual = _starts(problem)[0]
    policy = largest_policy(problem, usual)
    if policy is None:
        return problem

    @cache
    def bound(num_seqs: int) -> float:
        fewer = sized(problem, usual, num_seqs)
        return at_best(problem.spec, problem.dtype, fewer, rates, problem.workload) if fewer else 0.0

    most = num_seqs = policy.max_num_seqs
    while num_seqs > _SPARE and bound(num_seqs // _SPARE) > _ENOUGH * bound(num_seqs):
        num_seqs = ceil(num_seqs / 2)
    return problem if num_seqs == most else replace(problem, most_seqs=num_seqs)


def _pages(problem: Problem) -> list[int]:
    sizes = (round(share * PAGE_BYTES) for share in _PAGE_SIZES)
    size = problem.expert_bytes or problem.dtype_bytes
    return list(dict.fromkeys(pages_per_expert(problem.spec, size, page) for page in sizes))


def values_of(problem: Problem) -> dict[str, tuple[float, ...]]:
    """What is tried of each choice, the one that is begun with first."""
    most = problem.spec.experts.num_experts
    parts = tuple(count for count in _VALUES["parts"] if count <= most)
    return {**_VALUES, "parts": parts, "pages": tuple(_pages(problem))}


def _starts(problem: Problem) -> tuple[Choice, ...]:
    """The usual choice, two that differ in much, and one that takes as little memory as any."""
    values = values_of(problem)
    usual = Choice(**{name: some[0] for name, some in values.items()})  # type: ignore[arg-type]
    finest: dict[str, Any] = {"parts": max(values["parts"]), "pages": min(values["pages"])}
    fine = replace(usual, micro_batches=2, prefill=4.0, **finest)
    whole = replace(usual, ring=1.2, micro_batches=2, prefill=4.0, parts=1, groups=2)
    least: dict[str, Any] = {name: min(values[name]) for name in ("ring", "prefill")}
    most: dict[str, Any] = {name: max(values[name]) for name in ("micro_batches", "parts", "pages")}
    return usual, fine, whole, replace(usual, **least, **most)


def _with(choice: Choice, name: str, value: float) -> Choice:
    changed: dict[str, Any] = {name: value}
    return replace(choice, **changed)


class _Search:
    """What has been tried, and the best of it."""

    def __init__(self, problem: Problem, rates: Rates) -> None:
        self._problem = problem
        self._rates = rates
        self._values = values_of(problem)
        self._policies: dict[Choice, Policy | None] = {}
        self._bounds: dict[Policy, float] = {}
        self._estimates: dict[Policy, float] = {}
        self._found: dict[Policy, Planned] = {}
        self.best: Planned | None = None

    def try_plan(self, plan: Planned) -> None:
        """Take a plan for another machine as it is, if it fits."""
        use, memory = self._problem.use(plan.policy), self._problem.memory
        assert memory.gpu is not None
        if use.gpu_bytes <= memory.gpu and use.host_bytes <= memory.host:
            self._simulate(plan.policy, plan.choice)

    def vary(self, start: Choice, names: Iterable[str], rounds: int) -> None:
        """Vary one choice after the other from `start`; nothing where that is far behind."""
        names = tuple(names)
        base = self._try([start]) or start
        policy = self._policy(start)
        if policy and self._value(policy) < _BEHIND * self._reached:
            return
        for _ in range(rounds):
            before = base
            for name in names:
                base = self._try(_with(base, name, value) for value in self._values[name]) or base
            if base == before:
                return

    def best_with_others(self) -> Planned:
        """The best plan with its runners-up."""
        assert self.best is not None
        others: list[Planned] = []
        for plan in sorted(self._found.values(), key=lambda p: -p.tokens_per_s):
            last = others[-1] if others else self.best
            if plan.tokens_per_s < last.tokens_per_s * (1 - _APART) and len(others) < _RUNNERS_UP:
                others.append(plan)
        return replace(self.best, runners_up=tuple(others))

    def _try(self, choices: Iterable[Choice]) -> Choice | None:
        """Simulate those that may be faster than the best, most promising first; the choice to go on from."""
        policies = [(self._policy(choice), choice) for choice in choices]
        promising = [(self._bound(policy), policy, choice) for policy, choice in policies if policy]
        estimated = [
            (policy, choice)
            for bound, policy, choice in sorted(promising, key=lambda entry: -entry[0])
            if bound > self._reached * _WORTH
        ]
        for policy, choice in sorted(estimated, key=lambda entry: -self._estimate(entry[0])):
            if self._estimate(policy) > self._reached * _WORTH:
                self._simulate(policy, choice)
        return max(estimated, key=lambda entry: self._value(entry[0]))[1] if estimated else None

    def _value(self, policy: Policy) -> float:
        """As well as it is known."""
        return self._found[policy].tokens_per_s if policy in self._found else self._estimate(policy)

    @property
    def _reached(self) -> float:
        return self.best.tokens_per_s if self.best else 0.0

    def _policy(self, choice: Choice) -> Policy | None:
        if choice not in self._policies:
            self._policies[choice] = largest_policy(self._problem, choice)
        return self._policies[choice]

    def _bound(self, policy: Policy) -> float:
        if policy not in self._bounds:
            p = self._problem
            self._bounds[policy] = at_best(p.spec, p.dtype, policy, self._rates, p.workload)
        return self._bounds[policy]

    def _estimate(self, policy: Policy) -> float:
        if policy not in self._estimates:
            p = self._problem
            self._estimates[policy] = estimate(p.spec, p.dtype, policy, self._rates, p.workload)
        return self._estimates[policy]

    def _simulate(self, policy: Policy, choice: Choice) -> None:
        if policy in self._found:
            return
        p = self._problem
        plan = Planned(policy, outlook(p.spec, p.dtype, policy, self._rates, p.workload), choice)
        self._found[policy] = plan
        if plan.tokens_per_s > self._reached:
            self.best = plan
