"""Passes beside their predictions, and another plan when the two drift apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

from moe_lightning.engine.background import at_once
from moe_lightning.engine.facts import mean_context
from moe_lightning.engine.worker import RecordedPass
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.drift import Drift, is_close
from moe_lightning.perf.memory import HEAD_ROWS
from moe_lightning.perf.outlook import Outlook
from moe_lightning.perf.passes import Passes
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.refit import Refitted, fit, kind_seconds
from moe_lightning.perf.replan import Bounds, changes, replan
from moe_lightning.perf.workload import Workload, num_decoding
from moe_lightning.pipeline.task import TaskKind
from moe_lightning.pipeline.timeline import Timeline
from moe_lightning.policy import Policy
from moe_lightning.runtime.micro_batch import Step

MOST_REVISIONS = 3  # of a job: what drifts on and on is nothing that a plan follows
_FULL = 0.5  # of the sequences that fill KV memory: smaller passes tell little of the plan
_STEPS = 32  # in an octave of contexts, in the room for sequences and for prompts: those between share a prediction
_CAUSES = 3  # that are named


@dataclass(frozen=True)
class Revision:
    """How to go on, and why, in words."""

    policy: Policy
    message: str


@dataclass(frozen=True)
class Found:
    """What a search for another plan came to.

    Attributes:
        rates: fitted.
        rest: what a pass takes beyond what its tasks explain by them.
        policy: to go on with.
        revision: the same, in words too.
    """

    rates: Rates
    rest: float
    policy: Policy
    revision: Revision


Search = Callable[[], Found]
Begin = Callable[[Search], "Future[Found]"]


class Watch:
    """Says what each pass should take and, when many took something else, how to go on.

    Then one pass is recorded, the rates are fitted to it, and the plan is searched for anew among those that need
    no other memory, while passes go on; the first pass that ends after the search brings the revision. What the
    fitted rates do not explain is kept as a factor of whole passes: so passes that go on as they are drift no more,
    and only another change leads to another revision.

    Args:
        spec: the model.
        dtype: of weights, activations and KV.
        policy: that runs.
        rates: by which it was planned.
        workload: for which it was planned.
        max_model_len: tokens of the longest prompt.
        begin: runs a search, now or beside the passes.

    Attributes:
        wants_recording: the next pass is to be recorded.
        num_revisions: so far.
    """

    def __init__(
        self, spec: ModelSpec, dtype: str, policy: Policy, rates: Rates, workload: Workload, max_model_len: int,
        begin: Begin = at_once,
    ) -> None:  # fmt: skip
        self._spec, self._dtype, self._workload = spec, dtype, workload
        # Memory is set aside for this many rows of logits whatever the plan, and rows take little else.
        size = max(policy.micro_batch_size, min(HEAD_ROWS, policy.max_num_seqs))
        self._bounds = Bounds(replace(policy, micro_batch_size=size), max_model_len)
        self._policy, self._num_seqs = policy, num_decoding(policy, workload)
        self._planned_rates = self._rates = rates
        self._rest = 1.0  # what a pass takes beyond what its tasks explain
        self._drift = Drift()
        self._begin = begin
        self._search: Future[Found] | None = None  # that goes on
        self._expected: dict[tuple[int, int, int], float] = {}
        self.wants_recording = False
        self.num_revisions = 0

    def shrink_to(self, policy: Policy) -> Policy:
        """A pass did not fit, and none is to be larger than this from now on: the best policy that keeps to it."""
        self._bounds = Bounds(policy, self._bounds.least_prefill)
        self._search = None  # it looks among larger plans
        found, _ = replan(self._spec, self._dtype, policy, self._bounds, self._rates, self._workload)
        self._go_over_to(found)
        return self._policy

    def note(self, step: Step, seconds: float, recorded: RecordedPass | None) -> Revision | None:
        """A pass has run, and maybe was recorded; how to go on, if otherwise than until now."""
        self.wants_recording = False
        if self._search:  # which makes passes slower
            return self._take()
        decode = sum(map(len, step.decode))
        if decode < _FULL * self._num_seqs or self.num_revisions >= MOST_REVISIONS:
            return None
        ratio = seconds / (self._rest * self._seconds(step))
        self._drift.note(ratio)
        if not self._drift.is_large:
            return None
        # A recorded pass that was not as the others would be a wrong example.
        if recorded is None or not is_close(ratio, self._drift.ratio):
            self.wants_recording = True
            return None
        self._search = self._begin(self._revise(step, seconds, recorded))
        return self._take()

    def _take(self) -> Revision | None:
        """What the search has found, if it is over."""
        if self._search is None or not self._search.done():
            return None
        found, self._search = self._search.result(), None
        self._rates, self._rest = found.rates, found.rest
        self._go_over_to(found.policy)
        self.num_revisions += 1
        return found.revision

    def _seconds(self, step: Step) -> float:
        """What a pass like this should take, by its tasks alone."""
        policy = self._policy
        decode, prompt = _rows(step)
        sequences, tokens = -(-policy.max_num_seqs // _STEPS), -(-policy.prefill_tokens // _STEPS)
        key = (-(-decode // sequences), -(-prompt // tokens), round(_STEPS * math.log2(mean_context(step))))
        if key not in self._expected:
            self._expected[key] = self._predicted(step, policy, self._rates)
        return self._expected[key]

    def _predicted(self, step: Step, policy: Policy, rates: Rates) -> float:
        context = 2 ** (round(_STEPS * math.log2(mean_context(step))) / _STEPS)
        work = self._workload
        passes = Passes(
            self._spec, self._dtype, policy, rates, context, work.mean_prompt, token_prompt=work.token_prompt
        )
        return passes.steady(*_rows(step))[0]

    def _revise(self, step: Step, seconds: float, recorded: RecordedPass) -> Search:
        """The search for another plan; what it needs is taken down now."""
        timeline, predicted = recorded.timeline(), recorded.facts.predict(self._planned_rates)
        return partial(
            self._find, step, seconds, fit(predicted, timeline), timeline, self._drift.ratio, self._policy,
            self._bounds, self._rates, self._rest,
        )  # fmt: skip

    def _find(
        self, step: Step, seconds: float, factors: dict[TaskKind, float], measured: Timeline, drift: float,
        before: Policy, bounds: Bounds, old_rates: Rates, old_rest: float,
    ) -> Found:  # fmt: skip
        """Runs in any thread: nothing that changes is read or written."""
        spec, dtype, work = self._spec, self._dtype, self._workload
        was = Outlook(spec, dtype, before, old_rates, work).prediction.tokens_per_s / old_rest
        rates = Refitted(self._planned_rates, factors)
        rest = seconds / self._predicted(step, before, rates)
        policy, prediction = replan(spec, dtype, before, bounds, rates, work)
        what = changes(before, policy)
        now = f"the plan changes ({what})" if what else "the plan stays"
        message = (
            f"passes take {drift:.2f} times what was predicted ({_causes(factors, measured)}); fitted to what was "
            f"measured, {now}: {prediction.tokens_per_s / rest:.0f} tokens/s expected "
            f"while memory is full, where {was:.0f} were"
        )
        return Found(rates, rest, policy, Revision(policy, message))

    def _go_over_to(self, policy: Policy) -> None:
        """What was seen under another policy says nothing of this one."""
        self._policy, self._num_seqs = policy, num_decoding(policy, self._workload)
        self._expected.clear()
        self._drift.forget()


def _rows(step: Step) -> tuple[int, int]:
    """Sequences that decode, and tokens of prompts."""
    prompts = sum(len(piece.token_ids) for chunk in step.prefill for piece in chunk)
    return sum(map(len, step.decode)), prompts


def _causes(factors: dict[TaskKind, float], measured: Timeline) -> str:
    """The kinds of tasks that took notably more or less, those that weigh most."""
    seconds = kind_seconds(measured)
    weights = {kind: abs(seconds[kind] * (1 - 1 / factor)) for kind, factor in factors.items()}
    notable = [kind for kind, factor in factors.items() if not is_close(factor, 1.0)]
    heaviest = sorted(notable, key=lambda kind: weights[kind], reverse=True)[:_CAUSES]
    return ", ".join(f"{kind} {factors[kind]:.2f} times" for kind in heaviest) or "no kind of task stands out"
