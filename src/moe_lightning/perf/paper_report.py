"""A plan of the paper's model as text, figure by figure in the order and precision of the artifact's printout."""

from __future__ import annotations

from moe_lightning.perf.paper_model import HOST_SHARE, PRINTED_GPU_SHARE, PaperPlan, Peak
from moe_lightning.units import GIB


def format_plan(plan: PaperPlan) -> str:
    """Lines for people: the policy, what it copies and computes, what it fills, what it is predicted to do."""
    machine = plan.machine
    bound = max(
        ("ctog", plan.ctog_s), ("gpu_T", plan.gpu_s), ("cpu_T", plan.cpu_s), key=lambda part: part[1]
    )[0]
    total = plan.expert_bytes + plan.other_bytes
    rows = (
        (
            "ubs, n_ub",
            f"{plan.ubs}, {plan.n_ub}",
            f"{plan.ubs * plan.n_ub:,} sequences at once, in micro-batches",
        ),
        ("wg, wc", f"{plan.wg:.8g}, {plan.wc:.8g}", "share of the experts on the GPU, in host memory"),
        ("cg, cc", f"{plan.cg:g}, {plan.cc:g}", "share of the KV cache on the GPU, in host memory"),
        ("eg", f"{plan.eg}", "experts of a layer that the GPU computes"),
        ("weights", f"{total / GIB:.4f} GiB", f"{plan.other_bytes / GIB:.4f} GiB of it no experts"),
        ("ctog", f"{plan.ctog_s:.4f} s", "to copy what a layer streams to the GPU"),
        ("gpu_T", f"{plan.gpu_s:.4f} s", "GPU work of a layer"),
        ("cpu_T", f"{plan.cpu_s:.4f} s", "CPU work of a layer"),
        ("T", f"{plan.pass_s:.3f} s", f"a decode pass over all layers; {bound} is the bound"),
        ("GPU peak", *_peak(plan.gpu, PRINTED_GPU_SHARE * machine.gpu_memory)),
        ("CPU peak", *_peak(plan.host, HOST_SHARE * machine.host_memory)),
        ("throughput", f"{plan.decode_throughput:.2f} token/s", "while decoding; prefill is not counted"),
    )
    width = max(len(value) for _, value, _ in rows)
    return "\n".join(f"{name:<10}  {value:<{width}}  {note}" for name, value, note in rows)


def _peak(peak: Peak, limit: float) -> tuple[str, str]:
    inter = f", of it inter {peak.inter / GIB:.2f}" if peak.inter else ""
    parts = f"home {peak.home / GIB:.2f}, w {peak.w / GIB:.2f}{inter}"
    return f"{peak.total / GIB:.3f} of {limit / GIB:.3f} GiB", parts
