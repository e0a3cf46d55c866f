"""A plan with what stands around it: its memory, its limit, the next best, and what other machines would reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from moe_lightning.errors import NoFeasiblePolicyError
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.alternatives import Alternative, alternatives
from moe_lightning.perf.cost import DTYPE_BYTES
from moe_lightning.perf.default_policy import Memory
from moe_lightning.perf.limit import HardwareLimit, hardware_limit
from moe_lightning.perf.memory import MemoryUse
from moe_lightning.perf.planner import problem_of, search
from moe_lightning.perf.rates import LighterPages, Rates
from moe_lightning.perf.trials import Planned
from moe_lightning.perf.workload import Workload
from moe_lightning.units import GIB

_CONTEXT = GIB  # the driver's context, cuBLAS and kernels
_CARDS = (16, 24)  # GiB of usual cards


@dataclass(frozen=True)
class Machine:
    """Where a model would run.

    Attributes:
        name: for people.
        rates: of its lanes.
        gpu_memory: bytes that the process may use, context included.
        host_memory: bytes for weights and KV.
    """

    name: str
    rates: Rates
    gpu_memory: int
    host_memory: int

    @property
    def memory(self) -> Memory:
        """What is left for tensors."""
        return Memory(self.host_memory, self.gpu_memory - _CONTEXT)


@dataclass(frozen=True)
class Report:
    """A plan, its limit, and what other machines would reach.

    Attributes:
        spec: the model.
        machine: where.
        dtype: of weights and KV.
        workload: what.
        planned: policy and prediction.
        memory: what the policy takes.
        limit: None where all experts fit on the GPU: then no link bounds the machine.
        left_out: places that the plan does not use.
        longest: tokens that no request exceeds; None: those of the workload's longest.
    """

    spec: ModelSpec
    machine: Machine
    dtype: str
    workload: Workload
    planned: Planned
    memory: MemoryUse
    limit: HardwareLimit | None
    left_out: tuple[Alternative, ...]
    longest: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "machine": {
                "name": self.machine.name, "gpu_memory": self.machine.gpu_memory,
                "host_memory": self.machine.host_memory,
            },
            "dtype": self.dtype, "workload": asdict(self.workload), "policy": asdict(self.planned.policy),
            "prediction": {
                **asdict(self.planned.prediction),
                "prefill_tokens_per_s": self.planned.prediction.prefill_tokens_per_s,
            },
            "memory": asdict(self.memory), "limit": asdict(self.limit) if self.limit else None,
            "bottleneck": self.bottleneck, "what_ifs": self.what_ifs,
            "runners_up": [
                {
                    "choice": asdict(p.choice), "schedule": p.policy.schedule,
                    "num_seqs": p.prediction.num_seqs, "tokens_per_s": p.tokens_per_s,
                }
                for p in self.planned.runners_up
            ],
            "left_out": [asdict(each) for each in self.left_out],
        }  # fmt: skip

    @cached_property
    def what_ifs(self) -> dict[str, float | None]:
        """Tokens/s of the job by what would be changed; None: it would not fit. Searched for when first asked."""
        return {name: reached() for name, reached in _changes(self)}

    @property
    def bottleneck(self) -> str:
        """The lane that works longest in a pass."""
        return self.planned.prediction.bottleneck


def plan(
    spec: ModelSpec, dtype: str, machine: Machine, workload: Workload, longest: int | None = None
) -> Report:
    """Search; once more near what was found for machines that differ in one thing, when that is asked for.

    Args:
        spec: the model.
        dtype: of weights and KV.
        machine: where.
        workload: what.
        longest: tokens that no request exceeds; default: those of the workload's longest.

    Raises:
        NoFeasiblePolicyError: the model does not fit.
        ConfigError: `longest` is more than the model was made for.
    """
    planned = search(spec, dtype, machine.memory, machine.rates, workload, max_model_len=longest)
    problem = problem_of(spec, dtype, machine.memory, workload, max_model_len=longest)
    problem = replace(problem, packed=planned.policy.packed)
    return Report(
        spec, machine, dtype, workload, planned, problem.use(planned.policy),
        _limit(spec, dtype, machine, workload, packed=planned.policy.packed),
        alternatives(problem, planned, machine.rates), longest,
    )  # fmt: skip


def _limit(
    spec: ModelSpec, dtype: str, machine: Machine, workload: Workload, *, packed: bool
) -> HardwareLimit | None:
    try:
        return hardware_limit(
            spec, DTYPE_BYTES[dtype], machine.gpu_memory, machine.host_memory, machine.rates.h2d, workload,
            packed=packed,
        )  # fmt: skip
    except NoFeasiblePolicyError:
        return None


def _changes(report: Report) -> list[tuple[str, Callable[[], float | None]]]:
    """What is asked for other machines: a name, and a function that says the tokens/s there."""
    machine, dtype = report.machine, report.dtype

    def on(changed: Machine, expert_bytes: int | None = None) -> Callable[[], float | None]:
        def reached() -> float | None:
            try:
                return search(
                    report.spec, dtype, changed.memory, changed.rates, report.workload,
                    max_model_len=report.longest, near=report.planned, expert_bytes=expert_bytes,
                ).tokens_per_s  # fmt: skip
            except NoFeasiblePolicyError:
                return None

        return reached

    gpu, host = machine.gpu_memory, machine.host_memory
    lighter = replace(machine, rates=LighterPages(machine.rates, 1 / DTYPE_BYTES[dtype]))
    return [
        ("32 GiB more host memory", on(replace(machine, host_memory=host + 32 * GIB))),
        ("32 GiB less host memory", on(replace(machine, host_memory=max(0, host - 32 * GIB)))),
        *(
            (f"{size} GiB of GPU memory", on(replace(machine, gpu_memory=size * GIB)))
            for size in _CARDS
            if abs(size * GIB - gpu) >= GIB
        ),
        ("FP8 experts, same FLOP/s", on(lighter, expert_bytes=1)),
    ]
