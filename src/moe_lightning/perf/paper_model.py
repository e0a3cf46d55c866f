"""The paper's cost model and policy search, in the form that its artifact has them.

Source: "MoE-Lightning" (arXiv 2411.11217), section 4.2, with what its artifact assumes: attention on the CPU over a
KV cache that lies in host memory, experts on the GPU, 16-bit numbers, all sequences alike. Left out are prefill,
products of attention with V, transfers of q, k, v and hidden states, and the share of host bandwidth that copies
take: measured throughput was a half to a tenth of what it predicts. It is here for comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import chain, count

from moe_lightning.errors import ConfigError, NoFeasiblePolicyError
from moe_lightning.hardware.spec import HardwareSpec
from moe_lightning.models.spec import ModelSpec
from moe_lightning.units import GIB, format_bytes

GPU_SHARE, HOST_SHARE = 0.86, 0.80  # of the memory, that a policy may use
PRINTED_GPU_SHARE = 0.90  # what the artifact prints as its limit, and does not hold itself to
_WORKSPACE = 1.2  # allowance over the experts' intermediate results
_REL = 1e-9  # throughputs that differ by rounding alone


@dataclass(frozen=True)
class PaperWorkload:
    """Prompts of `prompt_len` tokens (s), each answered with `gen_len` tokens (n).

    Raises:
        ConfigError: a length is out of range.
    """

    prompt_len: int
    gen_len: int

    def __post_init__(self) -> None:
        if self.prompt_len < 1:
            raise ConfigError(f"prompt_len={self.prompt_len}: give 1 or more tokens")
        if self.gen_len < 2:
            raise ConfigError(
                f"gen_len={self.gen_len}: the paper's model rates what comes after the first token; give 2 or more"
            )

    @property
    def total_len(self) -> int:
        """Tokens of a finished sequence (S)."""
        return self.prompt_len + self.gen_len


@dataclass(frozen=True)
class PaperMachine:
    """What the model knows of a machine: memory in bytes, bandwidths in bytes/s, rates in FLOP/s.

    Raises:
        ConfigError: a value is no finite positive number.
    """

    gpu_memory: float
    host_memory: float
    link: float
    gpu_bandwidth: float
    gpu_flops: float
    cpu_bandwidth: float
    cpu_flops: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                raise ConfigError(f"{field.name}={value}: give a positive number")

    @classmethod
    def of(cls, hardware: HardwareSpec) -> PaperMachine:
        """A machine's memory, and its rates in float16."""
        gpu, cpu = hardware.gpu, hardware.cpu
        return cls(
            gpu_memory=gpu.memory_bytes,
            host_memory=cpu.memory_bytes,
            link=hardware.h2d,
            gpu_bandwidth=gpu.bandwidth,
            gpu_flops=gpu.peak_flops("float16"),
            cpu_bandwidth=cpu.bandwidth,
            cpu_flops=cpu.peak_flops("float16"),
        )


