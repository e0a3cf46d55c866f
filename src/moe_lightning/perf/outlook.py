"""What a policy should reach with a workload: a pass in the middle of many, and a whole job."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.predict import predict
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.workload import Workload
from moe_lightning.pipeline.shape import pass_shape
from moe_lightning.pipeline.task import Lane
from moe_lightning.policy import Policy

_SHORT, _LONG = 4, 8  # layers simulated; a pass takes a constant and so much a layer
_HOST_S, _HOST_SEQ_S = 3e-3, 11e-6  # between two passes, and for each sequence


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


def outlook(spec: ModelSpec, dtype: str, policy: Policy, rates: Rates, workload: Workload) -> Prediction:
    """Passes with as many sequences as the policy allows and the prompts that take the place of those that end.

    Raises:
        ScheduleError: the policy's ring cannot hold the pages of a layer.
        ConfigError: the policy's pages are not the model's, or the machine has no rate for the dtype.
    """
    n = policy.max_num_seqs
    # Where answers are short, prompts come no faster than passes have room for them.
    steady = min(round(n * workload.mean_prompt / workload.gen_len), policy.prefill_tokens)
    model = Passes(spec, dtype, policy, rates, workload.mean_context(), workload.mean_prompt)
    pass_s, lane_s = model.steady(n, steady)
    ramp_s = model.ramp(min(n + policy.prefill_tokens, round(n * workload.mean_prompt)))
    ramp = n * workload.mean_prompt / (n + policy.prefill_tokens)
    requests = workload.num_requests or 2 * n
    # Passes that the answers need, or the prompts where those are what takes long.
    passes = max(requests * workload.gen_len / n, requests * workload.mean_prompt / policy.prefill_tokens)
    job_s = ramp * max(ramp_s, pass_s / 2) + passes * pass_s
    return Prediction(
        pass_s, lane_s, n, steady, requests * workload.gen_len / (passes * pass_s),
        requests * workload.gen_len / job_s,
        job_s if workload.num_requests else None,
    )  # fmt: skip


@dataclass(frozen=True)
class Passes:
    """What passes take under a policy.

    Attributes:
        spec: the model.
        dtype: of weights, activations and KV.
        policy: how it runs.
        rates: of the machine.
        mean_context: tokens that a decoding sequence holds.
        mean_prompt: tokens of a prompt.
    """

    spec: ModelSpec
    dtype: str
    policy: Policy
    rates: Rates
    mean_context: float
    mean_prompt: float

    def steady(self, decode: int, prefill: int) -> tuple[float, dict[str, float]]:
        """Seconds of a pass in the middle of many, and of each lane in it."""
        layers = self.spec.num_layers
        long = self._simulated(decode, prefill, min(_LONG, layers))
        short = self._simulated(decode, prefill, _SHORT) if layers > _LONG else long

        def at_full_depth(a: float, b: float) -> float:
            return b + (b - a) / (_LONG - _SHORT) * max(0, layers - _LONG)

        lanes = {lane.value: at_full_depth(short[1][lane], long[1][lane]) for lane in Lane}
        between = _HOST_S + _HOST_SEQ_S * decode
        return max(lanes["h2d"], at_full_depth(short[0], long[0]) + between), lanes

    def ramp(self, prefill: int) -> float:
        """Seconds of a pass that has prompts only."""
        layers = min(_SHORT, self.spec.num_layers)
        return self._simulated(0, prefill, layers)[0] * self.spec.num_layers / layers

    def _simulated(self, decode: int, prefill: int, layers: int) -> tuple[float, dict[Lane, float]]:
        """Seconds until the last token of a pass of fewer layers, and those that each lane works."""
        policy = self.policy
        chunks, groups = _cut(prefill, policy.chunk_tokens), _cut(decode, policy.micro_batch_size)
        shape = pass_shape(policy, self.spec.experts.num_experts, len(chunks), len(groups), num_layers=layers)
        timeline = predict(
            replace(self.spec, num_layers=layers), shape, chunks + groups, self.mean_context, self.rates,
            pages_per_expert=policy.pages_per_expert, dtype=self.dtype, schedule=policy.schedule,
            prompt_len=self.mean_prompt,
        )  # fmt: skip
        return timeline.until_tokens, timeline.busy_seconds()


def _cut(total: int, size: int) -> list[int]:
    """Pieces of a size, the last one of what is left."""
    return [size] * (total // size) + ([total % size] if total % size else [])
