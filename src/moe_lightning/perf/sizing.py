"""From a choice to a policy: how a machine's memory is used by it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, floor

from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.cost import DTYPE_BYTES
from moe_lightning.perf.default_policy import Memory
from moe_lightning.perf.memory import MemoryUse, memory_use
from moe_lightning.perf.outlook import Outlook
from moe_lightning.perf.page_size import page_bytes
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.workload import Workload
from moe_lightning.pipeline.shape import layers_on_cpu
from moe_lightning.policy import Policy

BLOCK_SIZE = 16
CHUNK_TOKENS = 2048
MOST_PREFILL = 2**16  # more chunks make schedules that take seconds to build
MOST_SEQS = 2**20
# Sequences that may run, as a multiple of those that fill KV memory at their mean length. While all are young, and
# with the short ones first, more fit. Simulated jobs gained 13 % with a fifth more, and 1 % more with a third.
ROOM = 1.25


@dataclass(frozen=True)
class Choice:
    """What is searched for; memory and workload decide the rest of a policy.

    Attributes:
        ring: streamed layers that the ring of frames holds.
        micro_batches: of decode sequences in a pass.
        prefill: how many times the prompt tokens of a steady pass a pass has room for.
        groups: of decode micro-batches, each with its own sweep over the experts.
        ahead: how far attention is launched ahead of post-attention, in passes over the micro-batches.
        pages: slices of an expert.
        parts: of a layer's experts, each swept as its pages come.
        kv_every: the last of every so many layers keeps its KV on the GPU; 0: none does.
        cpu_every: the last of every so many layers has its experts computed on the CPU; 0: none has.
    """

    ring: float
    micro_batches: int
    prefill: float
    groups: int
    ahead: float
    pages: int
    parts: int
    kv_every: int = 0
    cpu_every: int = 0


@dataclass(frozen=True)
class Problem:
    """What a policy has to fit.

    Attributes:
        spec: the model.
        dtype: of weights, activations and KV.
        memory: what may be used; there is a GPU.
        workload: what is to be computed.
        length: tokens of the longest sequence.
        most_seqs: that may run at once.
        enough: sequences for which KV memory is made at most; more would not be faster.
        expert_bytes: of one weight of an expert; None for the dtype's.
        packed: experts are stored packed.
    """

    spec: ModelSpec
    dtype: str
    memory: Memory
    workload: Workload
    length: int
    most_seqs: int = MOST_SEQS
    enough: int = MOST_SEQS
    expert_bytes: int | None = None
    packed: bool = False

    @cached_property
    def dtype_bytes(self) -> int:
        """Bytes of a number."""
        return DTYPE_BYTES[self.dtype]

    @cached_property
    def blocks_of_longest(self) -> int:
        """KV blocks of the longest sequence."""
        return -(-self.length // BLOCK_SIZE)

    @cached_property
    def mean_blocks(self) -> float:
        """KV blocks that a sequence holds on average: the batcher keeps all of them in use."""
        return self.workload.mean_blocks(BLOCK_SIZE)

    def use(self, policy: Policy) -> MemoryUse:
        """Memory that a policy takes."""
        return memory_use(self.spec, self.dtype_bytes, policy, expert_bytes=self.expert_bytes)

    def outlook(self, policy: Policy, rates: Rates) -> Outlook:
        """What the workload should reach under a policy."""
        return Outlook(self.spec, self.dtype, policy, rates, self.workload)

    def packs(self, cpu_every: int) -> bool:
        """Whether a policy's experts are packed: what the CPU computes with is not, and that may be all."""
        return self.packed and cpu_every != 1

    def page_bytes(self, pages: int) -> int:
        """Bytes of a page where experts are cut into so many."""
        rows = self.spec.experts.intermediate_size // pages
        size = self.expert_bytes or self.dtype_bytes
        return page_bytes(self.spec.hidden_size, rows, size, packed=self.packed)

    def free_frames(self, policy: Policy) -> int:
        """Frames for pages that the GPU has room for beside what a policy without any takes."""
        assert self.memory.gpu is not None
        return (self.memory.gpu - self.use(policy).gpu_bytes) // self.page_bytes(policy.pages_per_expert)

    def free_blocks(self, policy: Policy) -> int:
        """KV blocks that the host has room for beside what a policy without any takes."""
        block = self.spec.kv_bytes_per_token(self.dtype_bytes) * BLOCK_SIZE
        return (self.memory.host - self.use(policy).host_bytes) // block

    def least_blocks(self, num_seqs: int) -> int:
        """KV blocks that so many sequences hold at their mean length, and any one in any case."""
        return max(self.blocks_of_longest, ceil(num_seqs * self.mean_blocks))

    @cached_property
    def seqs_of_all_memory(self) -> int:
        """Sequences whose KV would take all memory: no policy holds more."""
        assert self.memory.gpu is not None
        block = self.spec.kv_bytes_per_token(self.dtype_bytes) * BLOCK_SIZE
        return floor((self.memory.host + self.memory.gpu) / block / self.mean_blocks)

    @property
    def most_blocks(self) -> int:
        """KV blocks that are of use."""
        return min(self.least_blocks(self.enough), self.most_seqs * self.blocks_of_longest)


