"""A plan in words: whether it fits, what it should reach, what holds it back, what would help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from moe_lightning.errors import NoFeasiblePolicyError
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.default_policy import Memory
from moe_lightning.perf.limit import HardwareLimit, hardware_limit
from moe_lightning.perf.planner import Planned, search
from moe_lightning.perf.rates import Rates
from moe_lightning.perf.workload import Workload
from moe_lightning.units import GIB, format_bytes

_CONTEXT = GIB  # the driver's context, cuBLAS and kernels


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
        machine: where.
        dtype: of weights and KV.
        workload: what.
        planned: policy and prediction.
        limit: None where all experts fit on the GPU: then no link bounds the machine.
        what_ifs: tokens/s of the job by what would be changed; None: it would not fit.
    """

    machine: Machine
    dtype: str
    workload: Workload
    planned: Planned
    limit: HardwareLimit | None
    what_ifs: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "machine": {
                "name": self.machine.name, "gpu_memory": self.machine.gpu_memory,
                "host_memory": self.machine.host_memory,
            },
            "dtype": self.dtype, "workload": asdict(self.workload), "policy": asdict(self.planned.policy),
            "prediction": asdict(self.planned.prediction), "limit": asdict(self.limit) if self.limit else None,
            "bottleneck": self.bottleneck, "what_ifs": self.what_ifs,
        }  # fmt: skip

    @property
    def bottleneck(self) -> str:
        """The lane that works longest in a pass."""
        lanes = self.planned.prediction.lane_s
        return max(lanes, key=lanes.__getitem__)


def plan(
    spec: ModelSpec, dtype: str, machine: Machine, workload: Workload, longest: int | None = None
) -> Report:
    """Search, and once more near what was found for machines that differ in one thing.

    Args:
        spec: the model.
        dtype: of weights and KV.
        machine: where.
        workload: what.
        longest: tokens that no request exceeds; default: those of the workload's longest.

    Raises:
        NoFeasiblePolicyError: the model does not fit.
    """
    planned = search(spec, dtype, machine.memory, machine.rates, workload, max_model_len=longest)
    size = 4 if dtype == "float32" else 2

    def reached(memory: Memory) -> float | None:
        try:
            found = search(
                spec, dtype, memory, machine.rates, workload, max_model_len=longest, near=planned.choice
            )
            return found.prediction.job_tokens_per_s
        except NoFeasiblePolicyError:
            return None

    memory = machine.memory
    assert memory.gpu is not None
    changes: dict[str, Callable[[], float | None]] = {
        "32 GiB more host memory": lambda: reached(Memory(memory.host + 32 * GIB, memory.gpu)),
        "32 GiB less host memory": lambda: reached(Memory(max(memory.host - 32 * GIB, 0), memory.gpu)),
        "8 GiB more GPU memory": lambda: reached(Memory(memory.host, (memory.gpu or 0) + 8 * GIB)),
        "8 GiB less GPU memory": lambda: reached(Memory(memory.host, max((memory.gpu or 0) - 8 * GIB, 0))),
    }
    try:
        limit = hardware_limit(
            spec, size, machine.gpu_memory, machine.host_memory, machine.rates.h2d, workload
        )
    except NoFeasiblePolicyError:
        limit = None
    return Report(
        machine, dtype, workload, planned, limit, {name: change() for name, change in changes.items()}
    )


def to_text(spec: ModelSpec, report: Report) -> str:
    """A page for people."""
    machine, policy, p = report.machine, report.planned.policy, report.planned.prediction
    per_layer = spec.experts.num_experts * policy.pages_per_expert
    resident = sum(policy.resident_pages) / (per_layer * spec.num_layers)
    lines = [
        f"{spec.architecture} in {report.dtype} fits {machine.name}: {format_bytes(machine.gpu_memory)} of GPU "
        f"memory, {format_bytes(machine.host_memory)} of host memory",
        "",
        f"  tokens/s, whole job    {p.job_tokens_per_s:8.0f}   generated, with prompts of "
        f"{report.workload.mean_prompt:.0f} tokens and answers of {report.workload.gen_len}",
        f"  tokens/s, memory full  {p.tokens_per_s:8.0f}"
        + (
            f"   {p.tokens_per_s / report.limit.tokens_per_s:.0%} of the hardware limit"
            if report.limit
            else ""
        ),
    ]
    if p.job_s is not None:
        lines.append(f"  the job                {p.job_s / 60:8.1f}   minutes")
    lines += [
        f"  a pass                 {p.pass_s:8.2f}   seconds, {p.num_seqs} sequences decode and "
        f"{p.prefill_tokens} prompt tokens ride along",
        "",
        "  lane   seconds a pass",
        *(
            f"  {lane.upper():<5}  {seconds:6.2f}  {'#' * round(40 * min(1.0, seconds / p.pass_s))}"
            + ("  the bottleneck" if lane == report.bottleneck else "")
            for lane, seconds in p.lane_s.items()
        ),
        "",
        f"  policy: {policy.max_num_seqs} sequences in micro-batches of {policy.micro_batch_size}; "
        f"{resident:.0%} of the experts resident, the rest through a ring of {policy.num_frames} pages;",
        f"          {policy.num_blocks} KV blocks of {policy.block_size} tokens; up to "
        f"{policy.max_num_seqs + policy.prefill_tokens} rows a pass",
        "",
        "  with",
    ]
    for name, reached in report.what_ifs.items():
        change = "it does not fit" if reached is None else f"{reached:8.0f} tokens/s"
        change += "" if reached is None else f"  {reached / p.job_tokens_per_s - 1:+.0%}"
        lines.append(f"    {name:<26} {change}")
    return "\n".join(lines)
