"""What a policy should reach with a workload: a pass in the middle of many, and a whole job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.filling import kinds_of_passes, most_prompts
from moe_lightning.perf.passes import Passes
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.workload import Workload, num_decoding
from moe_lightning.policy import Policy

# Layers simulated at least, and for an estimate: a pass takes a constant and so much a layer.
_LONG, _SHORT = 6, 2
_FEW_PAGES = 24  # of a layer: for an estimate, several are taken for one
_MOST_TASKS = 5_000  # of a simulated pass, about: all layers beyond are alike
_FEW_TASKS = 1_000  # of a whole one, which is then simulated


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


@dataclass(frozen=True)
class Outlook:
    """A workload under a policy, with passes as full as KV memory allows.

    Passes have as many sequences as KV memory holds and the prompts that take the place of those that end. What is
    worked out for one of `prediction`, `estimate` and `at_best` serves the others.

    Raises:
        ScheduleError: the policy's ring cannot hold the pages of a layer.
        ConfigError: the policy's pages are not the model's, or the machine has no rate for the dtype.
    """

    spec: ModelSpec
    dtype: str
    policy: Policy
    rates: Rates
    workload: Workload

    @cached_property
    def prediction(self) -> Prediction:
        """By simulation of as many layers as tell of all."""
        n, (pass_s, lane_s) = self.num_seqs, self._steady
        rate = self.job_tokens_per_s
        return Prediction(
            pass_s, lane_s, n, self.steady_prompts, self.num_tokens / (self.num_passes * pass_s), rate,
            self.num_tokens / rate if self.workload.num_requests else None,
        )  # fmt: skip

    @cached_property
    def job_tokens_per_s(self) -> float:
        """Generated, from the first pass to the last, as predicted: by this alone plans are compared.

        Quicker than all of the prediction where the job has no passes in which sequences are of all ages.
        """
        return self.num_tokens / self._job_s(self._predicted, lambda: self._steady[0])

    @cached_property
    def _steady(self) -> tuple[float, dict[str, float]]:
        """Seconds of a steady pass, and of each lane in it."""
        n, prompts = self.num_seqs, self.steady_prompts
        deep = max(_LONG, _MOST_TASKS // self.passes.tasks_of_layer(n, prompts))
        return self.passes.steady(n, prompts, deep)

    @cached_property
    def estimate(self) -> float:
        """Generated tokens/s of the whole job, about as predicted: quicker, from fewer layers.

        Where nothing or next to nothing decodes, lanes seldom wait for each other.
        """

        def seconds(decode: int, prompts: int) -> float:
            if decode <= 1 < self.num_seqs or not decode:
                return self._busiest(decode, prompts)
            return self._simulated(decode, prompts, _SHORT)

        return self.num_tokens / self._job_s(seconds)

    @cached_property
    def at_best(self) -> float:
        """Generated tokens/s of the whole job if the busiest lane never waited: no order of tasks exceeds that."""
        return self.num_tokens / self._job_s(self._busiest)

    @cached_property
    def passes(self) -> Passes:
        """Its passes."""
        work = self.workload
        context, prompt = work.mean_context, work.mean_prompt
        return Passes(
            self.spec, self.dtype, self.policy, self.rates, context, prompt, token_prompt=work.token_prompt
        )

    @cached_property
    def num_seqs(self) -> int:
        """Sequences that decode in a pass."""
        return num_decoding(self.policy, self.workload)

    @cached_property
    def steady_prompts(self) -> int:
        """Prompt tokens of a steady pass: where answers are short, no more than passes have room for.

        0 where all requests of a job run at once: nobody takes the place of those that end.
        """
        if self.workload.num_requests and self.workload.num_requests <= self.num_seqs:
            return 0
        steady = round(self.num_seqs * self.workload.mean_prompt / self.workload.mean_answer)
        return min(steady, self.policy.prefill_tokens)

    @property
    def num_requests(self) -> int:
        """Of the job; where they never end, twice those that fill memory."""
        return self.workload.num_requests or 2 * self.num_seqs

    @property
    def num_tokens(self) -> float:
        """Generated in the job."""
        return self.num_requests * self.workload.mean_answer

    @property
    def num_passes(self) -> float:
        """Steady ones that the answers need, or the prompts where those are what takes long."""
        prompts = self.num_requests * self.workload.mean_prompt
        return max(self.num_tokens / self.num_seqs, prompts / self.policy.prefill_tokens)

    def _predicted(self, decode: int, prompts: int) -> float:
        """Seconds of such a pass, from all layers where they have few tasks."""
        layers = self.spec.num_layers
        is_small = layers * self.passes.tasks_of_layer(decode, prompts) <= _FEW_TASKS
        return self._simulated(decode, prompts, layers if is_small else _LONG)

    def _simulated(self, decode: int, prompts: int, depth: int) -> float:
        """Seconds of a pass with so many sequences and prompt tokens, from `depth` layers and few pages of each."""
        return self.passes.steady(decode, prompts, depth, most_pages=_FEW_PAGES)[0]

    def _busiest(self, decode: int, prompts: int) -> float:
        """Seconds that the busiest lane of a pass works."""
        return max(self.passes.lane_seconds(decode, prompts).values())

    def _job_s(
        self, seconds: Callable[[int, int], float], steady_s: Callable[[], float] | None = None
    ) -> float:
        """Of the whole job: its passes are between the extremes, and are taken to be so in time as well."""
        kinds, n = kinds_of_passes(self.policy, self.workload), self.num_seqs
        most = most_prompts(self.policy, self.workload)
        job_s = kinds.quiet * seconds(1, 0) + kinds.full * seconds(n, 0)
        job_s += kinds.ramp * seconds(0, most) + kinds.crowded * seconds(n, max(1, most - n))
        if kinds.steady:
            share = self.num_passes * n / self.num_tokens  # more than 1 where prompts are what takes long
            job_s += kinds.steady * share * (steady_s() if steady_s else seconds(n, self.steady_prompts))
        return job_s
