"""Generated tokens per second of a whole job, and of the time in which KV memory is full."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch

from moe_lightning.bench.lanes import Lanes, summarize
from moe_lightning.bench.link import plain_copy_rate
from moe_lightning.bench.machine import seconds_since_start
from moe_lightning.bench.passes import (
    PassRecord,
    Show,
    Source,
    begin_midway,
    run_passes,
    show_nothing,
)
from moe_lightning.bench.peaks import Peaks, PeakWatch
from moe_lightning.bench.session import Loaded, Session
from moe_lightning.config import EngineConfig
from moe_lightning.engine.plan import Plan
from moe_lightning.errors import ConfigError, NoFeasiblePolicyError
from moe_lightning.perf.limit import HardwareLimit, hardware_limit
from moe_lightning.perf.workload import Workload
from moe_lightning.pipeline.timeline import Timeline
from moe_lightning.verify import Verification, check, from_memory

_WARM_UP = 4  # passes: kernels are compiled, clocks rise
_RECORDED = 2  # passes after those that are measured: recording takes time
_FULL = 0.97  # of the most sequences: a pass of a job that counts as one of its steady state


@dataclass(frozen=True)
class Effort:
    """What is measured.

    Attributes:
        steady_passes: after a beginning with sequences of all ages; 0 for none.
        is_job: a whole job, from empty to empty.
        num_checked: answers that are recomputed by plain PyTorch.
        copy_s: seconds of plain copies.
    """

    steady_passes: int = 0
    is_job: bool = True
    num_checked: int = 0
    copy_s: float = 1.0


@dataclass(frozen=True)
class Measured:
    """What a run reached.

    Attributes:
        kind: `steady state` or `job`.
        passes: that count.
        predicted_tokens_per_s: what the plan says; None if it says nothing.
        lanes: in recorded passes; None if none was.
        num_preemptions: how often a sequence had to start again.
        first_pass_s: from the process's start to the first pass.
        check: answers against plain PyTorch; None if none was asked for.
        timelines: of the recorded passes.
    """

    kind: str
    passes: tuple[PassRecord, ...]
    predicted_tokens_per_s: float | None
    lanes: Lanes | None
    num_preemptions: int
    first_pass_s: float
    check: Verification | None = None
    timelines: tuple[Timeline, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """Generated, prompts included."""
        return _rate(self.passes)

    @property
    def full_tokens_per_s(self) -> float:
        """While as many sequences run as ever: of a job, what its steady state should reach."""
        most = max(p.num_running for p in self.passes)
        return _rate(tuple(p for p in self.passes if p.num_running >= _FULL * most))


@dataclass(frozen=True)
class Cell:
    """One way to run one workload.

    Attributes:
        plan: policy and prediction.
        workload: what was computed.
        gpu_memory: bytes allowed; None for all.
        measured: of each kind.
        limit: of this machine, with the link's own rate in this run; None where the model fits on the GPU.
        limit_host_memory: that it counts with.
        plain_copy: bytes/s of copies of pages with nothing beside them, in this run.
        peaks: of memory.
        ready_s: seconds in which weights came into place.
    """

    plan: Plan
    workload: Workload
    gpu_memory: int | None
    measured: tuple[Measured, ...]
    limit: HardwareLimit | None
    limit_host_memory: int
    plain_copy: float
    peaks: Peaks
    ready_s: float

    @property
    def agreement(self) -> float | None:
        """The job's rate while memory is full, over the steady state's; None unless both were measured."""
        found = {m.kind: m for m in self.measured}
        if len(found) < 2:
            return None
        return found["job"].full_tokens_per_s / found["steady state"].tokens_per_s


def measure(
    config: EngineConfig, workload: Workload, effort: Effort, session: Session, show: Show = show_nothing
) -> Cell:
    """Plan, load, run the workload and time each pass.

    Args:
        config: the model and what memory it may use.
        workload: lengths, and how many requests; None for as many as fill KV memory twice.
        effort: what of it.
        session: where it is loaded; what it had loaded is gone.
        show: told of each pass.

    Raises:
        ConfigError, NoFeasiblePolicyError: the model cannot run as asked.
    """
    watch = PeakWatch(session.host_before)
    plan = session.plan(workload, config)
    if workload.longest > plan.max_model_len:
        raise ConfigError(
            f"the workload has sequences of {workload.longest} tokens, and max_model_len={plan.max_model_len}; "
            "raise it, or choose another workload"
        )
    loaded = session.load(plan, config.gpu_memory)
    policy = plan.policy
    show(f"ready after {loaded.ready_s:.0f} s; {policy.max_num_seqs} sequences, {policy.num_blocks} blocks")
    runs = []
    if effort.steady_passes:
        session.fill_kv(loaded)
        runs.append(_steady(loaded, workload, effort, watch, show))
    if effort.is_job:
        runs.append(_job(loaded, workload, effort, show))
    peaks = watch.peaks(config.gpu_memory, session.planned_host_bytes(plan))
    has_gpu = plan.device.type == "cuda"
    if has_gpu:  # the engine has taken all that it was allowed; what follows is not the engine
        torch.cuda.set_per_process_memory_fraction(1.0, plan.device)
    measured = [replace(m, check=_check(loaded, source, effort)) for m, source in runs]
    rate = plain_copy_rate(page_bytes(loaded), effort.copy_s, has_gpu=has_gpu)
    host_memory = config.host_memory or session.limit_host_memory
    limit = _limit(plan, config.gpu_memory, host_memory, rate, workload)
    return Cell(
        plan, workload, config.gpu_memory, tuple(measured), limit, host_memory, rate, peaks, loaded.ready_s
    )


def _steady(
    loaded: Loaded, workload: Workload, effort: Effort, watch: PeakWatch, show: Show
) -> tuple[Measured, Source]:
    plan, engine = loaded.plan, loaded.engine()
    n = plan.policy.max_num_seqs
    # Of the requests that come in during the first passes, some are checked.
    new = range(n, n + max(2 * n // workload.gen_len, effort.num_checked))
    source = Source(workload, plan.spec.vocab_size, _sample(new, effort))
    requests = iter(source)
    begin_midway(engine, requests, n, workload.gen_len, plan.spec.vocab_size)
    timelines, kv_bytes = list[Timeline](), list[int]()

    def run(count: int) -> list[PassRecord]:
        found = list(run_passes(engine, requests, source, 2 * n, num_passes=count, show=show))
        watch.look()
        return found

    started = seconds_since_start()
    run(_WARM_UP)
    passes = run(effort.steady_passes)
    for _ in range(_RECORDED):
        loaded.worker.record_next()
        kv_bytes.append(engine.num_held_tokens * plan.spec.kv_bytes_per_token(plan.dtype.itemsize))
        run(1)
        if loaded.worker.fullest_pass:
            timelines.append(loaded.worker.fullest_pass)
    source.keep([output for number in source.scored if (output := engine.abort(str(number)))])
    prediction = plan.prediction
    found = Measured(
        "steady state", tuple(passes), prediction.tokens_per_s if prediction else None,
        summarize(timelines, page_bytes(loaded), kv_bytes, prediction.lane_s if prediction else None),
        engine.num_preemptions, started, timelines=tuple(timelines),
    )  # fmt: skip
    return found, source


def _job(loaded: Loaded, workload: Workload, effort: Effort, show: Show) -> tuple[Measured, Source]:
    plan, engine = loaded.plan, loaded.engine()
    n = plan.policy.max_num_seqs
    count = workload.num_requests or 2 * n
    source = Source(workload, plan.spec.vocab_size, _sample(range(count), effort))
    started = seconds_since_start()
    loaded.worker.record_next()  # and from then on those that are as full as the fullest, now and then
    passes = list(run_passes(engine, iter(source), source, 2 * n, count=count, show=show))
    timelines = [loaded.worker.fullest_pass] if loaded.worker.fullest_pass else []
    prediction = plan.prediction
    found = Measured(
        "job", tuple(passes), prediction.job_tokens_per_s if prediction else None,
        summarize(timelines, page_bytes(loaded), (), prediction.lane_s if prediction else None),
        engine.num_preemptions, started, timelines=tuple(timelines),
    )  # fmt: skip
    return found, source


def _sample(numbers: range, effort: Effort) -> tuple[int, ...]:
    return tuple(random.Random(1).sample(numbers, min(effort.num_checked, len(numbers))))


def _check(loaded: Loaded, source: Source, effort: Effort) -> Verification | None:
    """Answers of the run against plain PyTorch over the same weights; where there is a GPU, on it."""
    if not effort.num_checked:
        return None
    plan = loaded.plan
    outputs = [source.outputs[key] for key in sorted(source.outputs, key=int)]
    found = check(outputs, plan.spec, from_memory(loaded.worker.weights), plan.dtype, plan.device)
    return Verification(tuple(found), plan.dtype)


def _limit(
    plan: Plan, gpu_memory: int | None, host_memory: int, rate: float, workload: Workload
) -> HardwareLimit | None:
    if gpu_memory is None:
        if plan.device.type == "cpu":
            return None
        gpu_memory = torch.cuda.get_device_properties(plan.device).total_memory
    try:
        return hardware_limit(plan.spec, plan.dtype.itemsize, gpu_memory, host_memory, rate, workload)
    except NoFeasiblePolicyError:  # all experts fit on the GPU: no link bounds it
        return None


def page_bytes(loaded: Loaded) -> int:
    """Of one page."""
    frames = loaded.worker.weights.pages.frames
    return frames[:1].nbytes


def _rate(passes: tuple[PassRecord, ...]) -> float:
    return sum(p.generated for p in passes) / sum(p.seconds for p in passes)