def largest_policy(problem: Problem, choice: Choice) -> Policy | None:
    """The largest batch that the choice's way of using memory has room for; None if not even one sequence fits."""
    most = most_sequences(problem, choice)
    return sized(problem, choice, most) if most else None


def most_sequences(problem: Problem, choice: Choice) -> int:
    """How many KV memory holds at their mean length under the choice; 0 if not even one fits."""
    least, most = 0, min(problem.most_seqs, problem.enough, problem.seqs_of_all_memory)
    middle = most  # first, as often there is room for all that are of use
    while least < most:  # more sequences need more activations, and those push pages out to the host
        least, most = (middle, most) if sized(problem, choice, middle) else (least, middle - 1)
        middle = (least + most + 1) // 2
    return least


def sized(problem: Problem, choice: Choice, num_seqs: int) -> Policy | None:
    """The policy whose KV memory holds so many sequences at their mean length, if memory holds it.

    More may run while they are short: `ROOM` times as many, but no more than the problem allows.
    """
    draft, least = _draft(problem, choice, num_seqs), problem.least_blocks(num_seqs)
    if choice.kv_every:  # blocks take room of pages, so there are no more of them than are needed
        placed = _with_pages(problem, choice, replace(draft, num_blocks=least))
        if placed is None or problem.use(placed).host_bytes > problem.memory.host:
            return None
        return placed if placed.num_frames else _with_more_blocks(problem, placed)
    placed = _with_pages(problem, choice, draft)
    if placed is None:
        return None
    blocks = problem.free_blocks(placed)
    return replace(placed, num_blocks=min(blocks, problem.most_blocks)) if blocks >= least else None


def _with_more_blocks(problem: Problem, placed: Policy) -> Policy:
    """As many blocks as there is memory left for: no page wants it."""
    assert problem.memory.gpu is not None
    least, most = placed.num_blocks, max(placed.num_blocks, problem.most_blocks)
    while least < most:
        middle = (least + most + 1) // 2
        use = problem.use(replace(placed, num_blocks=middle))
        fits = use.gpu_bytes <= problem.memory.gpu and use.host_bytes <= problem.memory.host
        least, most = (middle, most) if fits else (least, middle - 1)
    return replace(placed, num_blocks=least)


def _draft(problem: Problem, choice: Choice, num_seqs: int) -> Policy:
    """The policy without places for experts and KV."""
    work = problem.workload
    size = ceil(num_seqs / choice.micro_batches)
    count = ceil(num_seqs / size)
    steady = num_seqs * work.mean_prompt / work.mean_answer
    prefill = max(problem.length, min(ceil(choice.prefill * steady), MOST_PREFILL))
    return Policy(
        max_num_seqs=min(ceil(ROOM * num_seqs), problem.most_seqs), micro_batch_size=size,
        group_size=2**16 if choice.groups == 1 else ceil(count / choice.groups),
        look_ahead=ceil(choice.ahead * count), prefill_tokens=prefill, chunk_tokens=min(CHUNK_TOKENS, prefill),
        pages_per_expert=choice.pages, resident_pages=(0,) * problem.spec.num_layers, num_frames=0, num_blocks=0,
        block_size=BLOCK_SIZE, expert_parts=choice.parts, first_part_at_once=choice.parts > 1,
        kv_every=choice.kv_every, cpu_every=choice.cpu_every, packed=problem.packs(choice.cpu_every),
    )  # fmt: skip


def _with_pages(problem: Problem, choice: Choice, draft: Policy) -> Policy | None:
    """The policy with as many resident pages as the GPU holds beside the choice's ring."""
    per_layer, on_cpu = problem.spec.experts.num_experts * choice.pages, layers_on_cpu(draft)
    layers = problem.spec.num_layers - len(on_cpu)
    frames = problem.free_frames(draft)
    if frames < 0:
        return None

    def with_resident(counts: Iterable[int]) -> Policy:
        each = iter(counts)
        resident = (0 if layer in on_cpu else next(each) for layer in range(problem.spec.num_layers))
        return replace(draft, resident_pages=tuple(resident))

    if frames >= per_layer * layers:
        return with_resident([per_layer] * layers)

    def fits(total: int) -> bool:
        return total + num_frames(problem, choice, per_layer - total // layers) <= frames

    if not fits(0):
        return None
    least, most = 0, per_layer * layers - 1
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    placed = with_resident(least // layers + (layer < least % layers) for layer in range(layers))
    return replace(placed, num_frames=num_frames(problem, choice, per_layer - least // layers))


def num_frames(problem: Problem, choice: Choice, streamed: int) -> int:
    """Frames of the choice's ring where a layer streams so many pages; the largest part must fit."""
    largest_part = -(-problem.spec.experts.num_experts // choice.parts) * choice.pages
    return max(ceil(choice.ring * streamed), min(largest_part, streamed))
