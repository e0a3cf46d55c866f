"""The paper's ablation: schedules, batches and groups on one engine, predicted beside measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import mean, median

from moe_lightning.bench.lanes import Lanes, summarize
from moe_lightning.bench.passes import PassRecord, Show, Source, begin_midway, run_passes, show_nothing
from moe_lightning.bench.peaks import Peaks
from moe_lightning.bench.session import Loaded, Session
from moe_lightning.bench.throughput import check_all_fitted, page_bytes
from moe_lightning.bench.variants import Variant, paper_plan, policy_of
from moe_lightning.engine.plan import Plan
from moe_lightning.errors import ConfigError, MoELightningError
from moe_lightning.hardware.spec import HardwareSpec
from moe_lightning.perf.default_policy import Memory
from moe_lightning.perf.paper_model import PaperMachine
from moe_lightning.perf.passes import Passes
from moe_lightning.perf.planner import problem_of, search
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.workload import Workload, num_decoding
from moe_lightning.policy import Policy

_WARM_UP = 2
_RAMP = 3  # passes of a ramp that are measured at most


@dataclass(frozen=True)
class Row:
    """What a variant reached.

    Attributes:
        variant: which.
        policy: its own.
        num_seqs: that decode at once.
        tokens_per_s: generated, prompts included.
        predicted_tokens_per_s: by the simulation of the same passes.
        passes: that were measured, all full.
        ramp_s: where batches follow each other, seconds in which a batch's prompts are computed; else 0.
        predicted_pass_s: seconds of the median pass.
        lanes: in a recorded pass.
        peaks: of memory.
    """

    variant: Variant
    policy: Policy
    num_seqs: int
    tokens_per_s: float
    predicted_tokens_per_s: float
    passes: tuple[PassRecord, ...]
    ramp_s: float
    predicted_pass_s: float
    lanes: Lanes | None
    peaks: Peaks

    @property
    def pass_s(self) -> float:
        """Seconds of the median pass."""
        return median(p.seconds for p in self.passes)


def measure(
    session: Session,
    plan: Plan,
    work: Workload,
    variants: Sequence[Variant],
    rates: Rates,
    machine: HardwareSpec,
    *,
    num_passes: int = 4,
    show: Show = show_nothing,
) -> Iterator[Row]:
    """A row for each variant that fits, over the same weights in host memory; those of packed experts are others.

    A batch after the other is measured in parts: passes that take prompts in, of which there are as many as the
    batch needs, and passes with the whole batch at half its answers, one for each token of an answer.

    Args:
        session: where the model is loaded; its configuration limits GPU memory.
        plan: our planner's, for the workload; where it packs experts, variants that do not get another.
        work: what is computed.
        variants: to measure.
        rates: that the prediction takes.
        machine: as the paper's planner sees it, but for its memory.
        num_passes: to measure of each.
        show: told of each pass.

    Raises:
        ConfigError, NoFeasiblePolicyError: the model cannot run in that memory.
    """
    gpu_memory = session.config.gpu_memory or machine.gpu.memory_bytes
    if plan.device.type == "cpu" and session.config.gpu_memory is None:
        raise ConfigError(
            "schedules differ only where experts stream; give gpu_memory, which the CPU then plays"
        )
    problem = problem_of(
        plan.spec,
        str(plan.dtype).removeprefix("torch."),
        Memory(session.host_memory, session.gpu_budget(plan.device)),
        work,
    )
    paper = paper_plan(
        plan.spec,
        replace(PaperMachine.of(machine), gpu_memory=gpu_memory, host_memory=session.limit_host_memory),
        work,
    )

    @cache
    def plain() -> Policy:
        return search(plan.spec, problem.dtype, problem.memory, rates, work, packs=False).policy

    for variant in variants:
        try:
            ours = plan.policy if variant.packs or not plan.policy.packed else plain()
            policy = policy_of(variant, ours, problem, paper)
            experts = "packed" if policy.packed else "plain"
            show(
                f"{variant.name}: {variant.what}; {num_decoding(policy, work)} sequences, {policy.schedule}, "
                f"{experts} experts"
            )
            row = _row(session, replace(plan, policy=policy), variant, work, rates, num_passes, show)
        except MoELightningError as error:  # it stops no other
            show(f"{variant.name}: {error}")
        else:
            yield row
        session.unload()


def _row(
    session: Session, plan: Plan, variant: Variant, work: Workload, rates: Rates, num_passes: int, show: Show
) -> Row:
    watch = session.watch()
    loaded = session.load(plan)
    session.fill_kv(loaded)
    run = _Run(loaded, work, variant, num_passes, show)
    ramp = run.ramp() if variant.in_batches else None
    passes, num_seqs, lanes = run.full()
    peaks = watch.peaks(session.config.gpu_memory, session.planned_host_bytes(plan))
    predict = _Predicted(plan, rates, work)
    prompts = round(mean(p.prompt_tokens for p in passes))
    context = work.mean_prompt + work.gen_len / 2 + 1 if variant.in_batches else work.mean_context
    predicted = predict.seconds(num_seqs, prompts, context)
    if ramp is None:
        tokens = mean(p.generated for p in passes)
        rate = sum(p.generated for p in passes) / sum(p.seconds for p in passes)
        return Row(
            variant, plan.policy, num_seqs, rate, tokens / predicted, passes, 0.0, predicted, lanes, peaks
        )
    # What the last pass of a ramp has no room for, and what did not come, in proportion.
    scale = num_seqs * work.mean_prompt / sum(p.prompt_tokens for p in ramp)
    ramp_s = scale * sum(p.seconds for p in ramp)
    predicted_ramp_s = scale * sum(predict.ramp_seconds(p) for p in ramp)
    generated, rest = num_seqs * work.gen_len, work.gen_len - 1
    rate = generated / (ramp_s + rest * median(p.seconds for p in passes))
    return Row(
        variant, plan.policy, num_seqs, rate, generated / (predicted_ramp_s + rest * predicted), passes, ramp_s,
        predicted, lanes, peaks,
    )  # fmt: skip


@dataclass(frozen=True)
class _Run:
    loaded: Loaded
    work: Workload
    variant: Variant
    num_passes: int
    show: Show

    def ramp(self) -> list[PassRecord]:
        """The passes that take a batch's prompts in, or the first of them."""
        self._beginning(1)  # compiles kernels
        return [p for p in self._beginning(_RAMP) if p.prompt_tokens]

    def _beginning(self, num_passes: int) -> list[PassRecord]:
        plan, engine = self.loaded.plan, self.loaded.engine(in_batches=True)
        source, queue = Source(self.work, plan.spec.vocab_size), 2 * num_decoding(plan.policy, self.work)
        return list(run_passes(engine, iter(source), source, queue, num_passes=num_passes, show=self.show))

    def full(self) -> tuple[tuple[PassRecord, ...], int, Lanes | None]:
        """Passes of a whole batch, or of all ages with prompts that take the place of those that end."""
        loaded, plan = self.loaded, self.loaded.plan
        n = num_decoding(plan.policy, self.work)
        engine = loaded.engine(in_batches=self.variant.in_batches)
        source = Source(self.work, plan.spec.vocab_size)
        num_seqs = begin_midway(engine, source, n, same_age=self.variant.in_batches)
        requests = iter(source)
        if self.variant.in_batches:
            engine.close_batch()
        # A batch must not end before the last pass: half of its answers are left.
        count = min(self.num_passes, max(1, (self.work.gen_len - self.work.gen_len // 2) - _WARM_UP - 1))

        def run(number: int) -> list[PassRecord]:
            return list(run_passes(engine, requests, source, 2 * n, num_passes=number, show=self.show))

        loaded.worker.records_fullest = False  # recording takes time
        run(_WARM_UP)
        passes = run(count)
        loaded.worker.record_next = True
        run(1)
        check_all_fitted(engine)
        recorded = loaded.worker.recorded
        return tuple(passes), num_seqs, summarize([recorded] if recorded else [], page_bytes(loaded))


@dataclass(frozen=True)
class _Predicted:
    plan: Plan
    rates: Rates
    work: Workload

    def seconds(self, decode: int, prefill: int, context: float) -> float:
        """Of a pass of so many sequences and prompt tokens, in the middle of many."""
        spec, dtype = self.plan.spec, str(self.plan.dtype).removeprefix("torch.")
        work = self.work
        passes = Passes(
            spec,
            dtype,
            self.plan.policy,
            self.rates,
            context,
            work.mean_prompt,
            token_prompt=work.token_prompt,
        )
        return passes.steady(decode, prefill)[0]

    def ramp_seconds(self, ramp: PassRecord) -> float:
        """Of a pass like this one, in which each new sequence and each that decodes got a token."""
        new = round(ramp.prompt_tokens / self.work.mean_prompt)
        return self.seconds(max(0, ramp.generated - new), ramp.prompt_tokens, self.work.mean_prompt + 1)
