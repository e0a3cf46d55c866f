"""Generated tokens per second of a whole job, and of the time in which KV memory is full."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from moe_lightning.bench.cell import Cell, Effort, Measured
from moe_lightning.bench.lanes import peaks_of, summarize
from moe_lightning.bench.machine import seconds_since_start
from moe_lightning.bench.passes import (
    PassRecord,
    Show,
    Source,
    begin_midway,
    run_passes,
    show_nothing,
)
from moe_lightning.bench.peaks import PeakWatch
from moe_lightning.bench.plain_rates import READ_BYTES, plain_copy_rate, read_rate
from moe_lightning.bench.session import Loaded, Session
from moe_lightning.config import EngineConfig
from moe_lightning.engine.engine import Engine
from moe_lightning.engine.plan import Plan
from moe_lightning.engine.worker import RecordedPass, cpu_lane_threads
from moe_lightning.errors import ConfigError, DeviceError, NoFeasiblePolicyError
from moe_lightning.kernels.cpu_kernels import CpuKernels
from moe_lightning.perf.limit import HardwareLimit, hardware_limit
from moe_lightning.perf.workload import Workload, num_decoding
from moe_lightning.verify import Verification, check, from_memory

_WARM_UP = 4  # passes: kernels are compiled, clocks rise
_RECORD_EVERY = 16  # passes of a job
_RECORDED = 3  # passes among those that are measured and none of them: recording takes time


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
    plan = session.plan(workload, config)
    if workload.longest > plan.max_model_len:
        raise ConfigError(
            f"the workload has sequences of {workload.longest} tokens, and max_model_len={plan.max_model_len}; "
            "raise it, or choose another workload"
        )
    return measure_plan(plan, config, workload, effort, session, show)


def measure_plan(
    plan: Plan,
    config: EngineConfig,
    workload: Workload,
    effort: Effort,
    session: Session,
    show: Show = show_nothing,
) -> Cell:
    """As `measure`, under a plan that is given.

    Raises:
        DeviceError: the GPU cannot hold it.
    """
    watch = session.watch()
    loaded = session.load(plan, config.gpu_memory)
    num_seqs, blocks = num_decoding(plan.policy, workload), plan.policy.num_blocks
    show(f"ready after {loaded.ready_s:.0f} s; {num_seqs} sequences, {blocks} blocks")
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
    with session.between_engines():
        measured = [replace(m, check=_check(loaded, source, effort)) for m, source in runs]
        rate = plain_copy_rate(page_bytes(loaded), effort.copy_s, has_gpu=has_gpu)
        read = _plain_read_rate(loaded, effort.copy_s)
    host_memory = config.host_memory or session.limit_host_memory
    limit = _limit(plan, config.gpu_memory, host_memory, rate, workload)
    return Cell(
        plan,
        workload,
        config.gpu_memory,
        tuple(measured),
        limit,
        host_memory,
        rate,
        read,
        peaks,
        loaded.ready_s,
    )


def _steady(
    loaded: Loaded, workload: Workload, effort: Effort, watch: PeakWatch, show: Show
) -> tuple[Measured, Source]:
    plan, engine = loaded.plan, loaded.engine()
    n = num_decoding(plan.policy, workload)
    # Of the requests that come in during the first passes, some are checked.
    new = range(n, n + max(2 * n // workload.gen_len, effort.num_checked))
    source = Source(workload, plan.spec.vocab_size, _sample(new, effort))
    begin_midway(engine, source, n)
    requests = iter(source)
    recorded = list[RecordedPass]()

    def run(count: int) -> list[PassRecord]:
        found = list(run_passes(engine, requests, source, 2 * n, num_passes=count, show=show))
        watch.look()
        return found

    started = seconds_since_start()
    loaded.worker.records_fullest = False  # recording takes time
    run(_WARM_UP)
    passes = list[PassRecord]()
    for number in range(_RECORDED):  # all over the time, as passes differ from one second to the next
        passes += run((number + 1) * effort.steady_passes // _RECORDED - len(passes))
        loaded.worker.record_next = True
        run(1)
        recorded += [loaded.worker.recorded] if loaded.worker.recorded else []
    check_all_fitted(engine)
    source.keep([output for number in source.scored if (output := engine.abort(str(number)))])
    prediction = plan.prediction
    measured = Measured(
        "steady state", tuple(passes), n, prediction.tokens_per_s if prediction else None,
        summarize(recorded, page_bytes(loaded), prediction.lane_s if prediction else None, peaks_of(plan.rates)),
        engine.num_preemptions, started, timelines=tuple(one.timeline() for one in recorded),
    )  # fmt: skip
    return measured, source


def _job(loaded: Loaded, workload: Workload, effort: Effort, show: Show) -> tuple[Measured, Source]:
    plan, engine = loaded.plan, loaded.engine()
    n = num_decoding(plan.policy, workload)
    count = workload.num_requests or 2 * n
    source = Source(workload, plan.spec.vocab_size, _sample(range(count), effort))
    started = seconds_since_start()
    loaded.worker.records_fullest = False
    passes, typical = list[PassRecord](), list[RecordedPass]()

    def off(recorded: RecordedPass) -> int:
        return abs(recorded.facts.num_decode - n)

    for record in run_passes(engine, iter(source), source, 2 * n, count=count, show=show):
        passes.append(record)
        found = loaded.worker.recorded
        if found and (not typical or off(found) <= off(typical[0])):
            typical = [found]
        loaded.worker.record_next = len(passes) % _RECORD_EVERY == 1
    check_all_fitted(engine)
    prediction = plan.prediction
    measured = Measured(
        "job", tuple(passes), n, prediction.job_tokens_per_s if prediction else None,
        # What is predicted is a pass of the steady state.
        summarize(typical, page_bytes(loaded), None, peaks_of(plan.rates)),
        engine.num_preemptions, started, timelines=tuple(one.timeline() for one in typical),
    )  # fmt: skip
    return measured, source


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


def _plain_read_rate(loaded: Loaded, seconds: float) -> float | None:
    kv = loaded.worker.kv.arena.tensor.view(-1).view(torch.uint8)
    kernel = CpuKernels(cpu_lane_threads(loaded.plan.device))
    # Of less memory caches hold much, and what a call itself takes counts.
    return read_rate(kernel, kv, seconds, READ_BYTES) if kv.nbytes >= 3 * READ_BYTES else None


def _limit(
    plan: Plan, gpu_memory: int | None, host_memory: int, rate: float, workload: Workload
) -> HardwareLimit | None:
    if gpu_memory is None:
        if plan.device.type == "cpu":
            return None
        gpu_memory = torch.cuda.get_device_properties(plan.device).total_memory
    try:
        return hardware_limit(
            plan.spec, plan.dtype.itemsize, gpu_memory, host_memory, rate, workload, packed=plan.policy.packed
        )
    except NoFeasiblePolicyError:  # all experts fit on the GPU: no link bounds it
        return None


def check_all_fitted(engine: Engine) -> None:
    """Make sure that passes were as large as planned.

    Raises:
        DeviceError: some did not fit, and those after them were smaller.
    """
    if engine.num_too_large:
        raise DeviceError(
            f"{engine.num_too_large} passes did not fit in GPU memory and those after them were smaller, so the "
            "plan was not measured; end other programs on the GPU, or give a policy with fewer resident_pages"
        )


def page_bytes(loaded: Loaded) -> int:
    """Of one page."""
    frames = loaded.worker.weights.pages.frames
    return frames[:1].nbytes
