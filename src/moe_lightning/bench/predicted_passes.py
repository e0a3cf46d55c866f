"""How long the passes that are measured should take."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lightning.bench.passes import PassRecord
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.predict import predict
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.workload import Workload
from moe_lightning.pipeline.task import Lane, PassShape
from moe_lightning.policy import Policy


@dataclass(frozen=True)
class PredictedPasses:
    """Seconds of whole passes under a policy, by the simulation of all their layers."""

    spec: ModelSpec
    dtype: str
    policy: Policy
    rates: Rates
    work: Workload

    def seconds(self, decode: int, prefill: int, context: float) -> float:
        """Of a pass of so many sequences and prompt tokens."""
        policy, spec = self.policy, self.spec
        chunks, groups = _cut(prefill, policy.chunk_tokens), _cut(decode, policy.micro_batch_size)
        pages = spec.experts.num_experts * policy.pages_per_expert
        streamed = tuple(pages - resident for resident in policy.resident_pages)
        shape = PassShape(
            spec.num_layers, len(chunks), len(groups), policy.group_size, policy.look_ahead, streamed,
            policy.num_frames, preloaded=policy.num_frames > max(streamed),
        )  # fmt: skip
        timeline = predict(
            spec, shape, chunks + groups, context, self.rates, pages_per_expert=policy.pages_per_expert,
            dtype=self.dtype, schedule=policy.schedule, prompt_len=self.work.mean_prompt,
        )  # fmt: skip
        end = max((r.end for r in timeline.records if r.lane is not Lane.H2D), default=timeline.end)
        return max(end - timeline.start, timeline.busy_seconds()[Lane.H2D])

    def alike(self, ramp: PassRecord) -> float:
        """Of a pass like this one, in which each new sequence and each that decodes got a token."""
        new = round(ramp.prompt_tokens / self.work.mean_prompt)
        return self.seconds(max(0, ramp.generated - new), ramp.prompt_tokens, self.work.mean_prompt + 1)


def _cut(total: int, size: int) -> list[int]:
    return [size] * (total // size) + ([total % size] if total % size else [])
