"""Generated tokens per second of a whole job, or of the time in which KV memory is full."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moe_lightning.bench.link import plain_copy_rate
from moe_lightning.bench.machine import facts
from moe_lightning.bench.workloads import prompts
from moe_lightning.config import EngineConfig
from moe_lightning.engine.garbage import collect_rarely
from moe_lightning.engine.plan import Plan, make_plan
from moe_lightning.engine.request import Request, SamplingParams
from moe_lightning.errors import ConfigError, NoFeasiblePolicyError
from moe_lightning.hardware.host import available_memory
from moe_lightning.llm import LLM
from moe_lightning.perf.limit import HardwareLimit, hardware_limit
from moe_lightning.perf.workload import Workload

_WARM_UP = 4  # passes: kernels are compiled, clocks rise


@dataclass(frozen=True)
class PassRecord:
    """One pass: what it generated, how many sequences ran in it, and its seconds."""

    seconds: float
    generated: int
    num_running: int
    prompt_tokens: int


@dataclass(frozen=True)
class Throughput:
    """What a run reached.

    Attributes:
        kind: `job` or `steady state`.
        plan: policy and prediction.
        workload: what was computed.
        passes: that count.
        tokens_per_s: generated in their time.
        limit: of this machine, with the link's own rate in this run; None where the model fits on the GPU.
        host_memory: that the limit counts with: what was allowed, or what was free at the start.
        h2d_bytes_per_s: that rate.
        lanes: busy share of each lane in a recorded pass.
        seconds_by_kind: of the tasks of that pass.
        num_preemptions: how often a sequence had to start again.
        load_s: seconds until the first pass could begin.
    """

    kind: str
    plan: Plan
    workload: Workload
    passes: tuple[PassRecord, ...]
    tokens_per_s: float
    limit: HardwareLimit | None
    host_memory: int
    h2d_bytes_per_s: float
    lanes: dict[str, float]
    seconds_by_kind: dict[str, float]
    num_preemptions: int
    load_s: float

    @property
    def share(self) -> float | None:
        """Of the hardware limit."""
        return self.tokens_per_s / self.limit.tokens_per_s if self.limit else None

    def to_json(self, config: EngineConfig) -> dict[str, Any]:
        """Everything, with the machine."""
        prediction = self.plan.prediction
        return facts() | {
            "kind": self.kind, "settings": asdict(config), "workload": asdict(self.workload),
            "policy": asdict(self.plan.policy), "prediction": asdict(prediction) if prediction else None,
            "tokens_per_s": self.tokens_per_s, "share_of_limit": self.share,
            "limit": asdict(self.limit) if self.limit else None,
            "limit_host_memory": self.host_memory,
            "h2d_bytes_per_s": self.h2d_bytes_per_s, "lanes": self.lanes, "seconds_by_kind": self.seconds_by_kind,
            "load_s": self.load_s,
            "num_preemptions": self.num_preemptions, "passes": [asdict(p) for p in self.passes],
        }  # fmt: skip


def measure(
    config: EngineConfig,
    workload: Workload,
    *,
    steady_passes: int | None = None,
    show: Callable[[str], None] = lambda line: None,
) -> Throughput:
    """Run the workload and time each pass.

    Args:
        config: the model and what memory it may use.
        workload: lengths, and how many requests; None for as many as fill KV memory twice.
        steady_passes: measure so many passes that begin with sequences of all ages, instead of a whole job.
        show: told of each pass.

    Raises:
        ConfigError, NoFeasiblePolicyError: the model cannot run as asked.
    """
    start, free = time.perf_counter(), available_memory()
    host_memory = config.host_memory or free
    plan = make_plan(config, workload=workload)
    if workload.longest > plan.max_model_len:
        raise ConfigError(
            f"the workload has sequences of {workload.longest} tokens, and max_model_len={plan.max_model_len}; "
            "raise it, or choose another workload"
        )
    llm = LLM(**(asdict(config) | {"policy": plan.policy, "max_model_len": plan.max_model_len}))
    collect_rarely()
    load_s = time.perf_counter() - start
    show(f"ready after {load_s:.0f} s; {plan.policy.max_num_seqs} sequences, {plan.policy.num_blocks} blocks")
    count = workload.num_requests or 2 * plan.policy.max_num_seqs
    source = _requests(workload, llm.spec.vocab_size)
    if steady_passes:
        _begin_midway(llm, source, workload)
        passes = list(_passes(llm, source, None, _WARM_UP + steady_passes, show))[_WARM_UP:]
    else:
        passes = list(_passes(llm, source, count, None, show))
    tokens_per_s = sum(p.generated for p in passes) / sum(p.seconds for p in passes)
    timeline = llm.fullest_pass
    rate = plain_copy_rate(llm._worker._weights.pages.host[:1].nbytes)
    allowed = config.gpu_memory or torch.cuda.get_device_properties(0).total_memory
    try:
        limit = hardware_limit(llm.spec, llm.dtype.itemsize, allowed, host_memory, rate, workload)
    except NoFeasiblePolicyError:  # all experts fit on the GPU: no link bounds it
        limit = None
    kinds: dict[str, float] = {}
    for task in timeline.records if timeline else ():
        kinds[task.kind.value] = kinds.get(task.kind.value, 0.0) + task.seconds
    lanes = {lane.value: share for lane, share in timeline.utilization().items()} if timeline else {}
    return Throughput(
        "steady state" if steady_passes else "job", plan, workload, tuple(passes), tokens_per_s, limit,
        host_memory, rate, lanes, kinds, llm.engine.num_preemptions, load_s,
    )  # fmt: skip


def to_text(found: Throughput) -> str:
    """A few lines for people."""
    passes, prediction = found.passes, found.plan.prediction
    seconds = statistics.median(p.seconds for p in passes)
    running = statistics.mean(p.num_running for p in passes)
    lines = [
        f"{found.kind}: {found.tokens_per_s:.0f} tokens/s"
        + (
            f", {found.share:.1%} of the hardware limit of {found.limit.tokens_per_s:.0f}"
            if found.limit
            else ""
        ),
        f"{len(passes)} passes, median {seconds:.3f} s, {running:.0f} sequences on average, "
        f"{sum(p.prompt_tokens for p in passes)} prompt tokens, {found.num_preemptions} preemptions",
        "busy in the fullest recorded pass: "
        + ", ".join(f"{lane.upper()} {share:.0%}" for lane, share in found.lanes.items()),
    ]
    kinds = sorted(found.seconds_by_kind.items(), key=lambda item: -item[1])
    lines.append("seconds in it: " + ", ".join(f"{kind} {seconds:.3f}" for kind, seconds in kinds))
    if prediction:
        expected = prediction.tokens_per_s if found.kind == "steady state" else prediction.job_tokens_per_s
        lines.append(
            f"predicted {expected:.0f} tokens/s, a pass of {prediction.pass_s:.3f} s with {prediction.num_seqs} "
            "sequences"
        )
    return "\n".join(lines)


def _requests(workload: Workload, vocab_size: int) -> Iterator[Request]:
    params = SamplingParams(temperature=0, max_tokens=workload.gen_len, ignore_eos=True)
    number = 0
    while True:
        for prompt in prompts(workload, 80 * len(workload.prompt_lens), vocab_size, seed=number):
            yield Request(str(number), tuple(prompt), params)
            number += 1


def _passes(
    llm: LLM,
    source: Iterator[Request],
    count: int | None,
    num_passes: int | None,
    show: Callable[[str], None],
) -> Iterator[PassRecord]:
    """Passes until `count` requests are answered or so many have run."""
    engine, queue = llm.engine, 2 * llm.policy.max_num_seqs
    left, number = count if count is not None else 2**62, 0
    while num_passes is None or number < num_passes:
        while left > 0 and engine.num_waiting < queue:
            engine.add(next(source))
            left -= 1
        if not engine.num_unfinished:
            return
        generated, prompted = engine.num_generated_tokens, engine.num_prompt_tokens
        start = time.perf_counter()
        engine.step()
        record = PassRecord(
            time.perf_counter() - start, engine.num_generated_tokens - generated, engine.num_running,
            engine.num_prompt_tokens - prompted,
        )  # fmt: skip
        number += 1
        show(
            f"pass {number}: {record.seconds:.3f} s, {record.generated} tokens, {record.num_running} running, "
            f"{record.prompt_tokens} prompt tokens, {engine.num_waiting} waiting"
        )
        yield record


def _begin_midway(llm: LLM, source: Iterator[Request], workload: Workload) -> None:
    """Fill KV memory with sequences of evenly spread ages, as if they had been running for long."""
    _fill_kv(llm)
    draw = random.Random(0)
    for number in range(llm.policy.max_num_seqs):
        age = number * workload.gen_len // llm.policy.max_num_seqs
        request = next(source)
        if not llm.engine.adopt(request, [draw.randrange(3, llm.spec.vocab_size) for _ in range(age)]):
            return


def _fill_kv(llm: LLM) -> None:
    """Fill the cache with some weights' numbers: zeros might be faster than what a model computes."""
    arena = llm._worker._kv.arena.tensor.view(-1)
    some = llm._worker._weights.pages.frames[0].cpu()  # a copy by the GPU may not cross pieces locked apart
    for start in range(0, len(arena), len(some)):
        piece = arena[start : start + len(some)]
        piece.copy_(some[: len(piece)])