@dataclass(frozen=True)
class Peak:
    """Bytes of a memory in use at most: `home` stays, `w` passes through, `inter` of it intermediate results."""

    home: float
    w: float
    inter: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of both."""
        return self.home + self.w


@dataclass(frozen=True)
class PaperPlan:
    """A policy and what it is predicted to do, under the artifact's names.

    Attributes:
        ubs: sequences in a micro-batch (the paper's mu).
        n_ub: micro-batches in a batch (N / mu).
        wg: share of the experts' weights that stays on the GPU (r_w).
        cg: share of the KV cache on the GPU (r_c): 0.
        eg: experts of a layer that the GPU computes: all.
        ctog_s: seconds to copy a layer's streamed weights to the GPU.
        gpu_s: seconds of GPU work in a layer.
        cpu_s: seconds of CPU work in a layer.
        pass_s: seconds of a decode pass over all layers.
        decode_throughput: generated tokens/s, prefill not counted.
        gpu: peak of GPU memory.
        host: peak of host memory.
        expert_bytes: of all experts.
        other_bytes: of all attention weights; the artifact counts no embedding, head, norm or router.
        machine: that it is for.
    """

    ubs: int
    n_ub: int
    wg: float
    cg: float
    eg: int
    ctog_s: float
    gpu_s: float
    cpu_s: float
    pass_s: float
    decode_throughput: float
    gpu: Peak
    host: Peak
    expert_bytes: int
    other_bytes: int
    machine: PaperMachine

    @property
    def wc(self) -> float:
        """Share of the experts' weights in host memory."""
        return 1 - self.wg

    @property
    def cc(self) -> float:
        """Share of the KV cache in host memory."""
        return 1 - self.cg

    def to_json(self) -> dict[str, float]:
        """The plan with the artifact's names as keys."""
        return {
            "ubs": self.ubs,
            "n_ub": self.n_ub,
            "wg": self.wg,
            "wc": self.wc,
            "cg": self.cg,
            "cc": self.cc,
            "eg": self.eg,
            "ctog_s": self.ctog_s,
            "gpu_T_s": self.gpu_s,
            "cpu_T_s": self.cpu_s,
            "T_s": self.pass_s,
            "decode_throughput": self.decode_throughput,
            "gpu_peak_gib": self.gpu.total / GIB,
            "cpu_peak_gib": self.host.total / GIB,
        }


def plan_paper(spec: ModelSpec, machine: PaperMachine, workload: PaperWorkload) -> PaperPlan:
    """The policy of the highest predicted decode throughput; of equal ones the first that is tried.

    Tries micro-batches of 1, 2, 3, 4, 36, 68, ... sequences (steps of 32), and of each 1, 2, ... as long as that
    pays: throughput rises with their number until GPU or CPU is the bound, and does not rise again.

    Raises:
        NoFeasiblePolicyError: not even one sequence fits.
    """
    best: PaperPlan | None = None
    for ubs in chain((1, 2, 3), count(4, 32)):
        found = None
        for plan in _rising(spec, machine, workload, ubs):
            found = plan
        if found is None:
            break  # larger ones fit even less
        if best is None or found.decode_throughput > best.decode_throughput * (1 + _REL):
            best = found
    if best is None:
        raise _infeasible(spec, machine, workload)
    return best


def evaluate(
    spec: ModelSpec, machine: PaperMachine, workload: PaperWorkload, ubs: int, n_ub: int
) -> PaperPlan | None:
    """The plan of a batch of n_ub micro-batches of ubs sequences; None if it does not fit.

    `wg` is the share at which copies take as long as the slower of GPU and CPU, or the nearest that memory allows.
    The artifact solves a linear program for it; with attention on the CPU and experts on the GPU there is no other
    unknown.
    """
    gpu_s, cpu_s = _gpu_s(spec, machine, ubs, n_ub), _cpu_s(spec, machine, workload, ubs, n_ub)
    layer = _layer_bytes(spec)
    least, most = _wg_range(spec, machine, workload, ubs, n_ub)
    if least > most:
        return None
    balanced = 1 - max(gpu_s, cpu_s) * machine.link / layer
    wg = min(max(balanced, least), most)
    ctog_s = layer * (1 - wg) / machine.link
    pass_s = spec.num_layers * max(ctog_s, gpu_s, cpu_s)
    return PaperPlan(
        ubs=ubs,
        n_ub=n_ub,
        wg=wg,
        cg=0.0,
        eg=spec.experts.num_experts,
        ctog_s=ctog_s,
        gpu_s=gpu_s,
        cpu_s=cpu_s,
        pass_s=pass_s,
        decode_throughput=ubs * n_ub * workload.gen_len / (pass_s * (workload.gen_len - 1)),
        gpu=_gpu_peak(spec, workload, ubs, n_ub, wg),
        host=_host_peak(spec, workload, ubs, n_ub, wg),
        expert_bytes=spec.num_layers * layer,
        other_bytes=_attention_bytes(spec),
        machine=machine,
    )


def _rising(spec: ModelSpec, machine: PaperMachine, workload: PaperWorkload, ubs: int) -> Iterator[PaperPlan]:
    """Plans of 1, 2, ... micro-batches as long as each is faster than the one before."""
    highest = 0.0
    for n_ub in count(1):
        plan = evaluate(spec, machine, workload, ubs, n_ub)
        if plan is None or plan.decode_throughput <= highest * (1 + _REL):
            return
        highest = plan.decode_throughput
        yield plan


# -- the formulas, in 16-bit numbers of 2 bytes ------------------------------------------------------------


def _layer_bytes(spec: ModelSpec) -> int:
    """W: weights of one layer's experts."""
    return 2 * spec.experts.num_experts * 3 * spec.hidden_size * spec.experts.intermediate_size


def _attention_bytes(spec: ModelSpec) -> int:
    """Attention weights of all layers."""
    return 2 * spec.num_layers * spec.hidden_size * (spec.attention.qkv_size + spec.attention.q_size)


def _gpu_s(spec: ModelSpec, machine: PaperMachine, ubs: int, n_ub: int) -> float:
    """Each micro-batch reads all experts of the layer."""
    h1, h2, topk = spec.hidden_size, spec.experts.intermediate_size, spec.experts.top_k
    memory_s = (2 * ubs * (h1 + h2) + _layer_bytes(spec)) / machine.gpu_bandwidth
    return n_ub * max(memory_s, 6 * topk * ubs * h1 * h2 / machine.gpu_flops)


def _cpu_s(spec: ModelSpec, machine: PaperMachine, workload: PaperWorkload, ubs: int, n_ub: int) -> float:
    """Each micro-batch reads its whole KV cache."""
    h1, a, total = spec.hidden_size, spec.attention, workload.total_len
    memory_s = 2 * ubs * (2 * h1 + 2 * total * a.kv_size) / machine.cpu_bandwidth
    return n_ub * max(memory_s, ubs * total * a.num_heads * (2 * a.head_dim + 2) / machine.cpu_flops)


def _gpu_peak(spec: ModelSpec, workload: PaperWorkload, ubs: int, n_ub: int, wg: float) -> Peak:
    """At home: attention and resident weights, hidden states. Passing through: streamed weights of two layers."""
    h1, h2, hkv = spec.hidden_size, spec.experts.intermediate_size, spec.attention.kv_size
    layer, batch, s = _layer_bytes(spec), ubs * n_ub, workload.prompt_len
    decode = 4 * h1 * batch
    prefill = 4 * h1 * ubs * s + 2 * h1 * batch * s + 8 * s * hkv * ubs
    inter = 2 * _WORKSPACE * ubs * s * spec.experts.top_k * (h1 + 3 * h2)
    return Peak(
        home=_attention_bytes(spec) + spec.num_layers * layer * wg + max(decode, prefill),
        w=2 * layer * (1 - wg) + inter,
        inter=inter,
    )


def _host_peak(spec: ModelSpec, workload: PaperWorkload, ubs: int, n_ub: int, wg: float) -> Peak:
    """At home: streamed weights, KV cache, hidden states of prompts. Passing through: two layers of them again."""
    layer, batch = _layer_bytes(spec), ubs * n_ub
    kv = 4 * workload.total_len * spec.attention.kv_size * batch * spec.num_layers
    hidden = 2 * spec.hidden_size * batch * workload.prompt_len
    return Peak(home=spec.num_layers * layer * (1 - wg) + kv + hidden, w=2 * layer * (1 - wg))


def _wg_range(
    spec: ModelSpec, machine: PaperMachine, workload: PaperWorkload, ubs: int, n_ub: int
) -> tuple[float, float]:
    """Least and greatest wg under which both memories suffice; the least is above the greatest if none is.

    Both peaks are linear in wg: host memory says at least how much is on the GPU, GPU memory at most.
    """
    limits = (
        (_gpu_peak, GPU_SHARE * machine.gpu_memory),
        (_host_peak, HOST_SHARE * machine.host_memory),
    )
    least, most = 0.0, 1.0
    for peak, limit in limits:
        none, all_ = (peak(spec, workload, ubs, n_ub, wg).total for wg in (0.0, 1.0))
        slope, room = all_ - none, limit - none
        if slope > 0:
            most = min(most, room / slope)
        elif slope < 0:
            least = max(least, room / slope)
        elif room < 0:
            return 1.0, 0.0
    return least, most


def _infeasible(spec: ModelSpec, machine: PaperMachine, workload: PaperWorkload) -> NoFeasiblePolicyError:
    """What one sequence lacks: GPU memory with all experts on the host, else host memory with the GPU full."""
    gpu = GPU_SHARE * machine.gpu_memory
    needed = _gpu_peak(spec, workload, 1, 1, 0.0).total
    if needed > gpu:
        what, share, total = "GPU", GPU_SHARE, machine.gpu_memory
    else:
        what, share, total = "host", HOST_SHARE, machine.host_memory
        filled = needed, _gpu_peak(spec, workload, 1, 1, 1.0).total
        wg = min(1.0, (gpu - needed) / (filled[1] - filled[0])) if filled[1] > filled[0] else 1.0
        needed = _host_peak(spec, workload, 1, 1, wg).total
    return NoFeasiblePolicyError(
        f"{spec.architecture} needs {format_bytes(needed)} of {what} memory for one sequence of "
        f"{workload.total_len} tokens under the paper's model, which uses {share:.0%} of {format_bytes(total)}",
        f"Give {format_bytes(needed / share)} of {what} memory, shorter prompts, or a smaller model",
    )
