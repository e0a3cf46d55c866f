"""One way to run one workload, and what was measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_lightning.bench.lanes import Lanes
from moe_lightning.bench.passes import PassRecord
from moe_lightning.bench.peaks import Peaks
from moe_lightning.engine.plan import Plan
from moe_lightning.perf.limit import HardwareLimit
from moe_lightning.perf.rates import MeasuredRates
from moe_lightning.perf.workload import Workload
from moe_lightning.pipeline.timeline import Timeline
from moe_lightning.verify import Verification

_FULL = 0.97  # of the most sequences of a job: with them, its memory is full for the first time


@dataclass(frozen=True)
class Effort:
    """What is measured.

    Attributes:
        steady_passes: after a beginning with sequences of all ages; 0 for none.
        is_job: a whole job, from empty to empty.
        num_checked: answers that are recomputed by plain PyTorch.
        copy_s: seconds of plain copies, and of plain reads.
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
        num_seqs: that decode while KV memory is full.
        predicted_tokens_per_s: what the plan says; None if it says nothing.
        lanes: in recorded passes; None if none was.
        num_preemptions: how often a sequence had to start again.
        first_pass_s: from the process's start to the first pass.
        check: answers against plain PyTorch; None if none was asked for.
        timelines: of the recorded passes.
    """

    kind: str
    passes: tuple[PassRecord, ...]
    num_seqs: int
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
        plain_read: of the attention's threads reading KV, alike; None where there is little in host memory.
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
    plain_read: float | None
    peaks: Peaks
    ready_s: float

    @property
    def like_profile(self) -> float | None:
        """The rate of plain reads after the run over that of the profile that was planned with; None without one.

        What else runs on a host takes of its memory's rate, for minutes: the machine is then not the one that was
        planned for.
        """
        rates = self.plan.rates
        if self.plain_read is None or not isinstance(rates, MeasuredRates):
            return None
        return self.plain_read / rates.profile.host.read

    @property
    def agreement(self) -> float | None:
        """The job's rate while memory is full, over the steady state's.

        None unless both were measured, of as many requests as fill memory twice.
        """
        found = {m.kind: m for m in self.measured}
        if len(found) < 2 or self.workload.num_requests is not None:
            return None
        return turnover(found["job"].passes, self.workload.gen_len) / found["steady state"].tokens_per_s


def turnover(passes: Sequence[PassRecord], gen_len: int) -> float:
    """Tokens/s of a job while KV memory, once full, changes hands once: what its steady state should reach.

    A job's sequences begin together. So passes with many prompts follow passes with none, and no single one is like
    the steady state; but in as many passes as an answer has tokens, each sequence makes room for another.

    Args:
        passes: of a job, all.
        gen_len: tokens of an answer, on average.
    """
    most = max(p.num_running for p in passes)
    first = next(number for number, p in enumerate(passes) if p.num_running >= _FULL * most)
    return _rate(passes[first : first + gen_len])


def _rate(passes: Sequence[PassRecord]) -> float:
    return sum(p.generated for p in passes) / sum(p.seconds for p in passes)
