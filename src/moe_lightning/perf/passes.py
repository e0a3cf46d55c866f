"""What passes take under a policy: by simulation of some layers, or by the seconds of each lane alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import ceil, lcm
from typing import NamedTuple

from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.cost import PassWork
from moe_lightning.perf.predict import pass_work
from moe_lightning.perf.rates import Rates
from moe_lightning.pipeline import cgopipe
from moe_lightning.pipeline.baselines import SCHEDULES
from moe_lightning.pipeline.shape import cpu_every, kv_every, layers_on_cpu, pass_shape
from moe_lightning.pipeline.simulate import times, until_tokens
from moe_lightning.pipeline.task import Lane, PassShape, Task, TaskKind
from moe_lightning.policy import Policy

# Layers between two simulated passes of which the time of all follows. That errs to the fast side where a lane has
# a head start, such as pages loaded before, that is used up in deeper layers only.
_SHORT = 3
_UNLIKE = 0.1  # of the pages that layers stream on average
ALL_PAGES = 2**30
_PAGE = Task(TaskKind.LOAD_PAGE, Lane.H2D, 0, (), (), ())
_HOST_S, _HOST_SEQ_S = 3e-3, 11e-6  # between two passes, and for each sequence


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
        token_prompt: tokens of the prompt that a token is in, on average; None: prompts are equally long.
    """

    spec: ModelSpec
    dtype: str
    policy: Policy
    rates: Rates
    mean_context: float
    mean_prompt: float
    token_prompt: float | None = None

    def tasks_of_layer(self, decode: int, prefill: int) -> int:
        """Tasks of a layer of a pass, about."""
        shape = self._kind(decode, prefill).shape
        return max(shape.streamed_pages) + 5 * shape.num_micro_batches + 2 * shape.num_parts

    def steady(
        self, decode: int, prefill: int, depth: int = 8, *, most_pages: int = ALL_PAGES
    ) -> tuple[float, dict[str, float]]:
        """Seconds of a pass in the middle of many, and of each lane in it; simulated are `depth` layers at most.

        All of them where that is no more work. Of each layer no more than `most_pages` pages are simulated, each
        standing for several where there are more. No lane of all layers works longer than the pass takes.
        """
        layers = self.spec.num_layers
        # Whole periods of layers that are unlike the others; few sequences hardly attend anywhere. While the CPU
        # computes experts pages of the next layers come, so that the first period is unlike the others too.
        kept, on_cpu = (kv_every(self.policy) if decode > 1 else 0), cpu_every(self.policy)
        period = lcm(kept or 1, on_cpu or 1)
        between = period * ceil(_SHORT / period)
        if kept or on_cpu:
            depth = max(depth, between + (on_cpu or 1))
        long = layers if depth + (depth - between) >= layers else depth
        end, lanes = self._simulated(decode, prefill, long, most_pages)
        if long < layers:
            short = max(1, depth - between)
            end_of_short, lanes_of_short = self._simulated(decode, prefill, short, most_pages)
            more = (layers - long) / (long - short)
            end += (end - end_of_short) * more
            lanes = {lane: lanes[lane] + (lanes[lane] - lanes_of_short[lane]) * more for lane in Lane}
        if self.policy.schedule == "cgopipe":
            whole = self.lane_seconds(decode, prefill)
            lanes[Lane.H2D], end = whole[Lane.H2D], max(end, *whole.values())
        idle = _HOST_S + _HOST_SEQ_S * decode
        return max(lanes[Lane.H2D], end + idle), {lane.value: lanes[lane] for lane in Lane}

    def lane_seconds(self, decode: int, prefill: int) -> dict[Lane, float]:
        """Seconds that each lane works in a pass of CGOPipe's, but for embedding and sampling; worked out once."""
        if (decode, prefill) not in self._lanes:
            self._lanes[decode, prefill] = self._lane_seconds(decode, prefill)
        return dict(self._lanes[decode, prefill])

    @cached_property
    def _lanes(self) -> dict[tuple[int, int], dict[Lane, float]]:
        return {}

    def _lane_seconds(self, decode: int, prefill: int) -> dict[Lane, float]:
        shape, work, seconds = self._kind(decode, prefill)

        def of(kind: TaskKind, lane: Lane, members: Mapping[tuple[int, ...], int]) -> float:
            parts = range(shape.num_parts if kind is TaskKind.EXPERTS else 1)
            return sum(
                count * seconds(Task(kind, lane, 0, each, (), (), part=part))
                for each, count in members.items()
                for part in parts
            )

        chunks = _counted(work, range(shape.num_prefill))
        rows = _counted(work, range(shape.num_prefill, shape.num_micro_batches))
        both, keeping = {**chunks, **rows}, shape.num_keeping_kv
        others, on_cpu, groups = shape.num_layers - keeping, shape.num_on_cpu, dict.fromkeys(shape.groups, 1)
        gpu = (
            of(TaskKind.PRE_ATTENTION, Lane.GPU, both)
            + of(TaskKind.PREFILL_ATTENTION, Lane.GPU, chunks)
            + of(TaskKind.POST_ATTENTION, Lane.GPU, both)
        )
        swept = of(TaskKind.EXPERTS, Lane.GPU, groups) if on_cpu < shape.num_layers else 0.0
        kept = of(TaskKind.RESIDENT_ATTENTION, Lane.GPU, rows) + of(TaskKind.KEEP_KV, Lane.GPU, chunks)
        d2h = of(TaskKind.OFFLOAD_QKV, Lane.D2H, rows) + of(TaskKind.STORE_KV, Lane.D2H, chunks)
        found = {
            Lane.GPU: shape.num_layers * gpu + (shape.num_layers - on_cpu) * swept + keeping * kept,
            Lane.D2H: others * d2h,
            Lane.CPU: others * of(TaskKind.ATTENTION, Lane.CPU, rows),
            Lane.BACK: others * of(TaskKind.LOAD_HIDDEN, Lane.BACK, rows),
            Lane.H2D: sum(shape.streamed_pages) * seconds(_PAGE),
        }
        if on_cpu:
            found[Lane.D2H] += on_cpu * of(TaskKind.OFFLOAD_INPUTS, Lane.D2H, groups)
            found[Lane.CPU] += on_cpu * of(TaskKind.CPU_EXPERTS, Lane.CPU, groups)
            found[Lane.BACK] += on_cpu * of(TaskKind.ADD_OUTPUTS, Lane.BACK, groups)
        return found

    def _simulated(
        self, decode: int, prefill: int, layers: int, most_pages: int
    ) -> tuple[float, dict[Lane, float]]:
        """Seconds until the last token of a pass of fewer layers, and those that each lane works."""
        whole, _, seconds = self._kind(decode, prefill)
        shape = _with_fewer_pages(self._shape(whole.num_prefill, whole.num_decode, layers), most_pages)
        # As each simulated page stands for several, or for a share where layers are unlike.
        streaming = layers - shape.num_on_cpu
        page_s = seconds(_PAGE) * self._streamed_of_layer * streaming / max(sum(shape.streamed_pages), 1)

        def timed(task: Task) -> float:
            return page_s if task.kind is TaskKind.LOAD_PAGE else seconds(task)

        if self.policy.schedule == "cgopipe":
            return until_tokens(_launched(shape), timed)
        schedule = SCHEDULES[self.policy.schedule](shape)
        starts, ends = times(schedule, timed)
        last, lanes = 0.0, dict.fromkeys(Lane, 0.0)
        for task, start, end in zip(schedule.tasks, starts, ends, strict=True):
            lanes[task.lane] += end - start
            if task.lane is not Lane.H2D:
                last = max(last, end)
        return last or max(ends), lanes

    @cached_property
    def _pages_of_layer(self) -> int:
        return self.spec.experts.num_experts * self.policy.pages_per_expert

    @cached_property
    def _streamed_of_layer(self) -> float:
        """Pages, on average over the layers whose experts are not on the CPU."""
        streaming = self.spec.num_layers - len(layers_on_cpu(self.policy))
        return self._pages_of_layer - sum(self.policy.resident_pages) / max(streaming, 1)

    @cached_property
    def _alike(self) -> Policy:
        """The policy with as many pages streamed in each layer, for where the first ones are unlike the others."""
        resident = self._pages_of_layer - ceil(self._streamed_of_layer)
        on_cpu = layers_on_cpu(self.policy)
        layers = range(self.spec.num_layers)
        return replace(
            self.policy, resident_pages=tuple(0 if layer in on_cpu else resident for layer in layers)
        )

    def _kind(self, decode: int, prefill: int) -> _Kind:
        """Passes of so many sequences and prompt tokens; worked out once."""
        if (decode, prefill) not in self._kinds:
            policy = self.policy
            chunks, groups = _cut(prefill, policy.chunk_tokens), _cut(decode, policy.micro_batch_size)
            shape = self._shape(len(chunks), len(groups), self.spec.num_layers)
            work = pass_work(
                self.spec, shape, chunks + groups, self.mean_context, pages_per_expert=policy.pages_per_expert,
                dtype=self.dtype, prompt_len=self.mean_prompt, token_prompt=self.token_prompt,
                packed=policy.packed,
            )  # fmt: skip
            self._kinds[decode, prefill] = _Kind(shape, work, _remembered(self.rates.seconds(work), work))
        return self._kinds[decode, prefill]

    @cached_property
    def _kinds(self) -> dict[tuple[int, int], _Kind]:
        return {}

    def _shape(self, num_prefill: int, num_decode: int, layers: int) -> PassShape:
        """Of the first layers; where these stream more or less than others by much, as if all were alike."""

        def of(policy: Policy) -> PassShape:
            num_experts = self.spec.experts.num_experts
            return pass_shape(policy, num_experts, num_prefill, num_decode, num_layers=layers)

        shape = of(self.policy)
        if layers == self.spec.num_layers:
            return shape
        usual = self._streamed_of_layer * (layers - shape.num_on_cpu)
        return shape if abs(sum(shape.streamed_pages) - usual) <= _UNLIKE * usual else of(self._alike)


