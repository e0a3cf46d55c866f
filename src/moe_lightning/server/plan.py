"""The plan that a server runs: for requests as they are said to be, or as they often are."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lightning.config import EngineConfig
from moe_lightning.engine.plan import Plan, make_plan
from moe_lightning.errors import NoFeasiblePolicyError
from moe_lightning.models import registry
from moe_lightning.perf.workload import Workload
from moe_lightning.pipeline.shape import cpu_every

_PROMPT, _ANSWER = 512, 256  # tokens, where nothing is said: chats and questions, more than a few words
_LONGEST = 32_768  # tokens of the longest request, where nothing is said; less where memory holds less
_SHORTEST = 2048  # below that, what does not fit is said
_USUAL = 4  # times as long as what is usual: the longest request, where lengths are said


@dataclass(frozen=True)
class Expected:
    """What requests are expected to be, in tokens.

    Attributes:
        prompt: of a usual prompt.
        answer: of a usual answer.
        longest: prompt and answer of the longest that is taken.
    """

    prompt: int
    answer: int
    longest: int

    @classmethod
    def of(cls, prompt: int | None, answer: int | None) -> Expected:
        """From what was said; both lengths or none."""
        if prompt is None or answer is None:
            return cls(_PROMPT, _ANSWER, _LONGEST)
        return cls(prompt, answer, _USUAL * (prompt + answer))


def plan_to_serve(config: EngineConfig, expected: Expected) -> Plan:
    """The plan that should be fastest for such requests; only on a GPU is one searched for.

    Requests may be shorter than expected where memory does not hold the longest: the plan says how long.

    Raises:
        ConfigError, UnsupportedModelError, NoFeasiblePolicyError: the model cannot run as asked.
    """
    spec = registry.resolve(config.model)
    workload = Workload((expected.prompt,), expected.answer)
    longest = max(workload.longest, min(expected.longest, spec.max_position))
    while True:
        try:
            return make_plan(config, workload=workload, longest=longest, spec=spec)
        except NoFeasiblePolicyError:
            if config.max_model_len or longest <= max(_SHORTEST, workload.longest):
                raise
            longest = max(longest // 2, workload.longest)


def describe(plan: Plan, expected: Expected) -> str:
    """The plan in a line or two, for people."""
    policy, found = plan.policy, plan.prediction
    shares = sum(policy.resident_pages) / max(
        1, plan.spec.num_layers * plan.spec.experts.num_experts * policy.pages_per_expert
    )
    num_seqs = found.num_seqs if found else policy.max_num_seqs
    more = f" ({policy.max_num_seqs:,} while they are short)" if policy.max_num_seqs > num_seqs else ""
    every = cpu_every(policy)
    on_cpu = f", those of one layer in {every} on the CPU" if every else ""
    text = (
        f"the plan is for prompts of {expected.prompt} and answers of {expected.answer} tokens, up to "
        f"{plan.max_model_len:,} together: {num_seqs:,} sequences at once{more} in micro-batches of "
        f"{policy.micro_batch_size}, {shares:.0%} of the experts on the GPU{on_cpu}"
    )
    if found is None:
        return text
    return f"{text}; {found.tokens_per_s:,.0f} tokens/s and {found.pass_s:.2f} s a pass while memory is full"
