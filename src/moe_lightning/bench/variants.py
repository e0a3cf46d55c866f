"""The ways to run a model that the paper compares, as policies of this engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, floor

from moe_lightning.errors import NoFeasiblePolicyError
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.default_policy import pages_per_expert
from moe_lightning.perf.paper_model import PaperMachine, PaperPlan, PaperWorkload, plan_paper
from moe_lightning.perf.sizing import BLOCK_SIZE, CHUNK_TOKENS, MOST_PREFILL, Problem
from moe_lightning.perf.workload import Workload
from moe_lightning.policy import Policy

_LOOK_AHEAD = 2  # of Algorithm 1
_ROUNDS = 16
_RING = 2  # layers: the paper keeps one for the GPU and one for the link


@dataclass(frozen=True)
class Variant:
    """One way to run.

    Attributes:
        name: short.
        what: in words.
        schedule: the builder's name.
        is_paper: micro-batches, residency and batch of the paper's planner; else ours.
        is_grouped: one sweep over a layer's experts for all micro-batches; else one for each.
        in_batches: nobody is admitted before all have ended.
        packs: experts are packed if our planner packs them; else they are as they are.
    """

    name: str
    what: str
    schedule: str
    is_paper: bool = True
    is_grouped: bool = False
    in_batches: bool = True
    packs: bool = False


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("paper", "CGOPipe as in the paper, batch after batch", "cgopipe"),
        Variant("whole_layer", "the paper's, but weights copied layer by layer", "whole_layer"),
        Variant("flexgen_cpu", "FlexGen with attention on the CPU", "flexgen_cpu"),
        Variant("flexgen", "FlexGen with attention on the GPU", "flexgen"),
        Variant("no_overlap", "one task after the other", "no_overlap"),
        Variant("continuous", "the paper's with continuous admission", "cgopipe", in_batches=False),
        Variant(
            "grouped", "and one sweep over the experts a pass", "cgopipe", is_grouped=True, in_batches=False
        ),
        Variant(
            "plain", "and our planner's policy, experts not packed", "cgopipe",
            is_paper=False, is_grouped=True, in_batches=False,
        ),
        # The last one: host memory is brought in anew for pages of another size.
        Variant(
            "plan", "and packed experts", "cgopipe",
            is_paper=False, is_grouped=True, in_batches=False, packs=True,
        ),
    )
}  # fmt: skip


def policy_of(variant: Variant, ours: Policy, problem: Problem, paper: PaperPlan) -> Policy:
    """The policy of a variant.

    Args:
        variant: which.
        ours: our planner's, which may pack experts or may not, as the variant says.
        problem: what it has to fit.
        paper: the plan of the paper's planner.

    Raises:
        NoFeasiblePolicyError: it does not fit in memory.
    """
    if not variant.is_paper:
        return replace(ours, schedule=variant.schedule)
    policy = _Sizes(problem, variant.in_batches).policy(paper, variant.schedule)
    return replace(policy, group_size=2**16) if variant.is_grouped else policy


def paper_plan(spec: ModelSpec, machine: PaperMachine, work: Workload) -> PaperPlan:
    """What the paper's planner chooses for prompts and answers of the mean lengths.

    Raises:
        NoFeasiblePolicyError: nothing fits.
    """
    return plan_paper(spec, machine, PaperWorkload(max(1, round(work.mean_prompt)), max(2, work.gen_len)))


@dataclass(frozen=True)
class _Sizes:
    problem: Problem
    in_batches: bool

    def policy(self, paper: PaperPlan, schedule: str) -> Policy:
        """The paper's plan in pages and blocks; what does not fit beside the engine's buffers is left out."""
        spec, work = self.problem.spec, self.problem.workload
        pages = pages_per_expert(spec, self.problem.dtype_bytes)
        # In a batch all are long at once; where others take the place of those that end, more have room.
        grows = 1.0 if self.in_batches else (work.mean_prompt + work.gen_len) / work.mean_context
        num_seqs = round(paper.ubs * paper.n_ub * grows)
        # A batch's prompts go through the layers at once; else twice what comes with each pass has room.
        prompts = num_seqs * work.mean_prompt * (1 if self.in_batches else 2 / work.gen_len)
        prefill = max(work.longest, min(MOST_PREFILL, ceil(prompts)))
        policy = Policy(
            max_num_seqs=num_seqs, micro_batch_size=paper.ubs, group_size=1, look_ahead=_LOOK_AHEAD,
            prefill_tokens=prefill, chunk_tokens=min(CHUNK_TOKENS, prefill), pages_per_expert=pages,
            resident_pages=(0,) * spec.num_layers, num_frames=0, num_blocks=1, block_size=BLOCK_SIZE,
            schedule=schedule,
        )  # fmt: skip
        wanted = floor(paper.wg * spec.experts.num_experts * pages)
        start = policy
        for _ in range(
            _ROUNDS
        ):  # pages that stay on the GPU leave room for KV, and sequences need room there
            sized = self._with_blocks(replace(start, resident_pages=policy.resident_pages))
            policy = self._with_frames(sized, wanted)
            if policy.resident_pages == sized.resident_pages:
                return policy
        raise NoFeasiblePolicyError(
            f"schedule {schedule} of the paper's planner finds no number of sequences that both memories hold",
            "Change gpu_memory or host_memory a little",
        )

    def _with_frames(self, policy: Policy, wanted: int) -> Policy:
        """As many resident pages of each layer as wanted, if the ring then still holds a layer."""
        spec = self.problem.spec
        per_layer = spec.experts.num_experts * policy.pages_per_expert
        frames = self.problem.free_frames(
            replace(policy, resident_pages=(0,) * spec.num_layers, num_frames=0)
        )
        for resident in range(min(wanted, per_layer), -1, -1):
            streamed, ring = per_layer - resident, frames - resident * spec.num_layers
            if ring >= streamed:
                return replace(
                    policy,
                    resident_pages=(resident,) * spec.num_layers,
                    num_frames=min(ring, _RING * streamed),
                )
        raise NoFeasiblePolicyError(
            f"schedule {policy.schedule} of the paper's planner with {policy.max_num_seqs} sequences leaves "
            f"{max(frames, 0)} frames, and a layer has {per_layer} pages; raise gpu_memory"
        )

    def _with_blocks(self, policy: Policy) -> Policy:
        """KV blocks in what host memory is left, and no more sequences than have room in them."""
        work = self.problem.workload
        at_end = [ceil((prompt + work.gen_len) / policy.block_size) for prompt in work.prompt_lens]
        free = self.problem.free_blocks(replace(policy, num_blocks=0))
        blocks = min(free, policy.max_num_seqs * max(at_end))
        held = sum(at_end) / len(at_end) if self.in_batches else self.problem.mean_blocks
        num_seqs = min(policy.max_num_seqs, floor(blocks / held))
        if blocks < max(at_end) or num_seqs < 1:
            raise NoFeasiblePolicyError(
                f"the paper's plan leaves room for {max(blocks, 0)} KV blocks, and a sequence of {work.longest} "
                f"tokens needs {max(at_end)}; raise host_memory"
            )
        size = min(policy.micro_batch_size, num_seqs)
        return replace(policy, max_num_seqs=num_seqs, num_blocks=blocks, micro_batch_size=size)