class _Kind(NamedTuple):
    """Passes of all layers with so many sequences and prompt tokens: what each of their tasks takes."""

    shape: PassShape
    work: PassWork
    seconds: Callable[[Task], float]


@lru_cache(maxsize=32)
def _launched(shape: PassShape) -> tuple[Task, ...]:
    """A pass's tasks: those of a policy are asked for again at other rates."""
    return cgopipe.launched(shape).tasks()


def _with_fewer_pages(shape: PassShape, most: int) -> PassShape:
    """About the same pass, no layer of which streams more than so many pages, each standing for several."""
    several = max(shape.streamed_pages) / most
    if several <= 1:
        return shape
    streamed, parts = (
        tuple(ceil(pages / several) for pages in some) for some in (shape.streamed_pages, shape.part_pages)
    )
    fewer = replace(
        shape, streamed_pages=streamed, part_pages=parts, num_frames=round(shape.num_frames / several)
    )
    return replace(fewer, num_frames=max(fewer.num_frames, fewer.least_frames))


def _remembered(seconds: Callable[[Task], float], work: PassWork) -> Callable[[Task], float]:
    """Asks once for tasks that differ in their layer, page or like micro-batch alone."""
    known: dict[tuple[TaskKind, tuple[int, ...], int], float] = {}
    # Micro-batches whose sweeps unpack pages are like no other.
    unpacks = [(j == 0, j == work.unpacked_for) for j in range(len(work.tokens))]
    sizes = list(zip(work.tokens, work.context_tokens, work.sampled_rows, unpacks, strict=True))
    # Of like micro-batches, the first.
    firsts = {size: j for j, size in reversed(list(enumerate(sizes)))}
    like: dict[tuple[int, ...], tuple[int, ...]] = {(j,): (firsts[size],) for j, size in enumerate(sizes)}

    def of(task: Task) -> float:
        members = task.micro_batches
        key = task.kind, like.get(members, members), task.part
        found = known.get(key)
        if found is None:
            found = known[key] = seconds(task)
        return found

    return of


def _counted(work: PassWork, micro_batches: Iterable[int]) -> dict[tuple[int, ...], int]:
    """The first of those that are alike, alone, and how many there are of it."""
    firsts: dict[tuple[int, int, int], int] = {}
    counts: Counter[tuple[int, ...]] = Counter()
    for j in micro_batches:
        size = work.tokens[j], work.context_tokens[j], work.sampled_rows[j]
        counts[(firsts.setdefault(size, j),)] += 1
    return counts


def _cut(total: int, size: int) -> list[int]:
    """Pieces of a size, the last one of what is left."""
    return [size] * (total // size) + ([total % size] if total % size else [])
