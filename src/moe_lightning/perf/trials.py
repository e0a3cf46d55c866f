"""What a search has tried, and the best of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from moe_lightning.perf.choices import changed, values_of
from moe_lightning.perf.outlook import Outlook, Prediction
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.sizing import Choice, Problem, largest_policy
from moe_lightning.policy import Policy

_RUNNERS_UP = 3
_TELLING = ("groups", "parts", "micro_batches", "pages")  # choices that differ enough to be compared with
WORTH = 1.002  # a smaller gain is not looked for: where the link is the bound, all plans are about as fast
_STARTS = 0.95  # the same of where choices are varied from: estimates are a few percent off, mostly too low
PROMISING = (
    0.97  # what is estimated to reach such a share may reach more: other choices are varied from there
)
_BEHIND = 0.85  # of the best that is known: one choice after the other seldom makes up for more
_FEW = 3  # shares of KV on the GPU that are simulated at a time
_APART = 2e-3  # runners-up that differ by less are one


@dataclass(frozen=True)
class Planned:
    """A policy with what it should reach, and the choices that it came from.

    `runners_up` are the next best of those that were simulated, each slower than the one before.
    """

    outlook: Outlook
    choice: Choice
    runners_up: tuple[Planned, ...] = ()

    @property
    def policy(self) -> Policy:
        """How the model runs."""
        return self.outlook.policy

    @property
    def prediction(self) -> Prediction:
        """What the policy should reach; worked out when it is first asked for."""
        return self.outlook.prediction

    @property
    def tokens_per_s(self) -> float:
        """By which plans are compared: generated, of the whole job."""
        return self.outlook.job_tokens_per_s


class Trials:
    """What has been tried, and the best of it."""

    def __init__(self, problem: Problem, rates: Rates) -> None:
        self._problem = problem
        self._rates = rates
        self._values = values_of(problem)
        self._policies: dict[Choice, Policy | None] = {}
        self._outlooks: dict[Policy, Outlook] = {}
        self._found: dict[Policy, Planned] = {}
        self.best: Planned | None = None

    def try_plan(self, plan: Planned) -> None:
        """Take a plan for another machine as it is, if it fits."""
        policy = replace(plan.policy, packed=self._problem.packs(plan.policy.cpu_every))
        use, memory = self._problem.use(policy), self._problem.memory
        assert memory.gpu is not None
        if use.gpu_bytes <= memory.gpu and use.host_bytes <= memory.host:
            self._simulate(policy, plan.choice)

    def vary(self, start: Choice, few: int | None = _FEW) -> None:
        """Vary one choice after the other from `start`; nothing where that is far behind.

        KV is left in host memory alone where the start has it there, and experts to the GPU. Passes with KV on the
        GPU are simulated to more layers, so only a `few` shares of it are tried; None for all.
        """
        base = self._try([start], _STARTS) or start
        policy = self._policy(start)
        if policy and self._value(policy) < _BEHIND * self.tokens_per_s:
            return
        for name in self._values:
            if name in ("kv_every", "cpu_every") and not getattr(start, name):
                continue  # whether that is best is looked at in the end
            some = self.most_promising(base, name)
            base = self._try(some[:few] if name == "kv_every" else some) or base

    def vary_both(self, start: Choice, one: str, other: str) -> None:
        """Try all pairs of values of two choices that hang together."""
        pairs = ((value, with_it) for value in self._values[one] for with_it in self._values[other])
        self._try(changed(changed(start, one, value), other, with_it) for value, with_it in pairs)

    def most_promising(self, choice: Choice, name: str) -> list[Choice]:
        """The choice with other values, those of the highest bound first."""
        some = [changed(choice, name, value) for value in self._values[name]]
        return sorted(some, key=lambda c: -(self._outlook(p).at_best if (p := self._policy(c)) else 0.0))

    def likeliest(self, choices: Sequence[Choice], name: str, *, least: float = 0.0) -> list[Choice]:
        """The choices with other values, one of each, the fastest first, as far as estimates reach `least`."""
        some = [other for choice in choices for other in self.most_promising(choice, name)[:_FEW]]
        # All layers have a low bound, and reach it: the CPU is not waited for anywhere.
        some += [changed(choice, name, 1) for choice in choices]
        by_value = dict[float, tuple[float, Choice]]()
        for other in some:
            if policy := self._policy(other):
                entry, value = (self._outlook(policy).estimate, other), getattr(other, name)
                by_value[value] = max(by_value.get(value, entry), entry, key=lambda e: e[0])
        ordered = sorted(by_value.values(), key=lambda e: -e[0])
        return [other for estimate, other in ordered if estimate >= least]

    def vary_for_others(self, best: Planned) -> None:
        """Simulate a few that promise no more than the plan that is chosen: what it is compared with."""
        for name in _TELLING:
            some = self.most_promising(best.choice, name)
            others = (c for c in some if getattr(c, name) != getattr(best.choice, name))
            other = next(others, best.choice)
            if policy := self._policy(other):
                self._simulate(policy, other)

    def with_others(self, best: Planned) -> Planned:
        """The plan that is chosen with its runners-up, of those that are slower."""
        others: list[Planned] = []
        for plan in sorted(self._found.values(), key=lambda p: -p.tokens_per_s):
            last = others[-1] if others else best
            if plan.tokens_per_s < last.tokens_per_s * (1 - _APART) and len(others) < _RUNNERS_UP:
                others.append(plan)
        return replace(best, runners_up=tuple(others))

    def _try(self, choices: Iterable[Choice], least: float = WORTH) -> Choice | None:
        """Simulate those that may be faster than the best, most promising first; the choice to go on from.

        They may be if their bound is higher, and their estimate at least such a share of what is reached.
        """
        policies = [(self._policy(choice), choice) for choice in choices]
        promising = [(self._outlook(policy).at_best, policy, choice) for policy, choice in policies if policy]
        estimated = [
            (policy, choice)
            for bound, policy, choice in sorted(promising, key=lambda entry: -entry[0])
            if bound > self.tokens_per_s * WORTH
        ]
        for policy, choice in sorted(estimated, key=lambda entry: -self._outlook(entry[0]).estimate):
            if self._outlook(policy).estimate > self.tokens_per_s * least:
                self._simulate(policy, choice)
        return max(estimated, key=lambda entry: self._value(entry[0]))[1] if estimated else None

    def _value(self, policy: Policy) -> float:
        """As well as it is known."""
        return self._found[policy].tokens_per_s if policy in self._found else self._outlook(policy).estimate

    @property
    def tokens_per_s(self) -> float:
        """Of the best; 0 where nothing fits."""
        return self.best.tokens_per_s if self.best else 0.0

    def _policy(self, choice: Choice) -> Policy | None:
        if choice not in self._policies:
            self._policies[choice] = largest_policy(self._problem, choice)
        return self._policies[choice]

    def _outlook(self, policy: Policy) -> Outlook:
        if policy not in self._outlooks:
            self._outlooks[policy] = self._problem.outlook(policy, self._rates)
        return self._outlooks[policy]

    def _simulate(self, policy: Policy, choice: Choice) -> None:
        if policy in self._found:
            return
        plan = Planned(self._outlook(policy), choice)
        self._found[policy] = plan
        if plan.tokens_per_s > self.tokens_per_s:
            self.best = plan
