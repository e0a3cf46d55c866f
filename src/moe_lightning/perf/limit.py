"""The yardstick of every throughput: what a machine could reach if nothing but its link and memory bound it."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lightning.errors import NoFeasiblePolicyError
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.page_size import page_bytes
from moe_lightning.perf.workload import Workload
from moe_lightning.units import format_bytes


@dataclass(frozen=True)
class HardwareLimit:
    """All GPU memory beyond the other weights holds experts, all host memory beyond the streamed ones holds KV.

    Attributes:
        resident_share: of the experts' bytes that stay on the GPU.
        num_seqs: that decode at once.
        pass_s: seconds in which the link moves what is streamed.
        tokens_per_s: generated.
    """

    resident_share: float
    num_seqs: float
    pass_s: float
    tokens_per_s: float


def hardware_limit(
    spec: ModelSpec,
    dtype_bytes: int,
    gpu_memory: int,
    host_memory: int,
    h2d: float,
    workload: Workload,
    *,
    packed: bool = False,
) -> HardwareLimit:
    """The limit of link-bound decoding with continuous admission.

    Args:
        spec: the model.
        dtype_bytes: of weights and KV.
        gpu_memory: bytes allowed.
        host_memory: bytes for streamed weights and KV.
        h2d: bytes/s of large copies to the GPU.
        workload: whose mean lengths count.
        packed: experts are stored packed.

    Raises:
        NoFeasiblePolicyError: weights alone do not fit, or all of them fit on the GPU: then no link bounds it.
    """
    e = spec.experts
    expert = page_bytes(spec.hidden_size, e.intermediate_size, dtype_bytes, packed=packed)
    experts = expert * e.num_experts * spec.num_layers
    others = (spec.num_parameters - spec.num_expert_parameters) * dtype_bytes
    streamed = experts - (gpu_memory - others)
    room = host_memory - streamed
    if streamed <= 0 or room <= 0 or gpu_memory < others:
        raise NoFeasiblePolicyError(
            f"{format_bytes(gpu_memory)} of GPU memory and {format_bytes(host_memory)} of host memory set no such "
            f"limit for {format_bytes(experts)} of experts and {format_bytes(others)} of other weights"
        )
    num_seqs = room / spec.kv_bytes_per_token(dtype_bytes) / (workload.mean_context - 0.5)
    pass_s = streamed / h2d
    return HardwareLimit(1 - streamed / experts, num_seqs, pass_s, num_seqs / pass_s)
