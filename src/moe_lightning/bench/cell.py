"""One way to run one workload, and what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lightning.bench.lanes import Lanes
from moe_lightning.bench.passes import PassRecord
from moe_lightning.bench.peaks import Peaks
from moe_lightning.engine.plan import Plan
from moe_lightning.perf.limit import HardwareLimit
from moe_lightning.perf.workload import Workload
from moe_lightning.pipeline.timeline import Timeline
from moe_lightning.verify import Verification

_FULL = 0.97  # of the sequences that fill KV memory: a pass of a job that counts as one of its steady state


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

    @property
    def full_tokens_per_s(self) -> float:
        """While as many sequences run as fill memory, or as ever: of a job, what its steady state should reach."""
        most = min(self.num_seqs, max(p.num_running for p in self.passes))
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


def _rate(passes: tuple[PassRecord, ...]) -> float:
    return sum(p.generated for p in passes) / sum(p.seconds for p in passes)
