"""What a policy should reach with a workload: a pass in the middle of many, and a whole job."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.passes import ALL_PAGES, Passes
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.workload import Workload, num_decoding
from moe_lightning.policy import Policy

_LONG = 6  # layers simulated at least: a pass takes a constant and so much a layer
_RAMP, _SHORT_RAMP = 4, 2  # layers of a pass that has prompts only
_FEW_PAGES = 24  # of a layer: for an estimate, several are taken for one
_MOST_TASKS = 8_000  # of a simulated pass, about: all layers beyond are alike


@dataclass(frozen=True)
class Prediction:
    """What a policy should reach.

    Attributes:
        pass_s: seconds of a pass while KV memory is full.
        lane_s: seconds that each lane works in it.
        num_seqs: that decode in it.
        prefill_tokens: of prompts in it.
        tokens_per_s: generated, while KV memory is full.
        job_tokens_per_s: generated, from the first pass to the last.
        job_s: seconds of the whole job; None if it has no end.
    """

    pass_s: float
    lane_s: dict[str, float]
    num_seqs: int
    prefill_tokens: int
    tokens_per_s: float
    job_tokens_per_s: float
    job_s: float | None

    @property
    def bottleneck(self) -> str:
        """The lane that works longest in a pass."""
        return max(self.lane_s, key=self.lane_s.__getitem__)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Tokens of prompts, while KV memory is full."""
        return self.prefill_tokens / self.pass_s


def outlook(spec: ModelSpec, dtype: str, policy: Policy, rates: Rates, workload: Workload) -> Prediction:
    """Passes with as many sequences as KV memory holds and the prompts that take the place of those that end.

    Raises:
        ScheduleError: the policy's ring cannot hold the pages of a layer.
        ConfigError: the policy's pages are not the model's, or the machine has no rate for the dtype.
    """
    plan = _Whole(spec, dtype, policy, rates, workload)
    deep = max(_LONG, _MOST_TASKS // plan.passes.tasks_of_layer(plan.num_seqs, plan.steady_prompts))
    return plan.prediction(*plan.steady(deep), plan.passes.ramp(plan.ramp_prompts, _RAMP))


def estimate(spec: ModelSpec, dtype: str, policy: Policy, rates: Rates, workload: Workload) -> float:
    """Generated tokens/s of the whole job, about as `outlook` has them: quicker, from a few layers and pages."""
    plan = _Whole(spec, dtype, policy, rates, workload, _FEW_PAGES)
    ramp_s = plan.passes.ramp(plan.ramp_prompts, _SHORT_RAMP)
    return plan.prediction(*plan.steady(_LONG), ramp_s).job_tokens_per_s


def at_best(spec: ModelSpec, dtype: str, policy: Policy, rates: Rates, workload: Workload) -> float:
    """Generated tokens/s of the whole job if the busiest lane never waited: what no schedule exceeds."""
    plan = _Whole(spec, dtype, policy, rates, workload)
    lanes = plan.passes.lane_seconds(plan.num_seqs, plan.steady_prompts)
    ramp = plan.passes.lane_seconds(0, plan.ramp_prompts)
    return plan.prediction(max(lanes.values()), {}, max(ramp.values())).job_tokens_per_s


@dataclass(frozen=True)
class _Whole:
    """A workload under a policy, with passes as full as KV memory allows."""

    spec: ModelSpec
    dtype: str
    policy: Policy
    rates: Rates
    workload: Workload
    most_pages: int = ALL_PAGES

    @cached_property
    def passes(self) -> Passes:
        """Its passes."""
        work = self.workload
        context, prompt = work.mean_context(), work.mean_prompt
        return Passes(
            self.spec,
            self.dtype,
            self.policy,
            self.rates,
            context,
            prompt,
            self.most_pages,
            work.token_prompt,
        )

    @cached_property
    def num_seqs(self) -> int:
        """Sequences that decode in a pass."""
        return num_decoding(self.policy, self.workload)

    @cached_property
    def steady_prompts(self) -> int:
        """Prompt tokens of a steady pass: where answers are short, no more than passes have room for."""
        steady = round(self.num_seqs * self.workload.mean_prompt / self.workload.gen_len)
        return min(steady, self.policy.prefill_tokens)

    @cached_property
    def ramp_prompts(self) -> int:
        """Prompt tokens of a pass while memory fills."""
        wanted = round(self.num_seqs * self.workload.mean_prompt)
        return min(self.num_seqs + self.policy.prefill_tokens, wanted)

    def steady(self, depth: int) -> tuple[float, dict[str, float]]:
        """Seconds of a pass while memory is full, and of each lane in it."""
        return self.passes.steady(self.num_seqs, self.steady_prompts, depth)

    def prediction(self, pass_s: float, lane_s: dict[str, float], ramp_s: float) -> Prediction:
        """From seconds of a steady pass and of one that has prompts only to those of a job."""
        n, prefill, work = self.num_seqs, self.policy.prefill_tokens, self.workload
        ramp = n * work.mean_prompt / (n + prefill)
        requests = work.num_requests or 2 * n
        # Passes that the answers need, or the prompts where those are what takes long.
        passes = max(requests * work.gen_len / n, requests * work.mean_prompt / prefill)
        job_s = ramp * max(ramp_s, pass_s / 2) + passes * pass_s
        return Prediction(
            pass_s, lane_s, n, self.steady_prompts, requests * work.gen_len / (passes * pass_s),
            requests * work.gen_len / job_s,
            job_s if work.num_requests else None,
        )  # fmt: skip
